"""``altdiff models``, ``download`` and ``verify``: what models there are, and their files."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from flagai_altdiff.cli.common import add_model_dir
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.progress import show_bars
from flagai_altdiff.registry import DRAWING, MODELS, ModelSpec, get_model_spec, locate

_VERIFY_ADVICE = {
    "missing": "altdiff download fetches the files of a model that has a name.",
    "wrong size": "remove the file and get it again.",
    "wrong hash": "remove the file and get it again; if you changed it yourself, strike it from altdiff-manifest.json.",
    "mixed": "files of two versions lie together; move the folder away and fetch the model again.",
    "not recorded": "nothing is known to compare with; --record takes the files as they are now.",
}


def add_models(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``models``."""
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    add_model_dir(parser)
    parser.set_defaults(run=_models)


def _models(args: argparse.Namespace) -> int:
    from flagai_altdiff import hub

    if args.json:
        known = [_describe(spec, locate(name, args.model_dir)[1]) for name, spec in MODELS.items()]
        print(json.dumps(known, ensure_ascii=False, indent=2))
        return 0
    for spec in MODELS.values():
        places = ", ".join(f"{source} ({name})" for source, name in spec.sources)
        origin = "comes with the package" if spec.embedded else f"from {places}"
        print(f"{spec.name}\n  task       {spec.task}\n  languages  {' '.join(spec.languages)} ({len(spec.languages)})")
        print(f"  size       {hub.human(spec.size_bytes)}, {origin}\n  licence    {spec.licence}")
        print(f"  files      {', '.join(f.name for f in spec.files)}")
        if spec.task == DRAWING:
            print(f"  draws      {spec.width}x{spec.height} px in {spec.steps} steps, scale {spec.guidance_scale:g}")
        print()
    return 0


def _describe(spec: ModelSpec, folder: Path) -> dict[str, object]:
    from flagai_altdiff import hub

    missing = hub.missing_files(spec, folder)
    return {**asdict(spec), "sources": dict(spec.sources), "folder": str(folder), "missing": missing}


def add_download(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``download``."""
    add = parser.add_argument
    add("model", help="name of a model")
    add_model_dir(parser)
    add(
        "--source",
        metavar="WHERE",
        help="baai, huggingface, or the address of a mirror, a web folder with the files (default: what answers first)",
    )
    add("--revision", metavar="NAME", help="commit, branch or tag of the Hugging Face repository")
    add("--dry-run", action="store_true", help="only say what would be fetched, and from where")
    add("--no-safety-checker", action="store_true", help="leave the released models' image checker out")
    parser.set_defaults(run=_download, kept="; what has arrived is kept, the same command goes on")


def _download(args: argparse.Namespace) -> int:
    spec = get_model_spec(args.model)
    folder = locate(spec.name, args.model_dir)[1]
    if not show_bars():  # where no bar is drawn, the log tells how far it is
        logging.getLogger("flagai_altdiff").setLevel(logging.INFO)
    from flagai_altdiff.loading import fetch_model

    planned: list[str] = []

    def fetch(spec: ModelSpec, folder: Path) -> None:
        if not any(name.startswith("safety_checker/") for name in planned):  # in a dry run, no checker lies there yet
            planned.extend(_fetch(spec, folder, args))

    fetch_model(spec, folder, safety_checker="auto" if not args.no_safety_checker else False, fetch=fetch)
    return 0


def _fetch(spec: ModelSpec, folder: Path, args: argparse.Namespace) -> list[str]:
    """Fetch a model, or say what that would do; the names of the planned files."""
    from flagai_altdiff import hub

    if not hub.missing_files(spec, folder):
        print(f"{spec.name}: complete in {folder}")
        return []
    if not args.dry_run:
        print(hub.fetch(spec, folder, source=args.source, revision=args.revision))
        return []
    plan = hub.plan(spec, folder, source=args.source, revision=args.revision)
    print(f"{spec.name} from {plan.source} into {folder}")
    for file in plan.files:
        size = "size unknown" if file.size_bytes is None else hub.human(file.size_bytes)
        print(f"  {file.state:8} {size:>12}  {file.name}")
    print(f"{len(plan.to_come)} of {len(plan.files)} files to fetch, {hub.human(plan.to_come_bytes)}")
    return [file.name for file in plan.files]


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``verify``."""
    parser.add_argument("model", help="name of a model, or path of its folder")
    add_model_dir(parser)
    parser.add_argument(
        "--record", action="store_true", help="record files of which no SHA-256 is known, as they are now"
    )
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    from flagai_altdiff import hub

    spec, folder = locate(args.model, args.model_dir)
    if folder.is_file():
        raise InvalidRequestError("model", args.model, "expected the name of a model or the path of its folder")
    if args.record:
        for name in hub.record_missing(folder):
            print(f"recorded      {name}")
    states = set()
    for check in hub.verify(folder, spec):
        print(f"{check.state:12}  {check.name}: {check.detail}", flush=True)
        states.add(check.state)
    for state in sorted(states & _VERIFY_ADVICE.keys()):
        print(f"{state}: {_VERIFY_ADVICE[state]}", file=sys.stderr)
    return 0 if states == {"ok"} else 1
