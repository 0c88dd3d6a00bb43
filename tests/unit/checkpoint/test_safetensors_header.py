"""A header that breaks a rule of the safetensors format is refused, and the message names the rule and the tensor."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flagai_altdiff.checkpoint import safetensors_header
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import load_path
from tests.cost import in_proportion


def file_of(
    path: Path, header: dict[str, Any] | str | bytes, data: bytes = bytes(8), length: int | None = None
) -> Path:
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


BROKEN: dict[str, tuple[Any, str]] = {
    "longer than the file": (({"a": entry()}, bytes(8), 1 << 20), "header claims 1048576 bytes, but the file has"),
    "longer than the limit": (({"a": entry()}, bytes(8), 1 << 60), "at most"),
    "cut in its header": (('{"a":', b""), "no JSON object"),
    "no JSON": (("{" * 40,), "no JSON object"),
    "deep JSON": (("{" + '"a":[' * 100_000,), "no JSON object"),
    "not UTF-8": ((b'{"\xff\xfe": 1}',), "no JSON object"),
    "a key twice": ((f'{{"a":{json.dumps(entry())},"a":{json.dumps(entry())}}}',), "'a' appears twice"),
    "a field twice": (
        ('{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',),
        "'dtype' appears twice",
    ),
    "unknown dtype": (({"a": entry("F31")},), "a has the unknown dtype 'F31'; known: BOOL"),
    "dtype of no text": (({"a": entry(["F32"])},), "unknown dtype"),
    "shape and bytes differ": (({"a": entry(shape=[3])},), r"a of shape \[3\] and dtype F32 cannot have 8 bytes"),
    "product beyond 64 bits": (({"a": entry(shape=[2**62, 2**62])},), "cannot have 8 bytes"),
    "negative size": (({"a": entry(shape=[-2])},), "not counts"),
    "shape of texts": (({"a": entry(shape=["2"])},), "not counts"),
    "shape true": (({"a": entry(shape=[True, 2])},), "not counts"),
    "offsets turned": (({"a": entry(offsets=[8, 0])},), "not counts"),
    "one offset": (({"a": entry(offsets=[8])},), "not counts"),
    "offset beyond 64 bits": (({"a": entry(offsets=[0, 2**80])},), "not counts"),
    "overlap": (({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])},), "b overlaps a"),
    "same place": (({"a": entry(), "b": entry()},), "b overlaps a"),
    "gap": (({"a": entry(shape=[1], offsets=[4, 8])},), "a leaves a gap of 4 bytes after the header"),
    "something behind": (({"a": entry()}, bytes(9)), r"tensors end at byte \d+, but the file has"),
    "cut short": (({"a": entry()}, bytes(7)), r"tensors end at byte \d+, but the file has"),
    "no entry": (({"a": 1},), "needs dtype, shape and data_offsets"),
    "a further field": (({"a": entry(more=1)},), "needs dtype, shape and data_offsets"),
    "metadata of numbers": (({"__metadata__": {"a": 1}, "a": entry()},), "__metadata__"),
}


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_named(name: str, tmp_path: Path) -> None:
    arguments, message = BROKEN[name]
    path = file_of(tmp_path / "m.safetensors", *arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_what_the_library_lets_through(tmp_path: Path) -> None:
    """Why the header is read here: of two entries for one key, the library takes the last, other readers the first."""
    accepted = set()
    for name, (arguments, _) in BROKEN.items():
        with suppress(SafetensorError):
            load_file(file_of(tmp_path / "m.safetensors", *arguments))
            accepted.add(name)
    assert accepted == {"a key twice", "a further field"}


@pytest.mark.fault(33)
@pytest.mark.parametrize("dtype", safetensors_header._DTYPES.values(), ids=str)
def test_every_type_is_read_as_the_library_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {
        "a": torch.arange(12).reshape(3, 4).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "one": torch.ones(()).to(dtype),
    }
    save_file(state, tmp_path / "m", metadata={"format": "pt"})
    expected = load_file(tmp_path / "m")
    read = read_tensors(tmp_path / "m")
    assert set(read) == set(expected)
    for key, value in read.items():
        assert value.dtype == dtype and value.shape == expected[key].shape
        assert torch.equal(value.double(), expected[key].double())


@pytest.mark.fault(33)
def test_numbers_at_odd_addresses_are_read(tmp_path: Path) -> None:
    text = json.dumps({"a": entry()})
    text += " " * (1 - len(text) % 2)
    path = file_of(tmp_path / "m.safetensors", text, torch.tensor([1.5, -2.0]).numpy().tobytes())
    assert read_tensors(path)["a"].tolist() == [1.5, -2.0]


EMPTY = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def listing(names: Iterable[str], value: str = EMPTY) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name in names) + "}"


COSTLY: dict[str, str] = {
    "as many tensors as may be": listing(f"{i:x}" for i in range(20_000)),
    "more tensors than may be": listing(f"{i:x}" for i in range(60_000)),
    "every key twice": listing((f"{i // 2:x}" for i in range(200_000)), "1"),
    "the last of many keys twice": listing((f"{min(i, 99_999):x}" for i in range(100_001)), "1"),
    "a key of dots": listing(["." * 100_000]),
    "a key of a megabyte": listing(["a" * 1_000_000]),
    "long keys of dots": listing("." * 990 + f"{i:x}" for i in range(4000)),
    "long keys of prefixes": listing("module." * 141 + f"{i:x}" for i in range(4000)),
    "long keys that look like LoRA's": listing(".lora_" * 160 + f"{i:x}" for i in range(4000)),
    "4 million digits": '{"a":{"dtype":"U8","shape":[' + "9" * 4_000_000 + '],"data_offsets":[0,0]}}',
    "400 digits": '{"a":{"dtype":"U8","shape":[' + "9" * 400 + '],"data_offsets":[0,0]}}',
    "6,000 digits in the offsets": '{"a":{"dtype":"U8","shape":[0],"data_offsets":[' + "9" * 6000 + ",0]}}",
    "a fraction of 4 million digits": '{"a":0.' + "9" * 4_000_000 + "}",
    "many lists": '{"a":[' + "[]," * 1_000_000 + "0]}",
    "lists in lists": '{"a":[' + ("[" * 500 + "]" * 500 + ",") * 1000 + "0]}",
    "many objects": '{"a":[' + '{"":0},' * 400_000 + "0]}",
    "many numbers": '{"a":[' + "0," * 1_000_000 + "0]}",
    "much metadata": '{"__metadata__":' + listing((f"{i:x}" for i in range(200_000)), '""') + "}",
}


@pytest.mark.fault(139)
@pytest.mark.parametrize("name", COSTLY)
def test_a_header_costs_no_more_than_its_size(name: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "m.safetensors", COSTLY[name], b"")
    with in_proportion(path.stat().st_size), pytest.raises(CheckpointError) as caught:
        load_path(path)
    assert "made to look" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.fault(142)
@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0], [0, 2**62, 2**62], [0, 2**32, 2**32], [2**63 - 1, 0, 3]])
def test_an_empty_tensor_larger_than_any_file_is_refused(shape: list[int], tmp_path: Path) -> None:
    path = file_of(tmp_path / "m.safetensors", {"a": entry("U8", shape, [0, 0])}, b"")
    with pytest.raises(CheckpointError, match=r"a of shape \[.* is larger than any file"):
        read_tensors(path)


@pytest.mark.fault(142)
@pytest.mark.parametrize("dtype", ["U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F8_E8M0", "\x1b[31m", "F" * 1_000_000])
def test_a_type_that_is_not_read_is_named(dtype: str, tmp_path: Path) -> None:
    path = file_of(tmp_path / "m.safetensors", {"a": entry(dtype, [0], [0, 0])}, b"")
    with pytest.raises(CheckpointError, match=r"a has the unknown dtype '.*known: BOOL") as caught:
        read_tensors(path)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.fault(144)
@pytest.mark.parametrize("name", ["\x1b[31mred", "\x1b]0;title\x07" * 50, "\ud800", "a\r\nb", "\u202e" * 900])
def test_names_from_a_header_are_shown_escaped_and_short(name: str, tmp_path: Path) -> None:
    for header in ({name: entry("F31")}, {name: entry(shape=[3])}, {name: 1}, {name: entry(), name + "2": entry()}):
        with pytest.raises(CheckpointError) as caught:
            read_tensors(file_of(tmp_path / "m.safetensors", header))
        assert str(caught.value).replace("\n", "").isprintable() and len(str(caught.value)) < 2500
