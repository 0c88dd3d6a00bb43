"""Which shards are meant: a folder's, a pattern's, a list's; on this disk or on a server."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from flagai_altdiff.errors import DataError

WEB = ("http://", "https://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MOST = 1_000_000


def expand(sources: Iterable[str | Path]) -> list[str]:
    """Paths and addresses, in order, each once.

    Args:
        sources: Each a path or an address, with ``{00000..00012}``, ``{a,b}`` and, in paths, ``*``, ``?`` and ``[ab]``.

    Raises:
        DataError: A pattern that nothing fits, or one that means too many.
    """
    found = itertools.chain.from_iterable(_expanded(str(source)) for source in sources)
    return list(dict.fromkeys(found))


def is_remote(name: str) -> bool:
    """Whether it is an address of a server."""
    return name.lower().startswith(WEB)


def endings_apart(names: Sequence[str]) -> list[str]:
    """The shortest ends of paths and addresses, without their last ending, that tell them all apart."""
    paths = [urlsplit(name).path if is_remote(name) else name.replace(os.sep, "/") for name in names]
    parts = [os.path.splitext(path)[0].split("/") for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(some[-length:]) for some in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(number) for number in range(len(names))]


def _expanded(source: str) -> Iterator[str]:
    for name in [source] if os.path.exists(source) else braces(source):
        if is_remote(name) or os.path.exists(name):
            yield name
        elif glob.has_magic(name):
            yield from sorted(glob.glob(name, recursive=True)) or _nothing(name)
        else:
            yield name


def _nothing(name: str) -> Sequence[str]:
    raise DataError(
        f"{name}: no file fits this pattern. Check the path, and quote it so that the shell leaves it alone."
    )


def braces(text: str) -> list[str]:
    """``a{0..2}`` -> a0, a1, a2; zeros in front are kept; ``{x,y}`` and several braces as shells do them."""
    match = _BRACES.search(text)
    if match is None or not (choices := _choices(match[1])):
        return [text]
    rests = braces(text[match.end() :])
    if len(choices) * len(rests) > _MOST:
        raise DataError(f"{text} means more than {_MOST:,} files.")
    return [text[: match.start()] + choice + rest for choice in choices for rest in rests]


def _choices(inside: str) -> list[str]:
    if found := _RANGE.fullmatch(inside):
        first, last = map(int, found.groups())
        if abs(last - first) >= _MOST:
            raise DataError(f"{{{inside}}} means more than {_MOST:,} files.")
        width = max(map(len, found.groups())) if any(len(end) > 1 and end[0] == "0" for end in found.groups()) else 0
        return [
            str(i).zfill(width) for i in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)
        ]
    return inside.split(",") if "," in inside else []
