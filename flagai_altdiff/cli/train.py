"""``altdiff train``."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.cli.common import DEFAULT_MODEL, command_that_goes_on, fail
from flagai_altdiff.errors import DataError, DiskError
from flagai_altdiff.registry import find_model

if TYPE_CHECKING:
    from flagai_altdiff.training.config import TrainConfig

_SHORT = ("dreambooth", "lora")
"""Stages that need no config."""
_SMALL: dict[str, dict[str, Any]] = {
    "dreambooth": {"steps": 400, "batch_size": 8, "learning_rate": 5e-4},
    "lora": {"steps": 600, "batch_size": 8, "learning_rate": 2.5e-3, "rank": 16},
}
"""Defaults for the embedded model, which is a hundred times smaller than those that the stages' own are for."""


def add_train(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``train``."""
    add = parser.add_argument
    add("what", nargs="?", metavar="CONFIG", help=f"a config, or {' or '.join(_SHORT)} with the flags below")
    add("--example", action="store_true", help="print a commented config")
    add("--plan", action="store_true", help="only say what it needs: parameters, memory, work of a step")
    add(
        "--tflops", type=float, metavar="X", help="with --plan, to tell times: what a device really reaches, in 10^12/s"
    )
    add("--resume", action="store_true", help="go on with the run in the output folder")
    few = parser.add_argument_group(f"{' and '.join(_SHORT)}: one thing from a few images")
    few.add_argument("-m", "--model", metavar="NAME", help=f"what learns it (default: {DEFAULT_MODEL})")
    few.add_argument("--images", type=Path, metavar="DIR", help="a few images of it")
    few.add_argument("--prompt", metavar="TEXT", help="what they show; for those that have no .txt beside")
    few.add_argument("--prior", type=Path, metavar="DIR", help="images of what the model keeps; drawn if it is missing")
    few.add_argument(
        "--class-prompt", action="append", metavar="TEXT", help="what these show: the thing's class; repeatable"
    )
    few.add_argument("--prior-count", type=int, metavar="N", help="how many are drawn")
    few.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    few.add_argument("--learning-rate", type=float, metavar="X", help="AdamW's")
    few.add_argument("--batch-size", type=int, metavar="N", help="images of a step")
    few.add_argument("--ema-decay", type=float, metavar="X", help="average the weights, for example 0.99")
    few.add_argument(
        "--side", type=int, metavar="PX", help="height and width at which it learns (default: the model's)"
    )
    few.add_argument("--rank", type=int, metavar="N", help="of the LoRA")
    few.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of the run (default: runs/<stage>)")
    few.add_argument("--sheet", action="append", metavar="TEXT", help="a prompt to draw on the way; may be repeated")
    parser.set_defaults(run=_train, short={action.dest: action.option_strings[-1] for action in few._group_actions})


def _train(args: argparse.Namespace) -> int:
    from flagai_altdiff.training.config import example, read_config

    if args.example:
        print(example())
        return 0
    if args.what is None:
        return fail("name a config (altdiff train --example prints one), or dreambooth or lora", 2)
    if args.what in _SHORT:
        if not args.images:
            return fail(f"{args.what} needs --images DIR, and --prompt TEXT for those that have no .txt beside", 2)
        if args.rank is not None and args.what != "lora":
            return fail(f"--rank is a LoRA's; {args.what} changes the weights themselves: altdiff train lora", 2)
        if args.prior_count is not None and not args.prior:
            return fail("--prior-count needs --prior DIR and --class-prompt TEXT", 2)
        if bool(args.prior) != bool(args.class_prompt):
            return fail("--prior DIR and --class-prompt TEXT go together", 2)
        config = _short_config(args)
    elif given := [flag for name, flag in args.short.items() if getattr(args, name) is not None]:
        return fail(f"{args.what} says what {' and '.join(given)} would say; change it there", 2)
    else:
        config = read_config(Path(args.what))
    if args.plan:
        from flagai_altdiff.training.planning import plan

        print(plan(config, tflops=args.tflops), end="")
        return 0
    return _run(config, args)


def _run(config: TrainConfig, args: argparse.Namespace) -> int:
    import flagai_altdiff.mini.examples  # noqa: F401  # so that drawn: is known
    from flagai_altdiff.training.processes import is_first
    from flagai_altdiff.training.session import LORA, SHEET, train

    logging.getLogger("flagai_altdiff").setLevel(logging.INFO)  # a run may take long before its bar shows
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        model = train(config, resume=args.resume)
    except (DataError, DiskError) as error:
        further = f" Go on with: {command_that_goes_on()}" if config.output.is_dir() else ""
        return fail(f"{error}{further}", 1)
    if is_first():
        _tell(config, model, model.with_name(LORA), model.with_name(SHEET))
    return 0


def _tell(config: TrainConfig, model: Path, lora: Path, sheet: Path) -> None:
    """Print what there is now, and how to draw with it."""
    spec = find_model(config.model)
    if lora.is_file():
        print(lora)
        words = ["-m", config.model, "--lora", str(lora)]
    else:
        print(model)
        words = ["-m", str(model)]
        if spec and spec.embedded:  # a folder says nothing of the defaults that go with a name
            words += ["--steps", str(spec.steps), "--scale", f"{spec.guidance_scale:g}"]
    if sheet.is_file():
        words = ["altdiff", "generate", *words, *(config.sheets.prompts[:1] or ["PROMPT"])]
        print(f"{sheet} shows what it draws. Go on with: {shlex.join(words)}", file=sys.stderr)


def _short_config(args: argparse.Namespace) -> TrainConfig:
    from flagai_altdiff.training.config import parse_config

    model = args.model or DEFAULT_MODEL
    spec = find_model(model)
    stage = {"stage": args.what, "decay": "cosine", **(_SMALL[args.what] if spec and spec.embedded else {})}
    for name in (
        "steps",
        "learning_rate",
        "batch_size",
        "side",
        "ema_decay",
        "rank",
    ):
        if getattr(args, name) is not None:
            stage[name] = getattr(args, name)
    data: dict[str, Any] = {"source": str(args.images), "caption": args.prompt}
    if args.prior:
        data |= {"prior": str(args.prior), "prior_caption": args.class_prompt}
        data |= {"prior_count": args.prior_count} if args.prior_count is not None else {}
    return parse_config(
        {
            "model": model,
            "output": str(args.output or Path("runs") / args.what),
            "stages": [stage],
            "data": data,
            "sheets": {"prompts": args.sheet or ([args.prompt] if args.prompt else []), "every": 100},
            "save_every": 100,
        },
        "these flags",
    )
