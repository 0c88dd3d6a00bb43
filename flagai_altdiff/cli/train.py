"""``altdiff train``."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.cli.common import fail
from flagai_altdiff.errors import TrainingInterrupted

if TYPE_CHECKING:
    from flagai_altdiff.training.config import TrainConfig

_SHORT = ("dreambooth", "lora")
"""Stages that need no config."""


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
    few.add_argument("-m", "--model", default="AltDiffusion-mini", metavar="NAME", help="what learns it")
    few.add_argument("--images", type=Path, metavar="DIR", help="a few images of it")
    few.add_argument("--prompt", metavar="TEXT", help="what they show, with a rare word for the thing")
    few.add_argument("--prior", type=Path, metavar="DIR", help="images of its class, to keep them; drawn if missing")
    few.add_argument("--class-prompt", metavar="TEXT", help="what these show")
    few.add_argument("--steps", type=int, metavar="N", help="optimizer steps")
    few.add_argument("--learning-rate", type=float, metavar="X", help="AdamW's")
    few.add_argument("--batch-size", type=int, metavar="N", help="images of a step")
    few.add_argument("--rank", type=int, metavar="N", help="of the LoRA")
    few.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of the run (default: runs/<stage>)")
    few.add_argument("--sheet", action="append", metavar="TEXT", help="a prompt to draw on the way; may be repeated")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> int:
    from flagai_altdiff.training.config import example, read_config

    if args.example:
        print(example())
        return 0
    if args.what is None:
        return fail("name a config (altdiff train --example prints one), or dreambooth or lora", 2)
    if args.what in _SHORT:
        if not (args.images and args.prompt):
            return fail(f"{args.what} needs --images DIR and --prompt TEXT", 2)
        config = _short_config(args)
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
    from flagai_altdiff.training.session import train

    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        model = train(config, resume=args.resume)
        if is_first():
            print(model)
    except TrainingInterrupted as error:
        words = ["altdiff", *(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
        if is_first():
            print(f"{error} Go on with: {shlex.join(words)}", file=sys.stderr)
        return 130
    return 0


def _short_config(args: argparse.Namespace) -> TrainConfig:
    from flagai_altdiff.training.config import parse_config

    given: dict[str, Any] = {"steps": args.steps, "learning_rate": args.learning_rate, "batch_size": args.batch_size}
    if args.what == "lora":
        given["rank"] = args.rank
    stage = {"stage": args.what, **{name: value for name, value in given.items() if value is not None}}
    data: dict[str, Any] = {"source": str(args.images), "caption": args.prompt}
    if args.prior:
        data |= {"prior": str(args.prior), "prior_caption": args.class_prompt}
    return parse_config(
        {
            "model": args.model,
            "output": str(args.output or Path("runs") / args.what),
            "stages": [stage],
            "data": data,
            "sheets": {"prompts": args.sheet or [args.prompt], "every": 100},
            "save_every": 100,
        },
        "these flags",
    )
