"""What lies where in a tar archive: its headers are read, its files are passed over, nothing is unpacked.

Python's own reader takes an archive that is cut off in a header for a whole one, and keeps an object of a kilobyte for
each file; shards have tens of thousands.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_SIZE, _SUM, _PREFIX = slice(124, 136), slice(148, 156), slice(345, 500)
_FILES, _WITHOUT_DATA = b"07\0", b"123456"
_MAX_HEADER_BYTES = 1 << 20
_MAX_GAP_BLOCKS = 2048
"""Archives end in zeros; those that were joined have some in between."""
_ZEROS = bytes(BLOCK)
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"(\xb5": "unzstd"}


class BrokenTarError(Exception):
    """An archive that is none, or not whole; what came before can be used."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive.

    Args:
        name: With escapes for what is not UTF-8.
        offset: Where its content begins.
        size: Of its content.
    """

    name: str
    offset: int
    size: int


def members(file: BinaryIO, size: int) -> Iterator[Member]:
    """The files of an archive in their order, those of them that are wholly there.

    Args:
        file: The archive.
        size: Its size.

    Raises:
        BrokenTarError: It is no archive, or ends too early, or is damaged from some place on.
    """
    at, gap, last, longer = 0, 0, "its beginning", dict[str, str]()
    while at < size:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise BrokenTarError(f"it is truncated after {last}")
        at += BLOCK
        if header == _ZEROS:
            gap += 1
            if gap > _MAX_GAP_BLOCKS:
                return
            continue
        gap = 0
        kind, length = header[156:157], _length(header, longer)
        if not _is_header(header) or length is None:
            what = _COMPRESSED.get(header[:2])
            hint = f"it is compressed: {what} it first" if what else f"there is no tar header after {last}"
            raise BrokenTarError(hint)
        stored = 0 if kind in _WITHOUT_DATA else -(-length // BLOCK) * BLOCK
        if at + (0 if kind in _WITHOUT_DATA else length) > size:
            raise BrokenTarError(f"it is truncated after {last}")
        if kind in (b"x", b"L"):
            if length > _MAX_HEADER_BYTES:
                raise BrokenTarError(f"the name after {last} is too long")
            longer |= _records(file.read(length)) if kind == b"x" else {"path": _text(file.read(length))}
        elif kind not in b"gK":
            name = longer.get("path") or _name(header)
            is_folder = kind == b"\0" and name.endswith("/")
            if kind in _FILES and not is_folder and not any(key.startswith("GNU.sparse") for key in longer):
                yield Member(name, at, length)
            last, longer = name, {}
        at += stored
    if size and (longer or not gap):  # a whole archive ends in zeros
        raise BrokenTarError(f"it is truncated after {last}")


def _is_header(header: bytes) -> bool:
    try:
        stored = int(header[_SUM].strip(b" \0"), 8)
    except ValueError:
        return False
    return stored == sum(header) - sum(header[_SUM]) + 8 * ord(" ")


def _length(header: bytes, longer: dict[str, str]) -> int | None:
    """Size of what follows a header; ``None`` if it cannot be understood."""
    digits = longer.get("size", "")
    if re.fullmatch("[0-9]{1,18}", digits):
        return int(digits)
    field = header[_SIZE]
    if field[0] == 0x80:  # larger than octal digits can say
        return int.from_bytes(field[1:], "big") if not any(field[1:4]) else None
    try:
        return int(field.strip(b" \0") or b"0", 8) if re.fullmatch(rb"[ 0-7\0]*", field) else None
    except ValueError:
        return None


def _name(header: bytes) -> str:
    prefix = header[_PREFIX] if header[257:263] == b"ustar\0" else b""
    return "/".join(filter(None, (_text(prefix), _text(header[:100]))))


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _records(data: bytes) -> dict[str, str]:
    """An extended header: "length key=value" lines."""
    found, at = dict[str, str](), 0
    while match := re.compile(rb"([0-9]{1,7}) ([^=\n]+)=").match(data, at):
        end = at + int(match[1])
        if end <= match.end() or end > len(data):
            break
        found[_text(match[2])] = data[match.end() : end - 1].decode("utf-8", "backslashreplace").replace("\0", "")
        at = end
    return found
