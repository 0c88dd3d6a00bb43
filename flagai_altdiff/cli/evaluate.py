"""``altdiff evaluate``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.cli.common import add_model_dir, add_option, fail
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, RegistryError
from flagai_altdiff.evaluation.settings import BOOTSTRAP, FETCH_INCEPTION, PROTOCOL
from flagai_altdiff.registry import DRAWING, MATCHING, locate
from flagai_altdiff.request import OPTIONS

if TYPE_CHECKING:
    from flagai_altdiff.evaluation.altclip import Retrieval, ZeroShot
    from flagai_altdiff.evaluation.measuring import Share
    from flagai_altdiff.evaluation.protocol import Evaluation
    from flagai_altdiff.evaluation.tables import Prompt

_SETTINGS = (
    "height",
    "width",
    "steps",
    "guidance_scale",
    "sampler",
    "eta",
    "seed",
    "negative_prompt",
    "images_per_prompt",
)
"""Options of a request that change the protocol."""
_JUDGE = "AltCLIP-XLMR-L-m9"
_PROCESS_BYTES = 6 << 30
"""What a process takes that draws with a released model."""


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``evaluate``."""
    add = parser.add_argument
    add("model", help="name of a model, or path of its weights")
    add_model_dir(parser)
    add("-o", "--outdir", type=Path, metavar="DIR", help="where to (default: AltDiffusionEvaluation/MODEL)")
    add("--languages", metavar="LIST", default="", help="which ones, as in en,zh (default: all that there are)")
    add("--bootstrap", type=int, default=BOOTSTRAP, metavar="N", help="resamplings (default: %(default)s)")
    add("--processes", type=int, metavar="N", help="share the work among N processes (default: GPUs, or cores)")
    add("--threads", type=int, default=1, metavar="N", help="of each process on a CPU; images hang on it (default: 1)")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    drawing = parser.add_argument_group("models that draw")
    add = drawing.add_argument
    add("--prompts", type=Path, metavar="FILE", help="table (language, prompt, …), or a folder of en.txt, zh.txt …")
    add("--limit", type=int, metavar="N", help="the first N prompts of each language")
    add("--pictures", type=Path, metavar="DIR", help="reference images for FID; where the images of tables lie")
    add("--features", metavar="FILE", help="weights of FID's Inception network, or a matching model's name or folder")
    add("--clip", metavar="NAME", help="matching model for the similarity of images and English captions")
    add("--batch-size", type=int, metavar="N", help=f"images drawn at once (default: {PROTOCOL['batch_size']})")
    add("--fp16", action="store_true", help="half precision on a GPU")
    for name in _SETTINGS:
        default = "the model's" if name in ("height", "width") else PROTOCOL.get(name, OPTIONS[name].default)
        add_option(drawing, OPTIONS[name], default)
    matching = parser.add_argument_group("models that match")
    add = matching.add_argument
    add("--retrieval", type=Path, metavar="FILE", help="table of captions: language, image, caption")
    add("--zero-shot", type=Path, metavar="DIR", help="folder with a folder of images for each class")
    add(
        "--classes",
        type=Path,
        metavar="FILE",
        help="table of their names: language, class, name; or en.txt …",
    )
    add("--templates", type=Path, metavar="FILE", help="table of sentences with {}: language, template; or en.txt …")
    parser.set_defaults(run=_evaluate, kept="; what was drawn and measured is kept: the same command goes on")


def _evaluate(args: argparse.Namespace) -> int:
    try:
        return _run(args)
    except InvalidRequestError as error:
        option = OPTIONS.get(error.field)
        flag = option.flags[0] if option and option.flags else f"--{error.field.replace('_', '-')}"
        raise InvalidRequestError(error.field if error.field.isupper() else flag, error.value, error.expected) from None


def _run(args: argparse.Namespace) -> int:
    from flagai_altdiff.evaluation.measuring import Share

    share = Share.of_environment()
    if problem := _contradiction(args, share):
        return fail(problem, 2)
    spec, path = locate(args.model, args.model_dir, task=MATCHING if args.retrieval or args.zero_shot else DRAWING)
    args.outdir = args.outdir or Path("AltDiffusionEvaluation", spec.name if spec else path.absolute().stem)
    if args.prompts and (problem := _check(args)):
        return fail(problem, 2)
    count = _processes(args, embedded=bool(spec and spec.embedded)) if share.processes == 1 else 1
    if count > 1:
        if status := _spawn(args, count):
            return status
    elif not _work(args, share):
        print(f"share {share.rank} of {share.processes} is done; who is last writes the report", file=sys.stderr)
        return 0
    _show(args.outdir, as_json=args.json)
    return 0


def _contradiction(args: argparse.Namespace, share: Share) -> str:
    """What is wrong with the flags, taken together."""
    kinds = [flag for flag in ("prompts", "retrieval", "zero_shot") if getattr(args, flag)]
    if len(kinds) != 1:
        return f"{'one of' if kinds else 'nothing to do: name one of'} --prompts, --retrieval and --zero-shot at a time"
    if args.zero_shot and not (args.classes and args.templates):
        return "--zero-shot needs --classes and --templates: the names of the classes, and sentences to put them in"
    if args.prompts and args.pictures and not args.features:
        fetch = f"get FID's Inception weights ({FETCH_INCEPTION}) and name the file, or name a matching model"
        return f"--pictures needs --features, the network that compares images: {fetch}"
    for flag, lowest in (("processes", 1), ("threads", 1), ("limit", 1), ("bootstrap", 0)):
        value = getattr(args, flag)
        if value is not None and value < lowest:
            return f"--{flag}={value}: expected a whole number, at least {lowest}"
    if share.processes > 1 and (args.processes or 1) > 1:
        return f"--processes={args.processes} beside WORLD_SIZE={share.processes}: the work is divided already"
    return ""


def _check(args: argparse.Namespace) -> str:
    """What is wrong with prompts and settings, said before a model is loaded, and once for all processes."""
    from flagai_altdiff.evaluation.protocol import request_of
    from flagai_altdiff.mini.scene_scorer import SceneScorer

    request_of(_options(args))
    prompts, _ = _prompts(args)
    if args.features or args.clip or SceneScorer(prompts).known:
        return ""
    return (
        "nothing would be measured. Add --clip with a matching model, for the similarity to English captions "
        f"(altdiff download {_JUDGE}; --clip {_JUDGE}), or --features with FID's Inception weights ({FETCH_INCEPTION})"
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were typed."""
    given = {name: value for name, value in vars(args).items() if name in _SETTINGS}
    return given if args.batch_size is None else {**given, "batch_size": args.batch_size}


def _processes(args: argparse.Namespace, *, embedded: bool) -> int:
    """How many processes to start: one for each GPU, or as many as cores, memory and work are for."""
    import torch

    from flagai_altdiff.machine import free_main_memory

    if args.processes is not None or args.retrieval or args.zero_shot:
        return args.processes or 1
    if args.device is None and torch.cuda.is_available():
        most = torch.cuda.device_count()
    elif (args.device or "cpu") == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        most = max(1, cores // args.threads)
        most = most if embedded else min(most, max(1, int(free_main_memory() // _PROCESS_BYTES)))
    else:
        most = 1
    images = sum(map(len, _prompts(args)[0].values())) * vars(args).get("images_per_prompt", 1)
    return min(most, -(-images // (args.batch_size or PROTOCOL["batch_size"])))


def _spawn(args: argparse.Namespace, count: int) -> int:
    """Have processes do the work; the worst of their statuses."""
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    print(f"{count} processes share the work", file=sys.stderr)
    try:
        spawn(_member, (args, count), nprocs=count, daemon=True)  # type: ignore[no-untyped-call]
    except ProcessExitedException as error:  # it has said why
        return int(error.exit_code) if error.exit_code > 0 else 1
    return 0


def _member(rank: int, args: argparse.Namespace, count: int) -> None:
    """One of the processes."""
    from flagai_altdiff.evaluation.measuring import Share

    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(
        level=level, format=f"%(levelname)s: process {rank}: %(message)s", stream=sys.stderr, force=True
    )
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        _work(args, Share(rank, count))
    except FlagAIAltDiffError as error:
        sys.exit(fail(error, 2 if isinstance(error, InvalidRequestError | RegistryError) else 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _work(args: argparse.Namespace, share: Share) -> bool:
    """Do one process's share, and write the report if all of them are done; whether that is so."""
    import torch

    from flagai_altdiff.evaluation.plot import write_report

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and (local := os.environ.get("LOCAL_RANK", "")).isdecimal():
        device = f"cuda:{int(local) % torch.cuda.device_count()}"
    if device == "cpu":
        torch.set_num_threads(args.threads)  # the last bits of an image hang on their number
    if share.rank == 0:
        print(f"loading {args.model}", file=sys.stderr)
    task = _drawing(args, device) if args.prompts else _matching(args, device)
    task.work(share)
    if complete := task.complete:
        write_report(task.report(), args.outdir)
    return complete


def _drawing(args: argparse.Namespace, device: str) -> Evaluation:
    import torch

    from flagai_altdiff.evaluation.protocol import Evaluation
    from flagai_altdiff.evaluation.references import find_images
    from flagai_altdiff.evaluation.scorers import ClipSimilarity, Scorer, load_features
    from flagai_altdiff.loading import load_model
    from flagai_altdiff.matching import load_matching_model
    from flagai_altdiff.mini.scene_scorer import SceneScorer

    prompts, notes = _prompts(args)
    named = any(prompt.image for own in prompts.values() for prompt in own)
    pictures = find_images(args.pictures) if args.pictures and not named else []
    features = load_features(args.features, args.model_dir, device=device) if args.features else None
    scorers: list[Scorer] = []
    if args.clip:
        scorers.append(ClipSimilarity(load_matching_model(args.clip, args.model_dir, device=device, mapped=True)))
    scenes = SceneScorer(prompts)
    scorers += [scenes] if scenes.known else []
    dtype = torch.float16 if args.fp16 else None
    model = load_model(
        args.model,
        args.model_dir,
        device=device,
        dtype=dtype,
        mapped=True,
        safety_checker=False,
        memory="normal",  # the numbers of a report must not hang on what is free
    )
    facts = {"model": model.spec.name or Path(args.model).absolute().name, "prompts": str(args.prompts)}
    facts |= {"pictures": str(args.pictures or ""), "device": torch.device(device).type, "threads": args.threads}
    return Evaluation(
        model=model,
        prompts=prompts,
        folder=args.outdir,
        pictures=pictures,
        features=features,
        scorers=scorers,
        bootstrap=args.bootstrap,
        options=_options(args),
        facts=facts,
        notes=notes,
    )


def _matching(args: argparse.Namespace, device: str) -> Retrieval | ZeroShot:
    from flagai_altdiff.evaluation import altclip
    from flagai_altdiff.matching import load_matching_model

    languages = _languages(args)
    common: dict[str, Any] = {"folder": args.outdir, "bootstrap": args.bootstrap}
    if args.retrieval:
        captions = altclip.read_captions(args.retrieval, languages, pictures=args.pictures)
        model = load_matching_model(args.model, args.model_dir, device=device, mapped=True)
        return altclip.Retrieval(model=model, captions=captions, facts={"retrieval": str(args.retrieval)}, **common)
    names, templates = altclip.read_classes(args.classes, args.templates, args.zero_shot, languages)
    facts = {name: str(getattr(args, name)) for name in ("zero_shot", "classes", "templates")}
    model = load_matching_model(args.model, args.model_dir, device=device, mapped=True)
    found = {"images": args.zero_shot, "names": names, "templates": templates}
    return altclip.ZeroShot(model=model, facts=facts, **found, **common)


def _prompts(args: argparse.Namespace) -> tuple[dict[str, tuple[Prompt, ...]], list[str]]:
    from flagai_altdiff.evaluation.tables import read_prompts

    return read_prompts(args.prompts, _languages(args), limit=args.limit, pictures=args.pictures)


def _languages(args: argparse.Namespace) -> list[str]:
    return [name for part in args.languages.split(",") if (name := part.strip().lower())]


def _show(folder: Path, *, as_json: bool) -> None:
    """Print the report that lies in a folder."""
    text = (folder / "evaluation.json").read_text(encoding="utf-8")
    table = [line for line in (folder / "evaluation.md").read_text(encoding="utf-8").split("\n") if line[:1] == "|"]
    print(text if as_json else "\n".join(table), end="" if as_json else "\n")
    for note in json.loads(text)["notes"]:
        print(f"note: {note}", file=sys.stderr)
    print(f"{folder}: evaluation.md, evaluation.json, evaluation.png", file=sys.stderr)
