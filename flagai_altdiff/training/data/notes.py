"""What is noted of a file that is costly to look through: beside it, or in a cache where its folder is not writable.

A note is believed only while its file has the size and the time of change that it had. It holds numbers and names, and
is read with every bound checked: it may come with data from anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flagai_altdiff.files import new_file, open_regular

logger = logging.getLogger(__name__)

_FORMAT = "altdiff-note-1"


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """Which content a note is about.

    Args:
        size_bytes: Of the file.
        changed_ns: Its time of change.
    """

    size_bytes: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Stamp:
        """From what the system says of a file."""
        return cls(size_bytes=found.st_size, changed_ns=found.st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class Note:
    """What was found.

    Args:
        about: Plain values.
        numbers: One column of whole numbers for each name.
        names: Texts without NUL.
    """

    about: Mapping[str, Any]
    numbers: Mapping[str, NDArray[np.int64]]
    names: Sequence[str] = ()


def default_cache() -> Path:
    """The folder for what is fetched and noted, unless another is named."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.expanduser(base)).absolute() / "flagai_altdiff" / "data"


def read_note(file: Path, kind: str, stamp: Stamp, cache: Path) -> Note | None:
    """The note of a kind about a file; ``None`` if there is none that can be believed."""
    for path in _places(file, kind, cache):
        try:
            with open_regular(path) as content:
                return _parsed(content.read(), stamp)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.debug("%s is not believed: %r", path, error)
    return None


def write_note(note: Note, file: Path, kind: str, stamp: Stamp, cache: Path) -> None:
    """Keep a note for :func:`read_note`, if any disk lets us."""
    columns = {name: np.ascontiguousarray(column, dtype="<i8") for name, column in note.numbers.items()}
    rest = b"".join([*(column.tobytes() for column in columns.values()), "\0".join(note.names).encode()])
    header = {
        "format": _FORMAT,
        "size": stamp.size_bytes,
        "changed": stamp.changed_ns,
        "about": note.about,
        "columns": {name: len(column) for name, column in columns.items()},
        "digest": _digest(rest),
    }
    data = json.dumps(header).encode() + b"\n" + rest
    for path in _places(file, kind, cache):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path, replace=True) as unfinished:
                unfinished.write_bytes(data)
        except OSError as error:
            logger.debug("%s: %s", path, error.strerror)
        else:
            return
    logger.warning("nothing can be noted of %s; it is looked through again at each start", file)


def _places(file: Path, kind: str, cache: Path) -> Iterator[Path]:
    name = f".{file.name[:200]}.{kind}"
    yield file.with_name(name)
    whole = os.path.abspath(file)
    yield cache / "notes" / hashlib.blake2b(os.fsencode(whole), digest_size=12).hexdigest() / name


def _parsed(data: bytes, stamp: Stamp) -> Note:
    line, _, rest = data.partition(b"\n")
    header = json.loads(line)
    if (header["format"], header["size"], header["changed"]) != (_FORMAT, stamp.size_bytes, stamp.changed_ns):
        raise ValueError("it is about another content")
    if header["digest"] != _digest(rest):
        raise ValueError("it is damaged")
    columns, at = {}, 0
    for name, length in header["columns"].items():
        if not isinstance(length, int) or not 0 <= length <= (len(rest) - at) // 8:
            raise ValueError("it is cut off")
        columns[name] = np.frombuffer(rest, dtype="<i8", count=length, offset=at).astype(np.int64)
        at += 8 * length
    names = rest[at:].decode()
    return Note(about=header["about"], numbers=columns, names=names.split("\0") if names else [])


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()
