"""The zip archive around a torch checkpoint, read strictly: what all readers of zip files agree on, or nothing."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO, NamedTuple

from flagai_altdiff.errors import CheckpointError, shown

_MAX_DIRECTORY_BYTES = 64 << 20
_MAX_ENTRIES = 100_000
"""One for each block of numbers: a training checkpoint of this family has some seven thousand."""
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_STORED = 0
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800
_UNKNOWN = 0xFFFFFFFF
_ZIP64 = 1


@dataclass(frozen=True, slots=True)
class Member:
    """A stored file of the archive.

    Args:
        start: Its first byte in the archive file.
        size_bytes: Its length.
    """

    start: int
    size_bytes: int


class _Entry(NamedTuple):
    """What the directory says of a file."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    packed: int
    unpacked: int
    header: int


def members(file: BinaryIO, where: str) -> dict[str, Member]:
    """What the archive holds.

    Args:
        file: Open for reading.
        where: The file, for errors.

    Returns:
        Name below the one folder that torch puts everything into -> member.

    Raises:
        CheckpointError: Cut short, compressed, encrypted, with names that lead elsewhere or headers that disagree.
    """
    directory_start, length, count = _check_end(file, where)
    file.seek(directory_start)
    entries = list(islice(_entries(file.read(length), where), count + 1))
    if len(entries) != count:
        more = "more" if len(entries) > count else "fewer"
        raise _malformed(where, f"its zip directory has {more} than {count} entries")
    found: dict[str, Member] = {}
    seen: set[str] = set()
    root, end = entries[0].name.partition("/")[0] if entries else "", 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        folder, _, name = entry.name.partition("/")
        parts = name.split("/")
        if folder != root or root in ("", ".", "..") or ".." in parts or "\\" in name or "\0" in entry.name:
            raise _refused(where, f"the entry {shown(entry.name)} does not lie in the archive's one folder")
        if name.lower() in seen:  # some readers ignore case
            raise _refused(where, f"it has two entries named {shown(name)}")
        if entry.header >= directory_start:
            raise _malformed(where, f"the entry {shown(name)} is not where the directory says")
        member = _member(file, entry, where)
        if entry.header < end or member.start + member.size_bytes > directory_start:
            raise _refused(where, f"the entry {shown(name)} overlaps another part of the archive")
        end = member.start + member.size_bytes
        found[name] = member
        seen.add(name.lower())
    return found


def _entries(directory: bytes, where: str) -> Iterator[_Entry]:
    at = 0
    while at < len(directory):
        name_at = at + _CENTRAL.size
        if name_at > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise _malformed(where, "its zip directory cannot be read")
        (_, _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length, comment_length, *_, header) = (
            _CENTRAL.unpack_from(directory, at)
        )
        extra_at = name_at + name_length
        at = extra_at + extra_length + comment_length
        if at > len(directory):
            raise _malformed(where, "its zip directory cannot be read")
        raw_name = directory[name_at:extra_at]
        try:
            name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
            unpacked, packed, header = _whole([unpacked, packed, header], directory[extra_at : extra_at + extra_length])
        except (ValueError, struct.error) as error:
            raise _malformed(where, f"the entry {shown(raw_name)} of its zip directory cannot be read") from error
        yield _Entry(name, raw_name, flags, method, packed, unpacked, header)


def _whole(numbers: list[int], extra: bytes) -> list[int]:
    """Numbers of an entry, where one does not fit into 32 bits from the entry's further fields."""
    large = [place for place, number in enumerate(numbers) if number == _UNKNOWN]
    at = 0
    while large and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == _ZIP64:
            values = struct.unpack_from(f"<{len(large)}Q", extra[: at + 4 + length], at + 4)
            return [values[large.index(place)] if place in large else number for place, number in enumerate(numbers)]
        at += 4 + length
    if large:
        raise ValueError("a number is missing")
    return numbers


def _check_end(file: BinaryIO, where: str) -> tuple[int, int, int]:
    """Start, length and number of entries of the directory.

    It must end where the record of the archive's end begins, and that one ends the file.
    """
    size = file.seek(0, os.SEEK_END)
    end = size - _END.size
    if end < 0:
        raise _malformed(where, "it is shorter than any zip file")
    file.seek(end)
    magic, *_, count, length, start, comment = _END.unpack(file.read(_END.size))
    if magic != b"PK\5\6" or comment:
        raise _malformed(where, "its end is not the end of a zip file")
    locator = end - _END64_LOCATOR.size
    if locator >= 0:
        file.seek(locator)
        magic, _, position, _ = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
        if magic == b"PK\6\7":
            end = locator - _END64.size
            if position != end:
                raise _malformed(where, "its zip64 record is not where it should be")
            file.seek(end)
            magic, *_, count, length, start = _END64.unpack(file.read(_END64.size))
            if magic != b"PK\6\6":
                raise _malformed(where, "its zip64 record is not where it should be")
    if length > _MAX_DIRECTORY_BYTES or start + length != end:
        raise _malformed(where, f"its zip directory of {length} bytes at {start} does not end at {end}")
    if count > _MAX_ENTRIES:
        raise _malformed(where, f"its zip directory claims {count} entries; at most {_MAX_ENTRIES} are read")
    return start, length, count


def _member(file: BinaryIO, entry: _Entry, where: str) -> Member:
    name = shown(entry.name)
    file.seek(entry.header)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise _malformed(where, f"the entry {name} is not where the directory says")
    _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack(header)
    if file.read(name_length) != entry.raw_name or method != entry.method:
        raise _refused(where, f"the entry {name} has another name or method in its own header than in the directory")
    if (flags | entry.flags) & _ENCRYPTED:
        raise _refused(where, f"the entry {name} is encrypted")
    if method != _STORED or entry.packed != entry.unpacked:
        raise _refused(
            where, f"the entry {name} is compressed, as torch never writes it; save it again with torch.save"
        )
    sizes_known = not flags & _SIZES_FOLLOW and _UNKNOWN not in (packed, unpacked)
    if sizes_known and not packed == unpacked == entry.unpacked:
        raise _refused(where, f"the entry {name} has another size in its own header than in the directory")
    return Member(entry.header + _LOCAL.size + name_length + extra_length, entry.unpacked)


def _malformed(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is a truncated or corrupt torch checkpoint: {problem}. Fetch the file again.")


def _refused(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is refused: {problem}.")
