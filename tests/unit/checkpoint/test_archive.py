"""Zip archives that two readers could read in two ways, or that are not what torch writes, are refused."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError

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
    with pytest.raises(CheckpointError, match=TRICKS[make]) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))
    assert sorted(tmp_path.iterdir()) == [path]
