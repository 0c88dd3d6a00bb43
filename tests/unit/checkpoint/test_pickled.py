"""Pickles are described, never run: hostile tensors, steps that take for ever, and names in every disguise."""

from __future__ import annotations

import io
import logging
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError
from tests.cost import in_proportion


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
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03." + pickle.dumps({"little_endian": True}, 2)
"""What precedes the weights in torch's old format."""
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


NAME = b"ctorch._utils\n_rebuild_tensor_v2\nq\x02"
ORDERED = b"ccollections\nOrderedDict\n"


def many(value: bytes, times: int = 400_000) -> bytes:
    return b"\x80\x04" + value * times + b"."


def doubled(times: int) -> bytes:
    """A tuple of two times itself, and so on: a few steps, two to the power of ``times`` values to whoever looks."""
    return b")" + b"2\x86" * times


def kept(value: bytes, index: int) -> bytes:
    return value + b"q" + bytes([index]) + b"0"


COSTLY: dict[str, bytes] = {
    "a name of doubled tuples": b"\x80\x04" + doubled(100) + text("x") + b"\x93.",
    "a name of tuples 5,000 deep": b"\x80\x04)" + b"\x85" * 5000 + text("x") + b"\x93.",
    "a name of a megabyte": b"\x80\x04" + text("posix") + text("s" * 1_000_000) + b"\x93.",
    "a key of doubled tuples": b"\x80\x02}" + doubled(100) + b"Ns.",
    "a storage of doubled tuples": b"\x80\x02" + doubled(100) + b"Q.",
    "a storage whose name is a doubled tuple": b"\x80\x02("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + doubled(100)
    + text("cpu")
    + number(6)
    + b"tQ.",
    "a shape of doubled tuples": b"\x80\x02" + REBUILD + storage() + number(0) + doubled(100) + b"2tR.",
    "names without end": b"\x80\x02" + b"".join(b"comegaconf\nx%d\n0" % i for i in range(60_000)) + b".",
    "refused names without end": b"\x80\x02" + b"".join(b"cposix\nx%d\n0" % i for i in range(60_000)) + b".",
    "one shape for many tensors": b"\x80\x02"
    + kept(b"(" + b"K\1" * 100_000 + b"t", 0)
    + kept(storage(), 1)
    + kept(NAME, 2)
    + b"h\2(h\1K\0h\0h\0tR" * 30_000
    + b".",
    "one list for many dicts": b"\x80\x02"
    + kept(b"(" + b"".join(text(f"{i:06}") + b"N\x86" for i in range(20_000)) + b"l", 0)
    + kept(ORDERED, 1)
    + b"h\1h\0\x85R" * 3000
    + b".",
    "one long pair many times": b"\x80\x02"
    + kept(b"(" + b"N" * 100_000 + b"t", 0)
    + kept(b"(" + b"h\0" * 1000 + b"l", 1)
    + kept(ORDERED, 2)
    + b"h\2h\1\x85R" * 100
    + b".",
    "one long storage many times": b"\x80\x02"
    + kept(storage()[:-2] + b"N" * 100_000 + b"t", 0)
    + b"h\0Q" * 50_000
    + b".",
    "keys of one hash": b"\x80\x02}(" + b"".join(number((2**61 - 1) * i) + b"N" for i in range(1, 40_000)) + b"u.",
    "fractions of one hash": b"\x80\x02}(" + (b"G\x7f\xf8" + bytes(6) + b"N") * 100_000 + b"u.",
    "two long keys in turn": b"\x80\x02"
    + kept(text("a" * 400_000), 0)
    + kept(text("a" * 400_000), 1)
    + b"}"
    + b"h\0Nsh\1Ns" * 30_000
    + b".",
    "one big number": b"\x80\x02\x8b" + (4 << 20).to_bytes(4, "little") + b"\x7f" * (4 << 20) + b".",
    "6,000 digits": b"\x80\x02I" + b"9" * 6000 + b"\n.",
    "6,000 digits as a key": b"\x80\x02}L" + b"9" * 6000 + b"L\n" + tensor(storage()) + b"s.",
    "a line without end": b"\x80\x02V" + b"a" * 3_000_000,
    "a memo with a gap": b"\x80\x02}r\xff\xff\xff\xff.",
    "marks": many(b"("),
    "marks and groups": b"\x80\x02" + b"(" * 300_000 + b"t" * 300_000 + b".",
    "marks in marks": b"\x80\x02" + b"((N" * 200_000 + b"tt" * 200_000 + b".",
    "lists": many(b"]"),
    "dicts": many(b"}", 1_000_000),
    "lists in lists": b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",
    "tuples in tuples": many(b"\x85").replace(b"\x04", b"\x04)", 1),
    "kept values": many(b"]\x94"),
    "one kept value": many(b"\x94", 1_000_000).replace(b"\x04", b"\x04N", 1),
    "texts": many(b"\x8c\2ab"),
    "numbers": many(b"M\xff\xff"),
    "copies": many(b"2", 1_000_000).replace(b"\x04", b"\x04}", 1),
    "what is pushed and popped": many(b"N0", 1_000_000),
    "tensors on one block": b"\x80\x02"
    + kept(storage(), 0)
    + kept(NAME, 1)
    + kept(numbers((1,) * 16), 2)
    + b"}("
    + b"".join(b"U\4%04x" % i + b"h\1(h\0K\0h\2h\2tR" for i in range(40_000))
    + b"u.",
}


@pytest.mark.fault(138)
@pytest.mark.parametrize("name", COSTLY)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_costs_no_more_than_its_size(name: str, zipped: bool, tmp_path: Path) -> None:
    path, program = tmp_path / "m.ckpt", COSTLY[name]
    path.write_bytes(MAGIC + program) if not zipped else archive(path, program, {"0": SIX})
    with in_proportion(path.stat().st_size), pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    assert "made to look" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.fault(138)
def test_a_training_checkpoint_with_averages_and_optimizer_is_read(tmp_path: Path) -> None:
    """As many tensors as a whole training of the largest model leaves, each of one number."""
    state = {
        f"model.diffusion_model.input_blocks.{i}.0.in_layers.2.weight": torch.ones(1, 1, 1, 1) for i in range(1400)
    }
    averages = {f"model_ema.{key.replace('.', '')}": value.clone() for key, value in state.items()}
    moments = {i: {"step": i, "exp_avg": torch.ones(1, 1, 1, 1), "exp_avg_sq": torch.ones(1)} for i in range(1400)}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-4, "params": list(range(1400))}]}
    data = {"state_dict": {**state, **averages}, "optimizer_states": [optimizer], "rng": 1 << 600}
    torch.save(data, tmp_path / "m.ckpt")
    assert len(read_tensors(tmp_path / "m.ckpt")) == 2800


@pytest.mark.fault(141)
@pytest.mark.parametrize("values", [(tensor(storage()),) * 2, (b"N", tensor(storage())), (tensor(storage()), b"N")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_comes_twice_is_refused(zipped: bool, values: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    program = b"\x80\x02}(" + text("a") + values[0] + text("a") + values[1] + b"u."
    path.write_bytes(MAGIC + program) if not zipped else archive(path, program, {"0": SIX})
    with pytest.raises(CheckpointError, match="gives 'a' twice"):
        read_tensors(path)


@pytest.mark.fault(139)
@pytest.mark.parametrize("name", ["a" * 1001, "." * 100_000])
def test_a_tensor_with_a_long_name_is_refused(name: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "m.ckpt", b"\x80\x02}" + text(name) + tensor(storage()) + b"s.", {"0": SIX})
    with pytest.raises(CheckpointError, match=f"a name of {len(name)} letters"):
        read_tensors(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_keys_that_name_no_weights_are_passed_over(zipped: bool, tmp_path: Path) -> None:
    odd = {1: torch.ones(1), 1.5: 2, None: 3, (1, 2): 4, b"b": 5, "x" * 5000: 6, float("nan"): 7}
    torch.save({"a": torch.ones(2), **odd}, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    assert list(read_tensors(tmp_path / "m.ckpt")) == ["a"]


@pytest.mark.parametrize(("protocol", "zipped"), [(1, True), *((n, z) for n in (2, 3, 4, 5) for z in (True, False))])
def test_every_protocol_of_torch_is_read(protocol: int, zipped: bool, tmp_path: Path) -> None:
    data = {"state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)[1:]}, "e": 1 << 40, "f": 0.5}
    torch.save(data, tmp_path / "m", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    read = read_tensors(tmp_path / "m")
    assert torch.equal(read["a"], torch.arange(6.0).reshape(2, 3)) and torch.equal(read["b"], torch.ones(2))


ODD_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "complex numbers"),
    "uint16": (lambda: torch.ones(2, dtype=torch.uint16), "another type of numbers"),
    "float8": (lambda: torch.ones(2).to(torch.float8_e5m2), "another type of numbers"),
    "sparse": (lambda: torch.ones(2).to_sparse(), "a sparse tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "without numbers"),
}


@pytest.mark.fault(142)
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_a_tensor_of_another_kind_is_named(kind: str, tmp_path: Path) -> None:
    make, words = ODD_TENSORS[kind]
    torch.save({"a": torch.ones(1), "b": make()}, tmp_path / "m.ckpt")
    with pytest.raises(UnsafeCheckpointError, match=f"holds .*{words}.* which no model of this family has"):
        read_tensors(tmp_path / "m.ckpt")


@pytest.mark.fault(142)
def test_strides_that_are_never_taken_may_be_any(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.ckpt", dictionary(tensor(storage(), (1, 6), ((1 << 63) - 1, 1))), {"0": SIX})
    assert read_tensors(path)["a"].clone().numpy().tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.fault(144)
def test_names_from_a_pickle_are_shown_escaped_and_short(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inert = b"".join(b"comegaconf\n\x1b[31m%d\n0" % i for i in range(500))
    path = archive(tmp_path / "m.ckpt", b"\x80\x02" + inert + dictionary(tensor(storage()))[2:], {"0": SIX})
    caplog.set_level(logging.INFO, "flagai_altdiff")
    read_tensors(path)
    (line,) = [r.getMessage() for r in caplog.records if "beside the weights" in r.getMessage()]
    assert "\x1b" not in line and "\\x1b[31m" in line and "and 480 more" in line and len(line) < 2000
    refused = b"".join(b"cposix\n\x1b[31m%d\n0" % i for i in range(500))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.\\x1b\[31m0, .* and 495 more") as caught:
        read_tensors(archive(tmp_path / "n.ckpt", b"\x80\x02" + refused + b"N."))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


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
