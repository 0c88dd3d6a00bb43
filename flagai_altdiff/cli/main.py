"""The parser of ``altdiff``, and what all commands do with errors and interruptions."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flagai_altdiff import __version__
from flagai_altdiff.cli.again import add_redraw, add_show, add_tokens
from flagai_altdiff.cli.common import Terminated, command_that_goes_on, fail, termination
from flagai_altdiff.cli.data import add_data
from flagai_altdiff.cli.evaluate import add_evaluate
from flagai_altdiff.cli.generate import add_generate
from flagai_altdiff.cli.match import add_match
from flagai_altdiff.cli.models import add_download, add_models, add_verify
from flagai_altdiff.cli.serve import add_serve, add_ui
from flagai_altdiff.cli.tools import add_convert, add_doctor, add_train_mini
from flagai_altdiff.cli.train import add_train
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, RegistryError, TrainingInterrupted

_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE", "1"
"""Torch, which is loaded later, asks the system for memory in large pages: maps of tens of megabytes come sooner."""
_EPILOG = """\
examples:
  altdiff generate "a cat on a red background" "气球，蓝色背景"
  altdiff generate "一只猫" --model AltDiffusion-m18 --negative-prompt "blurry" --seed 7 --sampler dpmpp_2m --steps 25
  altdiff generate --from-file prompts.txt --n-samples 2 --outdir images
  altdiff generate --from-file prompts.txt --n-samples 2 --outdir images --resume     # after an interruption
  altdiff generate "a tiger" --init-image photo.jpg --strength 0.6
  altdiff ui
  altdiff serve --models AltDiffusion-m18,AltDiffusion-mini --port 8000
  altdiff redraw AltDiffusionOutputs/samples/00000.png --seed 8
  altdiff match "cat" "ein Hund" -- AltDiffusionOutputs/samples/*.png
  altdiff evaluate AltDiffusion-m9 --prompts prompts/ --clip AltCLIP-XLMR-L-m9
  altdiff download AltDiffusion-m18 --source huggingface --dry-run
  altdiff verify AltDiffusion-m18
  altdiff convert checkpoints/AltDiffusion-m18 m18-diffusers --to diffusers
  altdiff data report folder-of-images --sheet sheet.png
  altdiff doctor

exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 terminated
"""


_COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str, str]] = {
    "generate": (add_generate, "draw images", "Draw images from prompts."),
    "ui": (add_ui, "open a page to draw in", "Serve a page to draw in, and open it in the browser."),
    "serve": (
        add_serve,
        "serve a page and interfaces for programs",
        "Serve a page, OpenAI's and A1111's interfaces and one of jobs, on this machine unless told otherwise.",
    ),
    "redraw": (
        add_redraw,
        "draw images again",
        "Draw again what files say that they show: our own to the same pixels; others as far as they say enough.",
    ),
    "show": (add_show, "say how images were made", "Print what PNG files say of their making."),
    "tokens": (
        add_tokens,
        "say how a prompt is read",
        "Print the tokens of prompts with their weights, chunk by chunk, and what is lost.",
    ),
    "match": (
        add_match,
        "compare texts with images",
        "Say how well each text fits each image, with AltCLIP: cosine similarities from -1 to 1.",
    ),
    "evaluate": (
        add_evaluate,
        "measure a model in every language",
        "Draw prompts in every language and measure the images (FID, Inception score, similarity to captions); or "
        "measure what a matching model finds. Writes a table, JSON and a plot.",
    ),
    "models": (add_models, "list the models", "List the models that have a name."),
    "download": (add_download, "fetch a model's files", "Fetch what a model lacks; an interrupted download goes on."),
    "verify": (
        add_verify,
        "check a model's files",
        "Check size and SHA-256 of a model's files against what is known or was recorded when they came.",
    ),
    "convert": (
        add_convert,
        "change a model's layout on disk",
        "Write a model in another layout: all its weights, but not the defaults (steps, scale) that go with its name.",
    ),
    "data": (add_data, "look at training data", "Look at training data before hours are spent on them."),
    "doctor": (add_doctor, "look at this machine", "Say what this machine has and what is wrong."),
    "train": (
        add_train,
        "train or fine-tune a model",
        "Train a model in the papers' stages, as a config says; or teach it one thing from a few images.",
    ),
    "train-mini": (
        add_train_mini,
        "train the embedded model",
        "Train AltDiffusion-mini from nothing; started again with --resume, it goes on where it was.",
    ),
}
"""Command -> what adds its arguments, its line in the list of commands, its description."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; those of the process if left out.

    Returns:
        Exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 terminated.
    """
    os.environ.setdefault(*_HUGE_PAGES)
    parser = _parser()
    words = [_as_utf8(word) for word in sys.argv[1:]] if argv is None else argv
    args = parser.parse_args(_hyphened(words, _flags(parser)))
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a path may have characters that the terminal has not; it is shown all the same
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    level = logging.INFO if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    try:
        with termination():
            status: int = args.run(args)
        return status
    except (InvalidRequestError, RegistryError) as error:
        return fail(error, 2)
    except TrainingInterrupted as error:
        return _to_go_on(error)
    except FlagAIAltDiffError as error:
        return fail(error, 1)
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        print(f"\n{'terminated' if terminated else 'interrupted'}{args.kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _to_go_on(error: TrainingInterrupted) -> int:
    """Say which command goes on with a training."""
    from flagai_altdiff.training.processes import is_first

    if is_first():
        print(f"{error} Go on with: {command_that_goes_on()}", file=sys.stderr)
    return 128 + signal.SIGINT


class _Parser(argparse.ArgumentParser):
    """For a command that has a default for ``behind``, what stands behind ``--`` is that."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the original."""
        words = list(sys.argv[1:] if args is None else args)
        if self.get_default("behind") is None or "--" not in words:
            return super().parse_known_args(words, namespace)
        place = words.index("--")
        found, unknown = super().parse_known_args(words[:place], namespace)
        found.behind = words[place + 1 :]
        return found, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="altdiff",
        description="Draw images from prompts in 18 languages with AltDiffusion.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flagai_altdiff {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add_arguments, line, description) in _COMMANDS.items():
        command = commands.add_parser(name, help=line, description=description)
        command.set_defaults(kept="")
        command.add_argument("-v", "--verbose", action="store_true", help="say more")
        add_arguments(command)
    return parser


def _as_utf8(word: str) -> str:
    """A word of the command line as UTF-8, whatever encoding the locale made Python believe in."""
    try:
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return word


def _flags(parser: argparse.ArgumentParser) -> set[str]:
    """Every long flag of the commands."""
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    commands = [command for action in subparsers for command in action.choices.values()]
    return {flag for command in commands for flag in command._option_string_actions if flag.startswith("--")}


def _hyphened(words: Sequence[str], flags: set[str]) -> list[str]:
    """The words with flags that are spelled with underscores, as FlagAI's users know them, spelled with hyphens."""
    result = []
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        hyphened = name.replace("_", "-")
        is_flag = "--" not in words[:i] and any(flag.startswith(hyphened) for flag in flags)
        result.append(hyphened + equals + value if name.startswith("--") and is_flag else word)
    return result
