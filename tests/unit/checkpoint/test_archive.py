"""Zip archives that two readers could read in two ways, or that are not what torch writes, are refused."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flagai_altdiff.checkpoint.archive import members
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError
from tests.cost import in_proportion

END, END64 = 22, 22 + 20 + 56


def checkpoint(path: Path) -> bytearray:
    torch.save({"state_dict": {"a": torch.arange(6.0)}}, path)
    return bytearray(path.read_bytes())


def rewritten(path: Path, change: Callable[[str, bytes], list[tuple[str, bytes]]], **options: int) -> None:
    """The archive with each member replaced by those that ``change`` gives."""
    checkpoint(path)
    with zipfile.ZipFile(path) as old:
        members = [pair for name in old.namelist() for pair in change(name, old.read(name))]
    with zipfile.ZipFile(path, "w", **options) as new:  # type: ignore[call-overload]
        for name, data in members:
            new.writestr(name, data)


def local_header(data: bytearray, member: str) -> int:
    """Where the member's own header begins."""
    return data.index(member.encode()) - 30


def patched(path: Path, member: str, at: int, value: bytes, *, central: bool = False) -> None:
    data = checkpoint(path)
    place = (data.rindex(member.encode()) - 46 if central else local_header(data, member)) + at
    data[place : place + len(value)] = value
    path.write_bytes(data)


def plain(path: Path) -> None:
    checkpoint(path)


def repacked(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data)])


@pytest.mark.fault(30)
@pytest.mark.parametrize("make", [plain, repacked])
def test_what_torch_writes_is_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "m.ckpt")
    assert torch.equal(read_tensors(tmp_path / "m.ckpt")["a"], torch.arange(6.0))


def escape(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data), (f"m/../../{name}", data)])


def absolute(path: Path) -> None:
    rewritten(path, lambda name, data: [(f"/{name}", data)])


def backslash(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data), ("m/..\\..\\x", data)])


def two_folders(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data), (name.replace("m/", "n/", 1), data)])


def twice(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data)] * (1 + name.endswith("data.pkl")))


def twice_but_for_case(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data), *([("m/DATA.PKL", data)] if name.endswith("data.pkl") else [])])


def compressed(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data)], compression=zipfile.ZIP_DEFLATED)


def bomb(path: Path) -> None:
    rewritten(
        path,
        lambda name, data: [(name, bytes(50 << 20) if name.endswith("data/0") else data)],
        compression=zipfile.ZIP_DEFLATED,
    )


def encrypted_locally(path: Path) -> None:
    patched(path, "m/data.pkl", 6, struct.pack("<H", 0x809))


def encrypted_centrally(path: Path) -> None:
    patched(path, "m/data.pkl", 8, struct.pack("<H", 0x809), central=True)


def another_name_locally(path: Path) -> None:
    patched(path, "m/data.pkl", 30, b"m/evil.pkl")


def another_method_locally(path: Path) -> None:
    patched(path, "m/data.pkl", 8, struct.pack("<H", 8))


def another_size_locally(path: Path) -> None:
    patched(path, "m/data.pkl", 6, struct.pack("<5HII", 0x800, 0, 0, 0, 0, 0, 9)[:8] + struct.pack("<III", 0, 9, 9))


def overlapping(path: Path) -> None:
    """The directory places a block of numbers upon the pickle."""
    data = checkpoint(path)
    patched(path, "m/data/0", 42, struct.pack("<I", local_header(data, "m/data.pkl")), central=True)


def one_inside_the_other(path: Path) -> None:
    """The numbers of one block are the whole entry of another, and the directory says so."""
    rewritten(path, lambda name, data: [(name, data), *([("m/data/1", data)] if name.endswith("data/0") else [])])
    plain_archive = path.read_bytes()
    inner = plain_archive[(at := plain_archive.index(b"m/data/1") - 30) : at + 30 + len("m/data/1") + 24]
    rewritten(
        path, lambda name, data: [(name, inner), ("m/data/1", data)] if name.endswith("data/0") else [(name, data)]
    )
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"m/data/1") - 46
    data[directory + 42 : directory + 46] = struct.pack("<I", data.index(inner))
    path.write_bytes(data)


def beyond_the_end(path: Path) -> None:
    patched(path, "m/data/0", 42, struct.pack("<I", 1 << 30), central=True)


def longer_than_the_file(path: Path) -> None:
    patched(path, "m/data/0", 20, struct.pack("<II", 1 << 30, 1 << 30), central=True)


def with_comment(path: Path) -> None:
    data = checkpoint(path)
    data[-2:] = struct.pack("<H", 4)
    path.write_bytes(data + b"PK\5\6")


def something_behind(path: Path) -> None:
    path.write_bytes(checkpoint(path) + bytes(100))


def two_ends(path: Path) -> None:
    data = checkpoint(path)
    path.write_bytes(data + data[-END:])


def moved_directory(path: Path) -> None:
    data = checkpoint(path)
    end64 = len(data) - END64
    data[end64 + 48 : end64 + 56] = struct.pack("<Q", 64)
    path.write_bytes(data)


def huge_directory(path: Path) -> None:
    data = checkpoint(path)
    end64 = len(data) - END64
    data[end64 + 40 : end64 + 48] = struct.pack("<Q", 1 << 40)
    path.write_bytes(data)


def without_pickle(path: Path) -> None:
    rewritten(path, lambda name, data: [] if name.endswith("data.pkl") else [(name, data)])


def torchscript(path: Path) -> None:
    rewritten(
        path, lambda name, data: [(name, data), *([("m/constants.pkl", data)] if name.endswith("data.pkl") else [])]
    )


def big_endian(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, b"big" if name.endswith("byteorder") else data)])


def endless_byteorder(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, bytes(200 << 20) if name.endswith("byteorder") else data)])


def short_block(path: Path) -> None:
    rewritten(path, lambda name, data: [(name, data[:20] if name.endswith("data/0") else data)])


def missing_block(path: Path) -> None:
    rewritten(path, lambda name, data: [] if name.endswith("data/0") else [(name, data)])


TRICKS: dict[Callable[[Path], None], str] = {
    escape: "does not lie in the archive's one folder",
    absolute: "one folder",
    backslash: "one folder",
    two_folders: "one folder",
    twice: "two entries named 'data.pkl'",
    twice_but_for_case: "two entries named 'DATA.PKL'",
    compressed: "is compressed",
    bomb: "is compressed",
    encrypted_locally: "is encrypted",
    encrypted_centrally: "is encrypted",
    another_name_locally: "another name or method",
    another_method_locally: "another name or method",
    another_size_locally: "another size",
    overlapping: "another name or method",
    one_inside_the_other: "'data/1' overlaps another part",
    beyond_the_end: "cannot be read|not where the directory says",
    longer_than_the_file: "overlaps another part",
    with_comment: "not the end of a zip file",
    something_behind: "not the end of a zip file",
    two_ends: "does not end at|not where it should be",
    moved_directory: "does not end at",
    huge_directory: "does not end at",
    without_pickle: r"data\.pkl is missing",
    torchscript: "TorchScript",
    big_endian: "big-endian",
    endless_byteorder: "big-endian",
    short_block: "has 20 bytes instead of 24",
    missing_block: "is missing",
}


@pytest.mark.fault(30)
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", TRICKS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_zip_tricks_are_refused(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    made = tmp_path / "m"
    make(made)
    path = made.rename(tmp_path / name)
    with in_proportion(0), pytest.raises(CheckpointError, match=TRICKS[make]) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))
    assert sorted(tmp_path.iterdir()) == [path]


def central(name: bytes = b"m/a", *, extra: bytes = b"", comment: bytes = b"", size: int = 0, start: int = 0) -> bytes:
    """An entry of a zip directory."""
    lengths = (len(name), len(extra), len(comment))
    fields = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, size, size, *lengths, 0, 0, 0, start)
    return fields + name + extra + comment


def directory(path: Path, entries: list[bytes], count: int | None = None) -> Path:
    """An archive that is almost nothing but a directory."""
    body, data = b"PK\3\4" + bytes(26), b"".join(entries)
    count = len(entries) if count is None else count
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(data), len(body))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(data), 1)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
    path.write_bytes(body + data + end64 + locator + end)
    return path


def long_numbers(*numbers: int) -> bytes:
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


COSTLY: dict[str, Callable[[], list[bytes]]] = {
    "many entries": lambda: [central(b"m/%x" % i) for i in range(100_000)],
    "more entries than may be": lambda: [central(b"")] * 300_000,
    "fields without end": lambda: [central(extra=bytes(65_532), size=0xFFFFFFFF)] * 30,
    "long comments": lambda: [central(comment=b"x" * 65_535)] * 30,
    "long names": lambda: [central(name=b"m/" * 32_767)] * 30,
    "an offset over 2^63": lambda: [central(extra=long_numbers(2**63 + 5), start=0xFFFFFFFF)],
    "a size over 2^63": lambda: [central(extra=long_numbers(2**63 + 5, 2**64 - 1), size=0xFFFFFFFF)],
    "a size that is missing": lambda: [central(size=0xFFFFFFFF)],
    "a field that is cut": lambda: [central(extra=long_numbers(5)[:9], start=0xFFFFFFFF)],
    "a name that is no text": lambda: [central(b"m/\xff").replace(b"\x14\0\0\0\0", b"\x14\0\0\x08\0", 1)],
}


@pytest.mark.fault(139)
@pytest.mark.parametrize("name", COSTLY)
@pytest.mark.parametrize("count", [None, 1, 2**64 - 1])
def test_a_zip_directory_costs_no_more_than_its_size(name: str, count: int | None, tmp_path: Path) -> None:
    path = directory(tmp_path / "m.ckpt", COSTLY[name](), count)
    with in_proportion(path.stat().st_size), pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "made to look" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.fault(139)
@pytest.mark.parametrize("pack", [lzma.compress, gzip.compress, bz2.compress], ids=["xz", "gz", "bz2"])
def test_a_compressed_bomb_is_not_unpacked(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(pack(bytes(200 << 20)))
    with in_proportion(0), pytest.raises(CheckpointError, match="neither safetensors nor a torch checkpoint"):
        read_tensors(tmp_path / "m.ckpt")


@pytest.mark.fault(30)
@pytest.mark.parametrize("zip64", [True, False])
def test_the_directory_is_read_as_pythons_zipfile_reads_it(zip64: bool, tmp_path: Path) -> None:
    path = tmp_path / "m"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("data.pkl", "data/0", "data/Ünï", "version"):
            info = zipfile.ZipInfo(f"m/{name}")
            info.comment, info.extra = b"a comment", b"\x55\x54\5\0\3abcd"
            with file.open(info, "w", force_zip64=zip64) as opened:
                opened.write(name.encode() * 7)
    with path.open("rb") as opened, zipfile.ZipFile(path) as other:
        found = members(opened, "m")
        assert list(found) == [info.filename.removeprefix("m/") for info in other.infolist()]
        for name, member in found.items():
            opened.seek(member.start)
            assert opened.read(member.size_bytes) == other.read(f"m/{name}")


@pytest.mark.fault(144)
def test_names_of_entries_are_shown_escaped_and_short(tmp_path: Path) -> None:
    for name in ("m/\x1b[31m", "m/" + "\x1b" * 60_000, "\x1b/a", "m/\u202e/.."):
        with zipfile.ZipFile(tmp_path / "m", "w", compression=zipfile.ZIP_DEFLATED) as file:
            file.writestr(name, b"x" * 100)
        with pytest.raises(CheckpointError) as caught:
            read_tensors(tmp_path / "m")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
