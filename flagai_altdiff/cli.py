"""The command ``altdiff``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from flagai_altdiff import __version__, hub
from flagai_altdiff.errors import FlagAIAltDiffError, HubError, InvalidRequestError, RegistryError, TrainingInterrupted
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, MODELS, SAFETY_CHECKER, ModelSpec, get_model_spec, locate
from flagai_altdiff.request import SAMPLER_NAMES, SEED_MODES, option_of

if TYPE_CHECKING:
    from flagai_altdiff.pipeline import GenerationResult
    from flagai_altdiff.predictor import Predictor

_FLAGS = {
    "n_samples": "--n-samples",
    "n_iter": "--n-iter",
    "n_rows": "--n-rows",
    "negative_prompt": "--negative-prompt",
    "ddim_steps": "--steps",
    "ddim_eta": "--eta",
    "from_file": "--from-file",
    "skip_save": "--skip-save",
    **{name: f"--{name}" for name in ("scale", "H", "W", "seed", "sampler")},
}
"""Argument of FlagAI's call -> the flag that sets it."""

_EPILOG = """\
examples:
  altdiff generate "a large red heart on a white background" "蓝色背景上的黄色的大星星"
  altdiff generate "一只猫" --model AltDiffusion-m18 --negative-prompt "blurry" --seed 7 --sampler dpmpp_2m --steps 25
  altdiff generate --from-file prompts.txt --n-samples 2 --outdir pictures
  altdiff generate --from-file prompts.txt --n-samples 2 --outdir pictures --resume     # after an interruption
  altdiff download AltDiffusion-m18 --source huggingface --dry-run
  altdiff verify AltDiffusion-m18
  altdiff convert checkpoints/AltDiffusion-m18 m18-diffusers --to diffusers
  altdiff doctor

exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 terminated
"""


_VERIFY_ADVICE = {
    "missing": "altdiff download fetches it.",
    "wrong size": "remove the file and download again.",
    "wrong hash": "remove the file and download again; if you changed it yourself, strike it from altdiff-manifest.json.",
    "not recorded": "nothing is known to compare with; --record takes the files as they are now.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process if left out.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 terminated.
    """
    args = _parser().parse_args([_hyphened(word) for word in (sys.argv[1:] if argv is None else argv)])
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    try:
        with _termination():
            status: int = args.run(args)
        return status
    except (InvalidRequestError, RegistryError) as error:
        return _fail(error, 2)
    except FlagAIAltDiffError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, _Terminated)
        print(f"\n{'terminated' if terminated else 'interrupted'}{args.kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Terminated(KeyboardInterrupt):
    """SIGTERM came; it ends the work as Ctrl-C does."""


@contextmanager
def _termination() -> Iterator[None]:
    """Let SIGTERM unwind the block, so that nothing stays half-written."""

    def stop(signum: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(error: Exception | str, status: int) -> int:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(("\033[31merror:\033[0m " if colour else "error: ") + str(error), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="altdiff",
        description="Draw pictures from prompts in 18 languages with AltDiffusion.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flagai_altdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="draw pictures", description="Draw pictures from prompts."))
    _add_models(commands.add_parser("models", help="list the models", description="List the models that have a name."))
    _add_download(
        commands.add_parser(
            "download", help="fetch a model's files", description="Fetch what a model lacks; an interrupted download goes on."
        )
    )
    _add_verify(
        commands.add_parser(
            "verify",
            help="check a model's files",
            description="Check size and SHA-256 of a model's files against what is known or was recorded when they came.",
        )
    )
    _add_convert(
        commands.add_parser(
            "convert", help="change a model's layout on disk", description="Write a model in another layout; nothing is lost."
        )
    )
    _add_doctor(
        commands.add_parser("doctor", help="look at this machine", description="Say what this machine has and what is wrong.")
    )
    _add_train_mini(
        commands.add_parser(
            "train-mini",
            help="train the embedded model",
            description="Train AltDiffusion-mini from nothing; started again, it goes on where it was.",
        )
    )
    for command in commands.choices.values():
        command.set_defaults(kept=command.get_default("kept") or "")
        command.add_argument("-v", "--verbose", action="store_true", help="say more")
    return parser


def _hyphened(word: str) -> str:
    """A flag spelled with underscores, as FlagAI's users know them, with hyphens."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def _help(option: str, default: str = "") -> str:
    known = option_of(option)
    limits = "" if known.minimum is None else f"{known.minimum:,} to {known.maximum:,} {known.unit}".rstrip()
    notes = [limits] * bool(limits) + [f"default: {default}"] * bool(default)
    return known.help[0].lower() + known.help[1:].rstrip(".") + (f" ({'; '.join(notes)})" if notes else "")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", nargs="*", help="what the pictures show, in any language of the model; several prompts are drawn in turn")
    add("-m", "--model", default="AltDiffusion-mini", help="name of a model, or path of its weights (default: %(default)s)")
    _add_model_dir(parser)
    add("-n", "--n-samples", type=int, default=4, metavar="N", help=_help("images_per_prompt", "4"))
    add("--n-iter", type=int, default=1, metavar="N", help=_help("iterations", "1"))
    add("--n-rows", type=int, default=0, metavar="N", help="pictures per row of the grid (default: --n-samples)")
    add("--negative-prompt", default="", metavar="TEXT", help=_help("negative_prompt"))
    add("-s", "--steps", "--ddim-steps", type=int, metavar="N", help=_help("steps", "the model's"))
    add(
        "--scale",
        "--guidance-scale",
        "--cfg-scale",
        type=float,
        metavar="X",
        help=_help("guidance_scale", "the model's"),
    )
    add("-H", "--H", "--height", dest="height", type=int, metavar="PX", help=_help("height", "the model's"))
    add("-W", "--W", "--width", dest="width", type=int, metavar="PX", help=_help("width", "the model's"))
    add("--seed", type=int, default=34234, metavar="N", help=_help("seed", "34234"))
    add("--seed-mode", choices=SEED_MODES, default="batch", help=_help("seed_mode", "batch"))
    add("--sampler", choices=SAMPLER_NAMES, help=_help("sampler", "ddim"))
    add("--plms", action="store_true", help="same as --sampler plms")
    add("--eta", "--ddim-eta", type=float, default=0.0, metavar="X", help=_help("eta", "0"))
    add("--fixed-code", action="store_true", help=_help("fixed_code"))
    add("--from-file", "--prompt-file", metavar="FILE", help="read the prompts from a UTF-8 file, one per line")
    add(
        "-o",
        "--outdir",
        "--outpath",
        "--out-path",
        "--output",
        default="AltDiffusionOutputs",
        metavar="DIR",
        help="folder of the pictures: samples/00000.png …, grid-0000.png … (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on with the latest run of this very request in --outdir")
    add("--skip-grid", action="store_true", help="make no grid")
    add("--skip-save", action="store_true", help="save no single pictures")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    checker = parser.add_mutually_exclusive_group()
    checker.add_argument("--no-safety-checker", action="store_true", help="do not check the pictures")
    checker.add_argument("--require-safety-checker", action="store_true", help="fail where the model has no checker")
    parser.set_defaults(run=_generate, kept="; finished pictures are kept, --resume draws the rest")


def _generate(args: argparse.Namespace) -> int:
    if bool(args.prompt) == bool(args.from_file):
        return _fail(f"{'two sources of' if args.prompt else 'no'} prompts: type them, or name a file with --from-file", 2)
    import torch

    from flagai_altdiff.loading import load_model
    from flagai_altdiff.predictor import Predictor

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    safety = False if args.no_safety_checker else True if args.require_safety_checker else "auto"
    model = load_model(args.model, args.model_dir, safety_checker=safety)
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError("--device", device, f"cannot be used here ({error}); --device cpu always works") from error
    model.autocast_dtype = torch.float16 if args.fp16 else None
    try:
        result = _draw(Predictor(model), args)
    except InvalidRequestError as error:
        raise InvalidRequestError(_FLAGS.get(error.field, error.field), error.value, error.expected) from None
    for path in (*result.paths, *([result.grid_path] if result.grid_path else [])):
        print(path)
    print(f"{len(result.pictures)} pictures in {result.seconds:.1f} s, seed {result.request.seed}", file=sys.stderr)
    return 0


def _draw(predictor: Predictor, args: argparse.Namespace) -> GenerationResult:
    return predictor.predict_generate_images(
        args.prompt or None,
        args.outdir,
        n_samples=args.n_samples,
        n_rows=args.n_rows,
        skip_grid=args.skip_grid,
        skip_save=args.skip_save,
        ddim_steps=args.steps,
        n_iter=args.n_iter,
        plms=args.plms,
        fixed_code=args.fixed_code,
        ddim_eta=args.eta,
        H=args.height,
        W=args.width,
        scale=args.scale,
        from_file=args.from_file,
        seed=args.seed,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        seed_mode=args.seed_mode,
        resume=args.resume,
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything that is known, as JSON")
    _add_model_dir(parser)
    parser.set_defaults(run=_models)


def _add_model_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model-dir", type=Path, default=DEFAULT_MODEL_DIR, metavar="DIR", help="folder of the models (default: %(default)s)"
    )


def _models(args: argparse.Namespace) -> int:
    if args.json:
        places = [(spec, locate(name, args.model_dir)[1]) for name, spec in MODELS.items()]
        known = [{**asdict(spec), "folder": str(folder), "missing": hub.missing_files(spec, folder)} for spec, folder in places]
        print(json.dumps(known, ensure_ascii=False, indent=2))
        return 0
    for spec in MODELS.values():
        origin = (
            "comes with the package" if spec.embedded else "from " + ", ".join(f"{k} ({v})" for k, v in spec.sources.items())
        )
        print(f"{spec.name}\n  task       {spec.task}\n  languages  {' '.join(spec.languages)} ({len(spec.languages)})")
        print(f"  size       {hub.human(spec.size_bytes)}, {origin}\n  licence    {spec.licence}")
        print(f"  files      {', '.join(f.name for f in spec.files)}")
        print(f"  draws      {spec.width}x{spec.height} px in {spec.steps} steps, scale {spec.guidance_scale:g}\n")
    return 0


def _add_download(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", help="name of a model")
    _add_model_dir(parser)
    add(
        "--source",
        metavar="WHERE",
        help="baai, huggingface, or the address of a mirror, a web folder with the files (default: what answers first)",
    )
    add("--revision", metavar="NAME", help="commit, branch or tag of the Hugging Face repository")
    add("--dry-run", action="store_true", help="only say what would be fetched, and from where")
    add("--no-safety-checker", action="store_true", help="leave the released models' picture checker out")
    parser.set_defaults(run=_download, kept="; what has arrived is kept, the same command goes on")


def _download(args: argparse.Namespace) -> int:
    spec = get_model_spec(args.model)
    folder = locate(spec.name, args.model_dir)[1]
    if not sys.stderr.isatty():  # where no bar is drawn, the log tells how far it is
        logging.getLogger("flagai_altdiff").setLevel(logging.INFO)
    names = _fetch(spec, folder, args)
    brings_checker = any(name.startswith("safety_checker/") for name in names) or (folder / "safety_checker").is_dir()
    if spec.needs_safety_checker and not args.no_safety_checker and not brings_checker:
        try:
            _fetch(SAFETY_CHECKER, folder.parent / SAFETY_CHECKER.name, args)
        except HubError as error:
            if error.errno is not None:
                raise
            print(f"the safety checker could not be fetched; pictures would not be checked: {error}", file=sys.stderr)
    return 0


def _fetch(spec: ModelSpec, folder: Path, args: argparse.Namespace) -> list[str]:
    """Fetch a model, or say what that would do; the names of the planned files."""
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


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name of a model, or path of its folder")
    _add_model_dir(parser)
    parser.add_argument("--record", action="store_true", help="record files of which no SHA-256 is known, as they are now")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> int:
    spec, folder = locate(args.model, args.model_dir)
    if folder.is_file():
        raise InvalidRequestError("model", args.model, "expected the name of a model or the path of its folder")
    if args.record:
        for name in hub.record_missing(folder):
            print(f"recorded      {name}")
    states = set()
    for finding in hub.verify(folder, spec):
        print(f"{finding.state:12}  {finding.name}: {finding.detail}", flush=True)
        states.add(finding.state)
    for state in sorted(states & _VERIFY_ADVICE.keys()):
        print(f"{state}: {_VERIFY_ADVICE[state]}", file=sys.stderr)
    return 0 if states == {"ok"} else 1


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="folder or file with weights, in any layout")
    parser.add_argument("target", type=Path, help="folder to make; for --to single a .safetensors file")
    parser.add_argument("--to", required=True, choices=("flagai", "diffusers", "single"), help="layout of the target")
    parser.add_argument("--half", action="store_true", help="store float16 weights: half the size")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from flagai_altdiff.convert import convert

    convert(args.source, args.target, args.to, half=args.half)
    print(args.target)
    return 0


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    _add_model_dir(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from flagai_altdiff.doctor import examine

    troubles = 0
    for finding in examine(args.model_dir):
        print(f"{'!' if finding.advice else ' '} {finding.topic:20} {finding.state}")
        if finding.advice:
            print(f"  {'':20} -> {finding.advice}")
            troubles += 1
    return 1 if troubles else 0


def _add_train_mini(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--out", type=Path, default=Path("runs/AltDiffusion-mini/model"), metavar="DIR", help="the model (default: %(default)s)"
    )
    add(
        "--work",
        type=Path,
        default=Path("runs/AltDiffusion-mini"),
        metavar="DIR",
        help="state of the run (default: %(default)s)",
    )
    add("--stage", nargs="*", default=(), metavar="NAME", help="do these stages only")
    add("--minutes", type=float, default=150.0, metavar="N", help="length of this sitting (default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --work")
    parser.set_defaults(run=_train_mini, kept="; --resume goes on from the last saved step")


def _train_mini(args: argparse.Namespace) -> int:
    from flagai_altdiff.training.run import train_mini

    logging.getLogger("flagai_altdiff").setLevel(logging.INFO)
    try:
        train_mini(out=args.out, work=args.work, parts=args.stage, minutes=args.minutes, resume=args.resume)
    except TrainingInterrupted:
        print("the time of this sitting is used up; go on with --resume", file=sys.stderr)
        return 0
    print(args.out)
    return 0
