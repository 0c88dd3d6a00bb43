"""Small valid files with bytes flipped, inserted, removed or cut: they load, or are refused; nothing else ever happens.

``ALTDIFF_FUZZ_EXAMPLES=20000`` makes a long run of it.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from flagai_altdiff.checkpoint.diffusers_folder import read_config, weight_files
from flagai_altdiff.checkpoint.layouts import detect
from flagai_altdiff.checkpoint.ldm_yaml import dump_config, load_config
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.tokenizer import load_tokenizer
from tests import tiny
from tests.unit.checkpoint.test_diffusers_folder import RELEASED_M9

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60"))
MAX_GROWTH_BYTES = 1 << 30

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(2, dtype=torch.float16),
    "c": torch.tensor([1, 2]),
}


class Touch:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, (f"touch {self.canary}",)


@functools.cache
def home() -> Path:
    """A folder for the whole run; its file ``canary`` must never appear."""
    return Path(tempfile.mkdtemp(prefix="fuzz-"))


def saved(data: object, zipped: bool) -> bytes:
    path = home() / "seed.ckpt"
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def read_file(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        path = home() / name
        path.write_bytes(data)
        for tensor in read_tensors(path).values():
            assert tensor.device.type == "cpu"
            tensor.float().sum()  # every number is there

    return read


def read_yaml(data: bytes) -> None:
    (home() / "config.yaml").write_bytes(data)
    load_config(home() / "config.yaml")


def read_tokenizer(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        (home() / name).write_bytes(data)
        tokenizer = load_tokenizer(home() / name)
        tokenizer.encode("a photo of a cat 猫")
        tokenizer.to_transformers()

    return read


def read_json(name: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        folder = home() / "diffusers"
        for file, fields in RELEASED_M9.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(json.dumps(fields))
        (folder / name).write_bytes(data)
        read_config(folder)

    return read


def read_index(data: bytes) -> None:
    folder = home() / "sharded" / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    for shard in ("x-1.safetensors", "x-2.safetensors"):
        (folder / shard).touch()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(data)
    assert {p.parent for p in weight_files(folder.parent, "unet")} == {folder}


def read_ref(data: bytes) -> None:
    entry = home() / "models--x"
    (entry / "refs").mkdir(parents=True, exist_ok=True)
    (entry / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    (entry / "snapshots" / "abc" / "m.ckpt").touch()
    (entry / "refs" / "main").write_bytes(data)
    assert detect(entry).folder.parent == entry / "snapshots"


def tokenizer_json() -> bytes:
    path = home() / "sentencepiece.bpe.model"
    path.write_bytes(tiny.sentencepiece_model())
    return load_tokenizer(path).to_transformers().backend_tokenizer.to_str().encode()


def released_json(name: str) -> bytes:
    return json.dumps(RELEASED_M9[name]).encode()


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
CHECKPOINT = {"state_dict": STATE, "epoch": 3, "hook": {}}
ATTACK = {"state_dict": STATE, "hook": Touch(home() / "canary")}

READERS: dict[str, tuple[Callable[[], bytes], Callable[[bytes], None]]] = {
    "safetensors": (lambda: save(STATE), read_file("m.safetensors")),
    "zip": (lambda: saved(CHECKPOINT, True), read_file("m.ckpt")),
    "legacy": (lambda: saved(CHECKPOINT, False), read_file("m.bin")),
    "zip attack": (lambda: saved(ATTACK, True), read_file("m.safetensors")),
    "legacy attack": (lambda: saved(ATTACK, False), read_file("m.pt")),
    "config.yaml": (lambda: dump_config(tiny.tiny_config(tiny.M18)).encode(), read_yaml),
    **{name: (functools.partial(released_json, name), read_json(name)) for name in RELEASED_M9},
    "shard index": (lambda: json.dumps(INDEX).encode(), read_index),
    "ref": (lambda: b"abc\n", read_ref),
    "sentencepiece": (tiny.sentencepiece_model, read_tokenizer("sentencepiece.bpe.model")),
    "tokenizer.json": (tokenizer_json, read_tokenizer("tokenizer.json")),
}
SEEDS = functools.cache(lambda name: READERS[name][0]())

NASTY = [b"\xff" * 8, b"\x7f" * 4, b"\0" * 4, b"-1", b"1e999", b"${x}"]
Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "remove", "cut", "repeat", "overwrite"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NASTY)),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    for kind, where, value in edits:
        at = int(where * len(data))
        if kind == "flip":
            data = data[:at] + bytes(b ^ v for b, v in zip(data[at:], value, strict=False)) + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "remove":
            data = data[:at] + data[at + len(value) :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "repeat":
            data = data[:at] + data[at : at + 64] * (value[0] + 1) + data[at:]
        else:
            data = data[:at] + value + data[at + len(value) :]
    return data


@pytest.mark.fault(28)
@pytest.mark.fault(33)
@pytest.mark.fault(38)
@pytest.mark.fault(40)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_loads_or_is_refused(name: str) -> None:
    read = READERS[name][1]

    @settings(max_examples=EXAMPLES, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))
    @example(edits=[])
    @given(edits=EDITS)
    def survives(edits: list[Edit]) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        message = ""
        try:
            read(edited(SEEDS(name), edits))
        except FlagAIAltDiffError as error:
            message = str(error)
        assert not message or message.startswith(str(home()))
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MAX_GROWTH_BYTES
        assert not (home() / "canary").exists()

    survives()
