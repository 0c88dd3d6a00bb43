"""Pickles are described, never run: hostile tensors, steps that take for ever, and names in every disguise."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError


def archive(path: Path, program: bytes, blocks: dict[str, bytes] | None = None) -> Path:
    """A torch zip with this pickle and these blocks of numbers."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", program)
        file.writestr("m/version", "3")
        file.writestr("m/byteorder", "little")
        for key, data in (blocks or {}).items():
            file.writestr(f"m/data/{key}", data)
    return path


def dictionary(*values: bytes) -> bytes:
    """Program that makes {"a": first value, "b": second, ...}."""
    pairs = b"".join(text(chr(97 + i)) + value for i, value in enumerate(values))
    return b"\x80\x02}(" + pairs + b"u."


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(count: int = 6, kind: str = "FloatStorage", key: str = "0", tag: str = "storage") -> bytes:
    return b"(" + text(tag) + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    block: bytes,
    shape: tuple[int, ...] = (6,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    name: str = "_rebuild_tensor_v2",
) -> bytes:
    body = block + number(offset) + numbers(shape) + numbers(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return REBUILD + body + b"tR"


REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n("
SIX = torch.arange(6.0).numpy().tobytes()


@pytest.mark.parametrize(
    ("shape", "stride", "offset", "expected"),
    [
        ((6,), (1,), 0, [0, 1, 2, 3, 4, 5]),
        ((2, 3), (3, 1), 0, [[0, 1, 2], [3, 4, 5]]),
        ((3, 2), (1, 3), 0, [[0, 3], [1, 4], [2, 5]]),
        ((2,), (2,), 1, [1, 3]),
        ((), (), 4, 4),
        ((0, 7), (7, 1), 0, []),
    ],
)
def test_honest_tensors_are_read(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, expected: object, tmp_path: Path
) -> None:
    path = archive(tmp_path / "m.ckpt", dictionary(tensor(storage(), shape, stride, offset)), {"0": SIX})
    assert read_tensors(path)["a"].tolist() == expected


HOSTILE = {
    "negative offset": tensor(storage(), offset=-1),
    "offset beyond the end": tensor(storage(), offset=1),
    "huge offset": tensor(storage(), (1,), offset=1 << 62),
    "empty, huge offset": tensor(storage(), (0,), offset=1 << 62),
    "negative size": tensor(storage(), (-6,)),
    "huge size": tensor(storage(), (1 << 40,)),
    "sizes whose product wraps": tensor(storage(), (1 << 32, 1 << 32), (1, 1)),
    "negative stride": tensor(storage(), (6,), (-1,)),
    "stride beyond the end": tensor(storage(), (2,), (6,)),
    "one number eight times": tensor(storage(), (8,), (0,)),
    "one number a million times": tensor(storage(), (1000, 1000), (0, 0)),
    "more strides than sizes": tensor(storage(), (6,), (1, 1)),
    "forty dimensions": tensor(storage(), (1,) * 40, (1,) * 40),
    "shape of texts": b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage()
    + number(0)
    + b"(X\x01\x00\x00\x006t"
    + numbers((1,))
    + b"tR",
    "storage of text": tensor(text("0")),
    "storage of another tag": tensor(storage(tag="module")),
    "storage that claims less": tensor(storage(5), (5,)),
    "storage that claims more": tensor(storage(1 << 40)),
    "negative storage": tensor(storage(-6)),
    "storage of doubles": tensor(storage(kind="DoubleStorage")),
    "storage that is missing": tensor(storage(key="../../0")),
    "a number as shape": REBUILD + storage() + number(0) + number(6) + numbers((1,)) + b"tR",
    "no arguments": b"ctorch._utils\n_rebuild_tensor_v2\n)R",
}


@pytest.mark.fault(28)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.ckpt", dictionary(tensor(storage(key="good")), HOSTILE[name]), {"0": SIX, "good": SIX})
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "name",
    [
        "torch._utils._rebuild_qtensor",
        "torch._utils._rebuild_sparse_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_wrapper_subclass",
        "torch._tensor._rebuild_from_type_v2",
        "torch.storage._load_from_bytes",
    ],
)
def test_other_ways_to_build_a_tensor_are_refused_by_name(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    path = archive(tmp_path / "m.ckpt", dictionary(f"c{module}\n{function}\n".encode() + b"(tR"))
    with pytest.raises(UnsafeCheckpointError, match=name):
        read_tensors(path)


@pytest.mark.fault(28)
def test_every_name_that_is_asked_for_is_listed(tmp_path: Path) -> None:
    names = [b"cposix\nsystem\n", b"\x8c\x08builtins\x8c\x04eval\x93", b"cnt\nsystem\n", b"c__builtin__\nexec\n"]
    path = archive(tmp_path / "m.ckpt", b"\x80\x04}(" + b"".join(text(str(i)) + n for i, n in enumerate(names)) + b"u.")
    with pytest.raises(
        UnsafeCheckpointError, match=r"asks for builtins\.eval, builtins\.exec, nt\.system, posix\.system\."
    ):
        read_tensors(path)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "target", [b"ccollections\nOrderedDict\n", b"cargparse\nNamespace\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
)
def test_attributes_that_a_pickle_sets_go_nowhere(target: bytes, tmp_path: Path) -> None:
    """BUILD on a class, a function or an object would set attributes of it, or call its __setstate__."""
    state = b"N}(" + text("__setstate__") + b"cargparse\nNamespace\n" + text("_metadata") + b"}u\x86b"
    values = [target + state, target + b")R" + state if b"Ordered" in target else target + state]
    path = archive(tmp_path / "m.ckpt", dictionary(tensor(storage()), *values), {"0": SIX})
    assert list(read_tensors(path)) == ["a"]


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02" + b"]" * 1_100_000 + b".",
        b"\x80\x02)" + b"".join(b"q%c\x30h%ch%c\x86" % (i, i, i) for i in range(200)) + b"}" + b"h\xc7N" + b"s.",
        b"\x80\x02}" + b"(]r\xff\xff\xff\xff" * 10 + b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02" + b"I" + b"9" * 1_000_000 + b"\n.",
        b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    ],
    ids=["many steps", "nested tuples as a key", "memo", "frame", "bytes", "long", "digits", "marks"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_programs_that_ask_for_time_or_memory_end_at_once(program: bytes, zipped: bool, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.ckpt", program) if zipped else tmp_path / "m.ckpt"
    if not zipped:
        path.write_bytes(program)
    start = time.process_time()
    with pytest.raises(CheckpointError):
        read_tensors(path)
    assert time.process_time() - start < 20


@pytest.mark.fault(28)
@pytest.mark.parametrize("step", [b"P0\n", b"(cos\nsystem\no", b"(ios\nsystem\n", b"\x82\x01", b"\x97", b"\x98"])
def test_steps_that_torch_does_not_write_are_refused(step: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not write|asks for"):
        read_tensors(archive(tmp_path / "m.ckpt", b"\x80\x05" + step + b"."))


@pytest.mark.fault(31)
def test_a_pickle_of_the_old_format_is_mapped_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"a": torch.arange(6.0), "b": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert read_tensors(path)["b"].tolist() == [0, 1, 2]
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            read_tensors(path)
    length = data.rindex((6).to_bytes(8, "little"))
    path.write_bytes(data[:length] + (1 << 50).to_bytes(8, "little") + data[length + 8 :])
    with pytest.raises(CheckpointError, match=r"block .* has \d+ bytes instead of 24|ends before its weights"):
        read_tensors(path)


@pytest.mark.fault(31)
@pytest.mark.parametrize("data", [{"state_dict": {}}, [1, 2], "text"])
def test_a_pickle_of_something_else_is_named(data: object, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(pickle.dumps(data))
    with pytest.raises(CheckpointError, match="torch's mark is missing"):
        read_tensors(tmp_path / "m.ckpt")


@pytest.mark.fault(31)
def test_the_pickles_in_torchs_tar_format_are_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member, data = tarfile.TarInfo(name), b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="tar format"):
        read_tensors(path)


@pytest.mark.fault(32)
@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_passed_over_is_listed(zipped: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import numpy as np
    from pytorch_lightning.callbacks import ModelCheckpoint

    data = {"callbacks": {ModelCheckpoint: {}}, "best": np.float64(0.5), "state_dict": {"a": torch.ones(2)}}
    torch.save(data, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.INFO):
        assert list(read_tensors(tmp_path / "m.ckpt")) == ["a"]
    assert "ModelCheckpoint" in caplog.text and "scalar" in caplog.text


@pytest.mark.fault(32)
def test_a_whole_module_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "m.ckpt")
    with pytest.raises(UnsafeCheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_tensors(tmp_path / "m.ckpt")


@pytest.mark.fault(41)
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_a_file_that_is_replaced_meanwhile_stays_as_it_was(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    if kind == "safetensors":
        save_file({"a": torch.arange(5000.0)}, path)
    else:
        torch.save({"a": torch.arange(5000.0)}, path, _use_new_zipfile_serialization=kind == "zip")
    tensor = read_tensors(path)["a"]
    other = tmp_path / "other"
    other.write_bytes(b"x" * 10)
    other.rename(path)
    assert torch.equal(tensor, torch.arange(5000.0))


@pytest.mark.fault(41)
def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mmap

    from flagai_altdiff.checkpoint import mapped

    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(5000.0)}, path)
    monkeypatch.setattr(mapped, "_WORTH_MAPPING_BYTES", 0)
    real = mmap.mmap

    def shrink_then_map(*args: object, **kwargs: object) -> object:
        mapped = real(*args, **kwargs)  # type: ignore[arg-type]
        with path.open("r+b") as file:
            file.truncate(100)
        return mapped

    monkeypatch.setattr(mmap, "mmap", shrink_then_map)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        read_tensors(path)
