"""What the commands share."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.errors import InvalidRequestError, OutputError, printable
from flagai_altdiff.options import Option
from flagai_altdiff.registry import DEFAULT_MODEL_DIR
from flagai_altdiff.request import OPTIONS

if TYPE_CHECKING:
    from PIL.Image import Image

    from flagai_altdiff.registry import ModelSpec


def say(line: str) -> None:
    """Print one line; what files and servers put into it is neither obeyed by the terminal nor drowns it."""
    print(printable(line), flush=True)


def fail(error: Exception | str, status: int) -> int:
    """Print an error; ``status``, for the command to end with."""
    colour = sys.stderr is not None and sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(("\033[31merror:\033[0m " if colour else "error: ") + str(error), file=sys.stderr)
    return status


def say_what_is_unknown(args: argparse.Namespace, spec: ModelSpec | None, prompts: Iterable[str]) -> None:
    """Which prompts name nothing that the embedded model knows, to the error stream.

    Other models know any word, and this one what a LoRA or an embedding has taught it.

    Args:
        args: What was typed.
        spec: Of the model that draws.
        prompts: Looked at if it is the embedded one alone.
    """
    if spec is None or not spec.embedded or args.lora or args.embedding:
        return
    from flagai_altdiff.mini.things.knowing import hint, names_nothing

    unknown = [prompt for prompt in dict.fromkeys(prompts) if names_nothing(prompt)]
    for prompt in unknown[:_MOST_HINTS]:
        print(hint(prompt, DEFAULT_MODEL), "things.json beside its weights lists what it knows.", file=sys.stderr)
    if len(unknown) > _MOST_HINTS:
        print(f"The same is true of {len(unknown) - _MOST_HINTS} more.", file=sys.stderr)


def check_sheet(path: Path | None) -> None:
    """InvalidRequestError unless a contact sheet can be written there: said before hours of work, not after them."""
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise InvalidRequestError("--sheet", str(path), "expected a name that ends in .png")
    if path.is_dir() or not path.absolute().parent.is_dir():
        problem = "that is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InvalidRequestError("--sheet", str(path), f"{problem}; expected a file in a folder that is there")


def write_sheet(path: Path, sheet: Image) -> None:
    """Write a contact sheet, in place of an earlier one.

    Raises:
        OutputError: The disk refuses.
    """
    from flagai_altdiff.files import new_file

    try:
        with new_file(path, replace=True) as unfinished:
            sheet.save(unfinished, "PNG")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}.", error.errno) from error


class Terminated(KeyboardInterrupt):
    """SIGTERM came; it ends the work as Ctrl-C does."""


@contextmanager
def termination() -> Iterator[None]:
    """Let SIGTERM unwind the block, so that nothing stays half-written."""

    def stop(signum: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_OWN_FLAGS = {
    "from_file": "--from-file",
    "device": "--device",
    "best": "--best",
    "lora_strength": "--lora",
    "word": "--embedding",
    "at_once": "--batch-size",
    "batch_size": "--batch-size",
    **{name: f"--{name.replace('_', '-')}" for name in ("devices", "nodes", "format", "shard_size", "threads")},
}
"""What is no option of a request, by the flag that sets it."""


def by_flags(error: InvalidRequestError) -> InvalidRequestError:
    """An error of ``generate`` that names the flag that was typed."""
    option = OPTIONS.get(error.field)
    flag = option.flags[0] if option and option.flags else _OWN_FLAGS.get(error.field, error.field)
    head, needed, names = error.expected.partition("it has no effect without ")
    flags = " or ".join(OPTIONS[name].flags[0] for name in names.split(" or ")) if needed else ""
    return InvalidRequestError(flag, error.value, head + needed + flags)


DEFAULT_MODEL = "AltDiffusion-mini"
"""What draws unless another is named."""
_MOST_HINTS = 5


def add_model_dir(parser: argparse.ArgumentParser) -> None:
    """The flag for the folder of the models."""
    parser.add_argument(
        "--model-dir",
        type=Path,
        default=DEFAULT_MODEL_DIR,
        metavar="DIR",
        help="folder of the models (default: %(default)s)",
    )


def add_option(parser: argparse._ActionsContainer, option: Option, default: object) -> None:
    """The flag of an option; only what is typed reaches the parsed arguments.

    Args:
        parser: Gets the flag.
        option: The option.
        default: What its help says that it is unless typed.
    """
    flags = sorted(option.flags, key=len)
    common: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS, "help": _help(option, default)}
    if isinstance(option.default, bool):
        parser.add_argument(*flags, action="store_true", **common)
    elif option.choices and not option.metavar:
        parser.add_argument(*flags, choices=option.choices, **common)
    elif option.minimum is None:
        parser.add_argument(*flags, metavar=option.metavar or "TEXT", **common)
    else:
        metavar = option.unit.upper() or ("N" if option.whole else "X")
        parser.add_argument(*flags, type=int if option.whole else float, metavar=metavar, **common)


def _help(option: Option, default: object) -> str:
    notes = [option.limits] if option.limits else []
    if option.choices and option.metavar:
        notes.append(", ".join(option.choices))
    if default not in ("", None, False):
        notes.append(f"default: {default}")
    text = option.help[0].lower() + option.help[1:].rstrip(".") + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def command_that_goes_on() -> str:
    """The command that goes on with a training, in as many processes as now."""
    from flagai_altdiff.training.processes import started

    words = [*(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([*(["srun"] if started() else []), "altdiff", *words])
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return f"the same torchrun on each node, and at its end: {shlex.join(['-m', 'flagai_altdiff', *words])}"
    launch = ["torchrun", "--standalone", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    return shlex.join([*launch, "-m", "flagai_altdiff", *words])
