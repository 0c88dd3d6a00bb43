"""``altdiff convert``, ``doctor`` and ``train-mini``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from flagai_altdiff.cli.common import add_model_dir, say


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``convert``."""
    parser.add_argument("source", type=Path, help="folder or file with weights, in any layout, or the name of a model")
    parser.add_argument("target", type=Path, help="folder to make; for --to single a .safetensors file")
    parser.add_argument("--to", required=True, choices=("flagai", "diffusers", "single"), help="layout of the target")
    parser.add_argument("--half", action="store_true", help="store float16 weights: half the size")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> int:
    from flagai_altdiff.convert import convert

    convert(args.source, args.target, args.to, half=args.half)
    print(args.target)
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``doctor``."""
    add_model_dir(parser)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from flagai_altdiff.doctor import examine

    troubles = 0
    for finding in examine(args.model_dir):
        say(f"{'!' if finding.advice else ' '} {finding.topic:20} {finding.state}")
        if finding.advice:
            say(f"  {'':20} -> {finding.advice}")
            troubles += 1
    return 1 if troubles else 0


def add_train_mini(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``train-mini``."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("runs/mini/models"),
        metavar="DIR",
        help="both models (default: %(default)s)",
    )
    add(
        "--work",
        type=Path,
        default=Path("runs/mini"),
        metavar="DIR",
        help="state of the run (default: %(default)s)",
    )
    add("--data", type=Path, metavar="DIR", help="folder of altdiff data things (default: made in --work)")
    add("--stage", nargs="*", default=(), metavar="NAME", help="do these stages only; a name that is none lists them")
    add("--resume", action="store_true", help="go on with the run in --work")
    parser.set_defaults(run=_train_mini, kept="; --resume goes on from the last saved step")


def _train_mini(args: argparse.Namespace) -> int:
    from flagai_altdiff.mini.recipe.run import train_mini

    logging.getLogger("flagai_altdiff").setLevel(logging.INFO)
    train_mini(out=args.out, work=args.work, data=args.data, names=args.stage, resume=args.resume)
    print(args.out)
    return 0
