"""What all processes of a run agree on: ``run.json`` in its folder, and who is at work there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import InvalidRequestError, OutputError, shown
from flagai_altdiff.files import new_file
from flagai_altdiff.runs import MANY

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = "run"
"""The fact that names a run: it follows from all others."""
_DIGESTS = {
    "prompts": "it began with another file of prompts, or this one has been changed since",
    "weights": "it began with other weights, or with others quantized",
}
"""What is known by a digest, and what another one means."""
_UNFINISHED = re.compile(r"\.[^.]+\.(png|tar)\.[0-9a-f]{16}\.tmp")


def agree(folder: Path, facts: Mapping[str, Any], free: str = "") -> Any:
    """Make a folder that of a run; or go on, if it is that of this very run.

    Args:
        folder: The folder.
        facts: What the pictures hang on, as JSON has it; a ``NAME`` among them.
        free: A fact in which the run that is there decides.

    Returns:
        What holds of ``free``.

    Raises:
        InvalidRequestError: It is that of another run, or has pictures of other calls.
        OutputError: It cannot be written.
    """
    facts = json.loads(json.dumps(facts, default=str))
    path = folder / MANY
    if not path.exists():
        _check_free(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError), new_file(path) as unfinished:  # another process of the run was first
                unfinished.write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            text = f"{folder}: {error.strerror or error}. Choose another folder; nothing was drawn."
            raise OutputError(text, error.errno) from error
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read: {error}. Name another folder with --outdir.") from error
    if not isinstance(there, dict):
        raise InvalidRequestError("folder", str(folder), f"{MANY} is no record of a run; name another folder")
    own, theirs = _flat(facts), _flat(there)
    differing = [name for name in {**own, **theirs} if own.get(name) != theirs.get(name)]
    others = [name for name in differing if name not in (free, NAME)]
    if others or (differing and free not in differing):
        name = next(iter(others), NAME)
        what = _DIGESTS.get(name) or f"its {name} is {_told(theirs.get(name))}, not {_told(own.get(name))}"
        raise InvalidRequestError("folder", str(folder), f"it has another run ({what}); name another folder")
    return there.get(free)


def _told(value: object) -> str:
    return "left open" if value is None else shown(value, 200)


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, those within others among them."""
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _check_free(folder: Path) -> None:
    """InvalidRequestError where pictures of other calls lie."""
    if folder.exists() and not folder.is_dir():
        raise InvalidRequestError("folder", str(folder), "it is no folder")
    there = [*folder.glob("samples/*"), *folder.glob("*.tar")]
    if any(not path.name.startswith(".") for path in there) and not (folder / MANY).exists():
        raise InvalidRequestError("folder", str(folder), "it has pictures of other calls; name a folder of its own")


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Be one of the processes that work in a folder. Who finds or leaves it empty removes what killed ones left."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder / MANY, os.O_RDONLY)
    try:
        _tidy_up(handle, folder)
        with suppress(OSError):  # a disk of a server may know no locks
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield
        _tidy_up(handle, folder)
    finally:
        os.close(handle)


def _tidy_up(handle: int, folder: Path) -> None:
    """Remove unfinished files, if nobody else is at work."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for place, _, names in os.walk(folder):
            for name in filter(_UNFINISHED.fullmatch, names):
                os.unlink(os.path.join(place, name))
