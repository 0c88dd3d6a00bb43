"""What the commands share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from flagai_altdiff.errors import printable
from flagai_altdiff.registry import DEFAULT_MODEL_DIR


def say(line: str) -> None:
    """Print one line; what files and servers put into it is neither obeyed by the terminal nor drowns it."""
    print(printable(line).replace("\n", "\\n"), flush=True)


def fail(error: Exception | str, status: int) -> int:
    """Print an error; ``status``, for the command to end with."""
    colour = sys.stderr is not None and sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(("\033[31merror:\033[0m " if colour else "error: ") + str(error), file=sys.stderr)
    return status


def add_model_dir(parser: argparse.ArgumentParser) -> None:
    """The flag for the folder of the models."""
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=DEFAULT_MODEL_DIR,
        metavar="DIR",
        help="folder of the models (default: %(default)s)",
    )
