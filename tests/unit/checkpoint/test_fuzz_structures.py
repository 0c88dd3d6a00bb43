"""Files made of the right pieces in every wrong way: they load, or are refused, at a cost in proportion to their size.

Unlike ``test_fuzz.py``, which damages valid files, this builds pickles, zip directories, headers, shapes and indexes
from their elements, some of them repeated many times. ``ALTDIFF_FUZZ_EXAMPLES=20000`` makes a long run of it.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flagai_altdiff.checkpoint import structure
from flagai_altdiff.checkpoint.diffusers_folder import read_weights
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.checkpoint.weights import assign
from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.models import build_model
from tests import tiny
from tests.cost import in_proportion
from tests.unit.checkpoint.test_pickled import (
    MAGIC,
    SIX,
    archive,
    doubled,
    kept,
    number,
    numbers,
    storage,
    tensor,
    text,
)

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "40"))
MAX_BYTES = 1_500_000

SIZES = st.one_of(
    st.integers(0, 8), st.sampled_from([-1, 255, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**399])
)
NAMES = st.one_of(
    st.sampled_from(["a", "b", "state_dict", "module", "module.a", "", "\0", "\x1b[31m", "\ud800", "é", "a" * 1500]),
    st.builds(
        lambda piece, times: piece * times, st.sampled_from([".", "a.", "module.", ".lora_"]), st.integers(1, 300)
    ),
)
TIMES = st.sampled_from([1, 1, 1, 2, 10, 1000, 300_000])


@functools.cache
def home() -> Path:
    """A folder for the whole run."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


@pytest.fixture(autouse=True)
def _only_the_readers_count() -> Iterator[None]:
    """Python's search for garbage passes over what the tests have made so far, and nothing is imported on the way."""
    load(tiny.tiny_state("m9"), "m.ckpt")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tried(*strategies: st.SearchStrategy[object]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a test on many examples."""

    def decorate(test: Callable[..., None]) -> Callable[[], None]:
        chosen = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        return chosen(given(*strategies)(test))

    return decorate


def check(path: Path, size_bytes: int, read: Callable[[Path], object] = read_tensors) -> None:
    """Read a file; what it costs and what is said must be in order."""
    message = ""
    try:
        with in_proportion(size_bytes):
            read(path)
    except FlagAIAltDiffError as error:
        message = str(error)
    assert message.startswith(str(path) if message else "")
    assert "made to look" not in message, message  # the last net
    assert message.isprintable() and len(message) < 2500


def encoded(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + len(data).to_bytes(4, "little") + data


def raw(code: bytes, width: int) -> st.SearchStrategy[bytes]:
    """A step with a number behind it, be it an index, a length or a value."""
    return SIZES.map(lambda size: code + (size % (1 << 8 * width)).to_bytes(width, "little"))


PIECES = st.one_of(
    st.sampled_from(
        [bytes([code]) for code in b"()]}0122NabdeRlQstu.\x81\x82\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94"]
    ),
    st.sampled_from(
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n",
            b"ccollections\nOrderedDict\n",
            b"ctorch\nFloatStorage\n",
            b"comegaconf\nx\n",
            b"cposix\nsystem\n",
            b"ctorch\nComplexFloatStorage\n",
            b"G" + bytes(8),
            b"I01\n",
            b"L1L\n",
            b"Vtext\n",
            b"I" + b"9" * 900 + b"\n",
            b"I" + b"9" * 6000 + b"\n",
            doubled(60),
            b")" + b"\x85" * 4000,
            b"h\0h\0\x86q\0",
            b"h\0h\1\x85R",
            storage(),
        ]
    ),
    *(raw(code, 1) for code in (b"h", b"q", b"K", b"C", b"U", b"\x80", b"\x8a", b"\x8c")),
    raw(b"M", 2),
    *(raw(code, 4) for code in (b"j", b"r", b"J", b"B", b"T", b"X", b"\x8b")),
    *(raw(code, 8) for code in (b"\x8d", b"\x8e", b"\x95", b"\x96")),
    SIZES.map(number),
    NAMES.map(encoded),
    st.builds(lambda name, value: encoded(name) + value + b"s", NAMES, st.just(tensor(storage()))),
    st.builds(
        lambda shape, stride, offset: tensor(storage(), tuple(shape), tuple(stride), offset),
        st.lists(SIZES, max_size=4),
        st.lists(SIZES, max_size=4),
        SIZES,
    ),
    st.binary(min_size=1, max_size=3),
)
PROGRAMS = st.lists(st.tuples(PIECES, TIMES), min_size=1, max_size=12)
BEGINNINGS = st.sampled_from([b"", b"}", b"}(", b"](", b"}" + kept(storage(), 0) + kept(numbers((6,)), 1)])


@pytest.mark.fault(138)
@pytest.mark.parametrize("zipped", [True, False])
def test_any_program_of_a_pickle_is_read_at_little_cost(zipped: bool) -> None:
    @tried(BEGINNINGS, PROGRAMS)
    def survives(beginning: bytes, program: list[tuple[bytes, int]]) -> None:
        body = b"".join(piece * min(times, MAX_BYTES // 4 // len(piece) + 1) for piece, times in program)
        whole = b"\x80\x02" + beginning + body[:MAX_BYTES] + b"."
        path = home() / "m.ckpt"
        if zipped:
            archive(path, whole, {"0": SIX})
        else:
            path.write_bytes(MAGIC + whole + b"\x80\x02]" + text("0") + b"a." + (6).to_bytes(8, "little") + SIX)
        check(path, path.stat().st_size)

    survives()


FIELDS = st.one_of(
    st.just(b""),
    st.builds(
        lambda sizes: struct.pack(f"<2H{len(sizes)}Q", 1, 8 * len(sizes), *sizes),
        st.lists(SIZES.map(lambda size: size % 2**64), max_size=3),
    ),
    st.binary(max_size=12),
    st.just(bytes(60_000)),
)
ENTRIES = st.lists(
    st.tuples(
        NAMES.map(lambda name: ("m/" + name).encode("utf-8", "surrogatepass")),
        FIELDS,
        st.sampled_from([0, 8, 0x800, 1]),
        st.sampled_from([0, 8, 99]),
        SIZES,
        SIZES,
        SIZES,
        TIMES,
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.fault(139)
def test_any_zip_directory_is_read_at_little_cost() -> None:
    @tried(ENTRIES, st.one_of(st.none(), SIZES), st.booleans())
    def survives(
        entries: list[tuple[bytes, bytes, int, int, int, int, int, int]], count: int | None, real: bool
    ) -> None:
        body, found, total = b"PK\3\4" + bytes(26), [], 0
        for name, extra, flags, method, packed, unpacked, start, times in entries:
            if real:  # with a header of its own, so that the entry itself is in order
                start = len(body)
                body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, flags, method, 0, 0, 0, 0, 0, len(name), 0) + name
            sizes = (packed % 2**32, unpacked % 2**32, len(name), len(extra), 0, 0, 0, 0, start % 2**32)
            entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, flags, method, 0, 0, 0, *sizes) + name + extra
            times = min(times, MAX_BYTES // 4 // len(entry) + 1)
            found.append(entry * times)
            total += times
        directory, total = b"".join(found), total if count is None else count % 2**64
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, total, total, len(directory), len(body))
        locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory), 1)
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *[0xFFFF] * 2, *[0xFFFFFFFF] * 2, 0)
        size = (home() / "z.ckpt").write_bytes(body + directory + end64 + locator + end)
        check(home() / "z.ckpt", size)

    survives()


VALUES = st.one_of(
    SIZES.map(str),
    st.sampled_from(
        ["1.5", "1e400", "NaN", "-0", "true", "null", '"x"', "[]", "{}", "9" * 5000, "[" * 500 + "]" * 500]
    ),
)
DTYPES = st.sampled_from(["F32", "U8", "F16", "BOOL", "F8_E4M3", "F4", "C64", "U16", "\x1b[31m"])
TENSORS = st.builds(
    lambda dtype, shape, offsets: (
        f'{{"dtype":{json.dumps(dtype)},"shape":[{",".join(shape)}],"data_offsets":[{offsets}]}}'
    ),
    DTYPES,
    st.lists(VALUES, max_size=4),
    st.sampled_from(["0,0", "0,4", "4,8", "0,8", "8,0", "0", "0," + "9" * 5000]),
)
MEMBERS = st.lists(st.tuples(NAMES, st.one_of(TENSORS, TENSORS, VALUES), TIMES, st.booleans()), min_size=1, max_size=5)


@pytest.mark.fault(139)
def test_any_header_is_read_at_little_cost() -> None:
    @tried(MEMBERS, st.sampled_from([0, 4, 8]))
    def survives(members: list[tuple[str, str, int, bool]], data_bytes: int) -> None:
        rows = []
        for name, value, times, numbered in members:
            row = json.dumps(name), value
            for i in range(min(times, MAX_BYTES // 4 // (len(row[0]) + len(value)) + 1)):
                rows.append(f'{row[0][:-1]}{i if numbered else ""}":{value}')
        header = ("{" + ",".join(rows) + "}").encode()
        path = home() / "m.safetensors"
        check(path, path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data_bytes)))

    survives()


def load(state: Mapping[str, Tensor], where: str) -> None:
    """What becomes of weights that come without a config."""
    config = structure.infer_config(state, where)
    structure.check_counts(config, structure.counts(state), where)
    config = structure.complete_config(config, state, where)
    whole = structure.fill_unread(config.cond_stage, state)
    with torch.device("meta"):
        model = build_model(config)
    assign(model, whole, where)


KEYS = sorted(key for name in tiny.VARIANTS for key in tiny.tiny_state(name))
SIDES = st.sampled_from([0, 1, 2, 3, 31, 64, 128, 70_000])
SHAPES = st.lists(SIDES, max_size=5).map(tuple).filter(lambda shape: math.prod(shape) < 1 << 50)
KINDS = st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float64])
NUMBERED = (
    "model.diffusion_model.input_blocks.{}.0.out_layers.3.weight",
    "model.diffusion_model.input_blocks.{}.0.op.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.{}.x",
    "first_stage_model.encoder.down.{}.block.0.conv2.weight",
    "first_stage_model.encoder.down.0.block.{}.conv2.weight",
    "cond_stage_model.roberta.encoder.layer.{}.x",
    "x.{}",
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(KEYS), st.none(), KINDS),
        st.tuples(st.sampled_from(KEYS), SHAPES, KINDS),
        st.tuples(st.sampled_from(NUMBERED), SHAPES, st.sampled_from([1, 20, 99, 5000])),
        st.tuples(NAMES, SHAPES, KINDS),
    ),
    max_size=6,
)


@pytest.mark.fault(142)
def test_weights_of_any_shape_are_judged_at_little_cost() -> None:
    @tried(st.sampled_from(sorted(tiny.VARIANTS)), CHANGES)
    def survives(name: str, changes: list[tuple[str, tuple[int, ...] | None, torch.dtype | int]]) -> None:
        state, size = dict(tiny.tiny_state(name)), 0
        for key, shape, kind in changes:
            if shape is None:
                state.pop(key, None)
                continue
            dtype = kind if isinstance(kind, torch.dtype) else torch.uint8
            value = torch.zeros((), dtype=dtype).expand(shape)
            for i in range(kind if isinstance(kind, int) else 1):
                state[key.format(i)] = value
                size += 80
        check(Path("m.ckpt"), size, lambda path: load(state, str(path)))

    survives()


SHARDS = st.sampled_from(["x-1.safetensors", "x-2.safetensors"])
PLACES = st.one_of(
    SHARDS.map(json.dumps),
    VALUES,
    NAMES.map(lambda name: json.dumps(f"{name}.safetensors")),
    st.sampled_from(['"../x-1.safetensors"', '["x-1.safetensors"]', '{"x-1.safetensors": 1}']),
)


@pytest.mark.fault(141)
def test_any_index_of_shards_is_read_at_little_cost() -> None:
    @tried(st.lists(st.tuples(st.sampled_from("abc"), PLACES), max_size=4), st.lists(st.sampled_from("abc")), SHARDS)
    def survives(weight_map: list[tuple[str, str]], keys: list[str], lone: str) -> None:
        folder = home() / "sharded"
        (folder / "unet").mkdir(parents=True, exist_ok=True)
        rows = ",".join(f'"{key}":{place}' for key, place in weight_map)
        index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(f'{{"weight_map":{{{rows}}}}}', encoding="utf-8")
        for shard in ("x-1.safetensors", "x-2.safetensors"):
            names = keys if shard == lone else "abc"
            header = json.dumps({key: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for key in names}).encode()
            (folder / "unet" / shard).write_bytes(len(header).to_bytes(8, "little") + header)
        check(folder, 0, lambda path: read_weights(path, "unet"))

    survives()
