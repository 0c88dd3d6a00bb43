"""``altdiff generate --from-file FILE --devices N``: very many pictures, by several processes and machines."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.batch.lines import PromptLines
from flagai_altdiff.batch.work import Work
from flagai_altdiff.cli.common import Terminated, by_flags, fail, say_what_is_unknown, termination
from flagai_altdiff.cli.model_flags import check_added, check_loras_of, load_with_parts, usual_device
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, RegistryError
from flagai_altdiff.registry import DRAWING, locate
from flagai_altdiff.request import FLAGAI_DEFAULTS, Output

if TYPE_CHECKING:
    from flagai_altdiff.batch.drawing import Tally
    from flagai_altdiff.batch.places import Places
    from flagai_altdiff.models import LatentDiffusion

_PNG, _WEBDATASET = "png", "webdataset"
_OWN = ("devices", "nodes", "format", "shard_size", "at_once", "threads")
"""What makes a call one of these."""
_NOT_HERE = {"best": "--best", "of": "--of", "skip_save": "--skip-save", "columns": "--n-rows"}
_PROMPTS_LOOKED_AT = 200
"""For what is unknown: each takes a millisecond."""
_USUAL = {name: value for name, value in FLAGAI_DEFAULTS.items() if name != "seed_mode"}


def add_many(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    many = parser.add_argument_group(
        "very many pictures",
        "Each of these makes --from-file a run: its pictures are numbered as the file says, picture k has seed + k, "
        "and the same command goes on with what is missing (docs/scale.md).",
    )
    add = many.add_argument
    add(
        "--devices",
        type=int,
        metavar="N",
        help="processes on this machine: one for each GPU, or each core (default: 1)",
    )
    add("--nodes", type=int, metavar="M", help="machines; NODE_RANK, torchrun or srun tell which this is (default: 1)")
    add("--format", choices=(_PNG, _WEBDATASET), help=f"numbered PNG files, or shards of webdataset (default: {_PNG})")
    add("--shard-size", type=int, metavar="N", help="pictures of a shard (default: 1000)")
    add(
        "--batch-size",
        type=int,
        dest="at_once",
        metavar="N",
        help="pictures drawn at once, whichever lines they are of (default: as --n-samples)",
    )
    add("--threads", type=int, metavar="N", help="of each process on a CPU; pictures hang on it (default: 1)")


def is_many(args: argparse.Namespace) -> bool:
    """Whether a call is one of these: by its flags, or by the processes that torchrun or srun started for it."""
    asked = any(getattr(args, name) is not None for name in _OWN)
    if asked and not args.from_file:
        raise InvalidRequestError("devices", args.devices, "it is for prompts of a file; add --from-file")
    if asked or not args.from_file or not {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & os.environ.keys():
        return asked
    from flagai_altdiff.training.processes import started

    return (started() or 1) > 1


def draw_many(args: argparse.Namespace, typed: Mapping[str, Any], output: Output) -> int:
    """Draw the pictures of a file.

    Args:
        args: What was typed.
        typed: Of it, the options of a request.
        output: Of it, where to.
    """
    from flagai_altdiff.training.processes import check_started, started

    args.kept = "; finished pictures are kept, the same command draws the rest"
    _check(args)
    _complete(args)
    check_started(args.devices, args.nodes)
    if started() is None:
        _check_node(args.nodes)
    options = _of_every_line(args, typed)
    work = _work(args, options)
    spec, place = locate(args.model, args.model_dir, task=DRAWING)
    check_added(args)
    check_loras_of(args, place)
    began = time.perf_counter()
    if started() is not None or "LOCAL_RANK" in os.environ:  # one of many, which somebody else started
        _draw(args, options, output, work)
        return 0
    say_what_is_unknown(args, spec, islice(work.prompts(), _PROMPTS_LOOKED_AT))
    args.devices = min(args.devices, work.pictures)
    if args.devices > 1:
        if wrong := _launch(args, options, output):
            return wrong
    else:
        _draw(args, options, output, work)
    print(output.folder)
    if args.nodes == 1:
        what = f"{work.pictures:,} picture{'s are' if work.pictures != 1 else ' is'}"
        print(f"{what} there, after {time.perf_counter() - began:.1f} s", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, flag in _NOT_HERE.items():
        if value := vars(args).get(name):
            raise InvalidRequestError(flag, value, "it is not for runs of many pictures; leave it out")
    for name in _OWN:
        value = getattr(args, name)
        if isinstance(value, int) and value < 1:
            raise InvalidRequestError(name, value, "expected a whole number, at least 1")
    if args.shard_size and args.format != _WEBDATASET:
        raise InvalidRequestError("shard_size", args.shard_size, f"it is for --format {_WEBDATASET}")


def _check_node(nodes: int) -> None:
    """Whether it is told which machine this is, where nobody else knows."""
    told = os.environ.get("NODE_RANK")
    if told is None and nodes > 1:
        expected = f"which of them is this? Begin the command with NODE_RANK=0, or up to {nodes - 1} on the others"
        raise InvalidRequestError("nodes", nodes, expected)
    if told is not None and not (told.isdecimal() and int(told) < nodes):
        expected = f"the number of this machine, from 0 to {nodes - 1}" if nodes > 1 else "0, as --nodes is 1"
        raise InvalidRequestError("NODE_RANK", told, f"expected {expected}")


def _complete(args: argparse.Namespace) -> None:
    """Fill in what was not typed: under torchrun and srun, as many processes as they started."""
    of_torchrun = {"devices": "LOCAL_WORLD_SIZE", "nodes": "GROUP_WORLD_SIZE"}
    of_slurm = {"devices": "SLURM_NTASKS_PER_NODE", "nodes": "SLURM_NNODES"}
    names = of_torchrun if "TORCHELASTIC_RUN_ID" in os.environ else of_slurm
    for name, variable in names.items():
        told = os.environ.get(variable, "")
        if getattr(args, name) is None:
            setattr(args, name, int(told) if told.isdecimal() else 1)
    args.format, args.threads = args.format or _PNG, args.threads or 1


def _of_every_line(args: argparse.Namespace, typed: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a request for every line that does not say otherwise."""
    from flagai_altdiff.prompt_files import has_requests

    options = {**_USUAL, **typed}
    at_once = args.at_once or options["images_per_prompt"]
    if not has_requests(args.from_file):
        options["images_per_prompt"] = 1
    return {**options, "batch_size": at_once} if args.at_once or not has_requests(args.from_file) else options


def _work(args: argparse.Namespace, options: Mapping[str, Any]) -> Work:
    return Work(PromptLines(args.from_file, comments=args.comments), options)


def _launch(args: argparse.Namespace, options: Mapping[str, Any], output: Output) -> int:
    """Have processes of this machine draw; the status of the command."""
    from flagai_altdiff.batch.launching import launch

    print(f"{args.devices} processes share the work", file=sys.stderr)
    cores = os.cpu_count() or args.devices
    if usual_device(args) == "cpu" and args.devices * args.threads > cores:
        logging.getLogger(__name__).warning(
            "%d processes of %d threads on %d cores: more than the cores take memory, and no less time",
            args.devices,
            args.threads,
            cores,
        )
    wrong = launch(_member, args.devices, args, options, output, os.getpid())
    for (_, text), numbers in wrong.items():
        of = "" if len(numbers) == args.devices else f"process {', '.join(map(str, sorted(numbers)))}: "
        fail(of + text, 1)
    return max((status for status, _ in wrong), default=0)


def _member(args: argparse.Namespace, options: Mapping[str, Any], output: Output, parent: int) -> tuple[int, str]:
    """What one of the processes does; status and message of what is wrong."""
    from flagai_altdiff.batch.launching import has_parent

    level, number = logging.INFO if args.verbose else logging.WARNING, os.environ["LOCAL_RANK"]
    form = f"%(levelname)s: process {number}: %(message)s"
    logging.basicConfig(level=level, format=form, stream=sys.stderr, force=True)
    try:
        with termination():
            _draw(args, options, output, _work(args, options), lambda: has_parent(parent))
    except InvalidRequestError as error:
        return 2, str(by_flags(error))
    except FlagAIAltDiffError as error:
        return 2 if isinstance(error, RegistryError) else 1, str(error)
    except KeyboardInterrupt as interrupt:
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
    return 0, ""


def _draw(
    args: argparse.Namespace,
    options: Mapping[str, Any],
    output: Output,
    work: Work,
    is_wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Draw this process's share."""
    import torch

    from flagai_altdiff.batch.agreement import at_work
    from flagai_altdiff.batch.drawing import NotWanted, Run, draw_share

    device = usual_device(args)
    if device == "cuda":
        device = f"cuda:{_local_number() % torch.cuda.device_count()}"
    if device == "cpu":
        torch.set_num_threads(args.threads)  # the last bits of an image hang on their number
    model, facts = _settled(args, options, output, work, device)
    places = _places(args, output.folder, work, facts["run"])
    run = Run(model=model, work=work, places=places, id=facts["run"])
    with at_work(output.folder):
        try:
            tally = draw_share(run, args.devices, args.nodes, is_wanted=is_wanted, report=_report)
        except NotWanted:
            sys.exit(1)
    print(tally, file=sys.stderr)


def _settled(
    args: argparse.Namespace, options: Mapping[str, Any], output: Output, work: Work, device: str
) -> tuple[LatentDiffusion, dict[str, Any]]:
    """The model, which can draw all that is asked for, and the facts that all processes of the run agree on.

    Where ``--memory`` is left open, it is as the run began, whatever is free for this process.
    """
    from flagai_altdiff.batch.agreement import agree
    from flagai_altdiff.batch.drawing import check

    free = "memory" if args.memory == "auto" else ""
    while True:
        model = load_with_parts(args, device)
        check(model, work)
        facts = _facts(args, options, work, model)
        there = agree(output.folder, facts, free)
        if not free or there == model.memory:
            return model, facts
        args.memory, free = there, ""
        logging.getLogger(__name__).warning("the run began with memory=%r, and goes on with it", there)
        del model


def _local_number() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))


def _report(tally: Tally) -> None:
    logging.getLogger(__name__).info("%s", tally)


def _places(args: argparse.Namespace, folder: Path, work: Work, run: str) -> Places:
    from flagai_altdiff.batch.places import PER_SHARD, Folders, Shards

    if args.format == _WEBDATASET:
        return Shards(folder, work, args.shard_size or PER_SHARD)
    return Folders(folder, work, run)


def _facts(args: argparse.Namespace, options: Mapping[str, Any], work: Work, model: LatentDiffusion) -> dict[str, Any]:
    """What the pictures hang on, and where they lie: ``run.json``."""
    from flagai_altdiff import __version__
    from flagai_altdiff.batch.places import PER_SHARD
    from flagai_altdiff.checkpoint.weights import fingerprint
    from flagai_altdiff.evaluation.store import digest

    drawn = {
        "version": __version__,
        "model": model.spec.name or Path(args.model).absolute().name,
        "weights": fingerprint(model),
        "added": [str(part) for part in (*model.loras, *model.parts)],
        "precision": str(model.autocast_dtype or "float32"),
        "memory": model.memory,
        "device": model.device.type,
        "threads": args.threads if model.device.type == "cpu" else None,
        "safety checker": model.safety_checker is not None,
        "prompts": work.sha256,
        "comments": args.comments,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in options.items()},
        "pictures": work.pictures,
    }
    shards = {"shard size": args.shard_size or PER_SHARD} if args.format == _WEBDATASET else {}
    return {"run": f"run-{digest(drawn)}", **drawn, "format": args.format, **shards}
