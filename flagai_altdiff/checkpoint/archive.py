"""The zip archive around a torch checkpoint, read strictly: what all readers of zip files agree on, or nothing."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

from flagai_altdiff.errors import CheckpointError

_MAX_DIRECTORY_BYTES = 64 << 20
_LOCAL = struct.Struct("<4s5H3I2H")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8
_UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True)
class Member:
    """A stored file of the archive.

    Args:
        start: Its first byte in the archive file.
        size_bytes: Its length.
    """

    start: int
    size_bytes: int


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
    directory_start = _check_end(file, where)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except Exception as error:  # of many kinds for a broken directory
        raise _malformed(where, f"its zip directory cannot be read ({error})") from error
    found: dict[str, Member] = {}
    seen: set[str] = set()
    root, end = infos[0].filename.partition("/")[0] if infos else "", 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        folder, _, name = info.filename.partition("/")
        parts = name.split("/")
        if folder != root or root in ("", ".", "..") or ".." in parts or "\\" in name or "\0" in info.orig_filename:
            raise _refused(where, f"the entry {info.orig_filename[:80]!r} does not lie in the archive's one folder")
        if name.lower() in seen:  # some readers ignore case
            raise _refused(where, f"it has two entries named {name[:80]!r}")
        member = _member(file, info, where)
        if info.header_offset < end or member.start + member.size_bytes > directory_start:
            raise _refused(where, f"the entry {name[:80]!r} overlaps another part of the archive")
        end = member.start + member.size_bytes
        found[name] = member
        seen.add(name.lower())
    return found


def _check_end(file: BinaryIO, where: str) -> int:
    """Start of the directory; it must end where the record of the archive's end begins, and that one ends the file."""
    size = file.seek(0, os.SEEK_END)
    end = size - _END.size
    if end < 0:
        raise _malformed(where, "it is shorter than any zip file")
    file.seek(end)
    magic, *_, length, start, comment = _END.unpack(file.read(_END.size))
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
            magic, *_, length, start = _END64.unpack(file.read(_END64.size))
            if magic != b"PK\6\6":
                raise _malformed(where, "its zip64 record is not where it should be")
    if length > _MAX_DIRECTORY_BYTES or start + length != end:
        raise _malformed(where, f"its zip directory of {length} bytes at {start} does not end at {end}")
    file.seek(0)
    return int(start)


def _member(file: BinaryIO, info: zipfile.ZipInfo, where: str) -> Member:
    name = info.orig_filename
    file.seek(info.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise _malformed(where, f"the entry {name[:80]!r} is not where the directory says")
    _, _, flags, method, _, _, _, packed, unpacked, name_length, extra_length = _LOCAL.unpack(header)
    encoding = "utf-8" if info.flag_bits & 0x800 else "cp437"
    if file.read(name_length) != name.encode(encoding) or method != info.compress_type:
        raise _refused(
            where, f"the entry {name[:80]!r} has another name or method in its own header than in the directory"
        )
    if (flags | info.flag_bits) & _ENCRYPTED:
        raise _refused(where, f"the entry {name[:80]!r} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise _refused(
            where, f"the entry {name[:80]!r} is compressed, as torch never writes it; save it again with torch.save"
        )
    sizes_known = not flags & _SIZES_FOLLOW and _UNKNOWN not in (packed, unpacked)
    if sizes_known and not packed == unpacked == info.file_size:
        raise _refused(where, f"the entry {name[:80]!r} has another size in its own header than in the directory")
    return Member(info.header_offset + _LOCAL.size + name_length + extra_length, info.file_size)


def _malformed(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is a truncated or corrupt torch checkpoint: {problem}. Fetch the file again.")


def _refused(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is refused: {problem}.")
