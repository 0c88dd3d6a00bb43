"""Files of weights are told by their content, and a pickle never runs anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import tarfile
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError
from flagai_altdiff.loading import load_path
from tests import tiny
from tests.cost import in_proportion

WEIGHTS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(2, dtype=torch.float16),
    "c": torch.tensor([1, 2]),
}


def assert_weights(path: Path) -> None:
    state = read_tensors(path)
    assert set(state) == set(WEIGHTS)
    for key, value in WEIGHTS.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)


@pytest.mark.fault(29)
@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.bin"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_content_decides_not_the_name(name: str, kind: str, wrapped: bool, tmp_path: Path) -> None:
    path = tmp_path / name
    if kind == "safetensors":
        save_file(WEIGHTS, path)
    else:
        data = {"state_dict": OrderedDict(WEIGHTS), "global_step": 7, "epoch": 1} if wrapped else WEIGHTS
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    assert_weights(path)


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.args


def attacks(canary: Path) -> dict[str, object]:
    code = f"open({str(canary)!r}, 'w')"
    touch = f"touch {canary}"
    return {
        "os.system": Call(os.system, touch),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(canary), "w"),
        "nested": {"epoch": [Call(getattr, Call(__import__, "os"), "system"), Call(os.system, touch)]},
        "in a Namespace": Namespace(hook=Call(os.system, touch)),
        "in a list": [Counter(a=1), Call(eval, code)],
        "loads again": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
        "as a key": {Call(eval, f"{code} and 1"): 1},
    }


NAMES = tuple(attacks(Path("x")))


@pytest.mark.fault(28)
@pytest.mark.parametrize("attack", NAMES)
@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_code_is_refused_and_runs_nothing(
    attack: str, name: str, zipped: bool, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / name
    data = {"state_dict": WEIGHTS, "callbacks": attacks(canary)[attack]}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match="Nothing in it was run") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert not canary.exists()


def test_the_attacks_work_where_nothing_stops_them(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for attack in ("os.system", "eval", "exec", "loads again"):
        torch.save(attacks(canary)[attack], tmp_path / "m.ckpt")
        torch.load(tmp_path / "m.ckpt", weights_only=False)
        assert canary.exists(), attack
        canary.unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_refusal_gives_no_bad_advice(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": WEIGHTS, "x": Call(os.system, "true")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError, match="system") as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)


def raw_pickle(path: Path, opcodes: bytes) -> None:
    """A torch zip whose pickle consists of the given opcodes."""
    torch.save({"state_dict": {}}, path)
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            new.writestr(name, opcodes if name.endswith("data.pkl") else data)


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("pathlib", "os.system"),
        ("argparse", "_sys.modules"),
        ("pytorch_lightning.utilities", "os.system"),
        ("omegaconf", "omegaconf.os.system"),
        ("posix", "system"),
        ("torch", "hub.load"),
        ("torch._utils", "_rebuild_tensor"),
    ],
)
def test_a_harmless_prefix_opens_no_way_in(module: str, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "m.ckpt"
    argument = f"touch {canary}".encode()
    call = b"c" + f"{module}\n{name}\n".encode() + b"(V" + argument + b"\ntR"
    raw_pickle(path, b"\x80\x02}(X\x01\x00\x00\x00a" + call + b"u.")
    with pytest.raises(CheckpointError):
        read_tensors(path)
    assert not canary.exists()


def trainer_leftovers() -> dict[str, Any]:
    import numpy as np

    tree: defaultdict[str, list[int]] = defaultdict(list)
    tree["a"].append(1)
    return {
        "hyper_parameters": Namespace(lr=1e-4, path=Path("/somewhere"), nested=Namespace(a=[1, 2])),
        "config": OmegaConf.create({"model": {"params": [1, 2, {"x": "y"}]}}),
        "best": np.float64(0.5),
        "scores": np.arange(3),
        "counts": Counter("abc"),
        "tree": tree,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "state_dict_ema": {k: v * 2 for k, v in WEIGHTS.items()},
    }


@pytest.mark.fault(32)
@pytest.mark.parametrize("leftover", [*trainer_leftovers(), "all"])
def test_what_trainers_leave_beside_the_weights_is_inert(leftover: str, tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    extra = {k: v for k, v in trainer_leftovers().items() if leftover in (k, "all")}
    torch.save({"epoch": 3, **extra, "state_dict": WEIGHTS}, path)
    assert_weights(path)


def test_classes_of_lightning_as_keys_are_inert(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    path = tmp_path / "m.ckpt"
    torch.save({"callbacks": {ModelCheckpoint: {"best_model_path": "x"}}, "state_dict": WEIGHTS}, path)
    assert_weights(path)


def page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html>\n<html><body>Please log in</body></html>")


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zeros(path: Path) -> None:
    path.write_bytes(b"\0" * 4096)


def truncated_zip(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.randn(100, 100)}}, path)
    path.write_bytes(path.read_bytes()[:9000])


def truncated_legacy(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.randn(100, 100)}}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:9000])


def truncated_safetensors(path: Path) -> None:
    save_file({"a": torch.randn(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:9000])


def header_only(path: Path) -> None:
    save_file({"a": torch.randn(100, 100)}, path)
    path.write_bytes(path.read_bytes()[:12])


def long_header(path: Path) -> None:
    path.write_bytes((1 << 60).to_bytes(8, "little") + b'{"a": 1}')


def overlapping(path: Path) -> None:
    entry = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    header = f'{{"a":{entry},"b":{entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def wrong_shape(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def no_json(path: Path) -> None:
    path.write_bytes((20).to_bytes(8, "little") + b"{" * 20)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("word/document.xml", "<x/>")


def path_in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../data.pkl", pickle.dumps({}))


def a_list(path: Path) -> None:
    torch.save([torch.ones(2)], path)


def a_text(path: Path) -> None:
    torch.save("weights", path)


def no_tensors(path: Path) -> None:
    torch.save({"state_dict": {"a": 1}}, path)


def a_folder(path: Path) -> None:
    path.mkdir()


def nothing(path: Path) -> None:
    pass


def bad_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "make",
    [
        page,
        pointer,
        empty,
        zeros,
        truncated_zip,
        truncated_legacy,
        truncated_safetensors,
        header_only,
        long_header,
        overlapping,
        wrong_shape,
        no_json,
        other_zip,
        path_in_zip,
        a_list,
        a_text,
        no_tensors,
        a_folder,
        nothing,
        bad_link,
    ],
)
@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensors"])
def test_what_is_no_file_of_weights_gives_a_precise_error(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(CheckpointError) as caught:
        read_tensors(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1 and len(message) < 600


def test_messages_say_what_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    for make, word in (
        (page, "DOCTYPE"),
        (pointer, "git-lfs"),
        (truncated_safetensors, "truncated or corrupt safetensors"),
        (truncated_zip, "truncated or corrupt torch checkpoint: its end is not the end of a zip file"),
        (truncated_legacy, "truncated or corrupt torch checkpoint: it ends before its weights"),
        (no_tensors, "no state dict"),
    ):
        make(path)
        with pytest.raises(CheckpointError, match=word):
            read_tensors(path)


@pytest.mark.fault(31)
def test_torchs_old_tar_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with tarfile.open(path, "w") as file:
        member = tarfile.TarInfo("sys_info")
        data = pickle.dumps({"protocol_version": 1000})
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    with pytest.raises(CheckpointError, match="tar format"):
        read_tensors(path)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.fault(143)
@pytest.mark.parametrize("make", [a_pipe, a_device, a_terminal, a_socket, a_folder])
def test_what_is_no_file_is_never_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    make(path)
    with in_proportion(0), pytest.raises(CheckpointError, match=r"m\.ckpt is a (pipe, socket or device|folder)"):
        read_tensors(path)
    with in_proportion(0), pytest.raises(CheckpointError, match=r"is neither a file nor a folder|holds no model"):
        load_path(path)


@pytest.mark.fault(143)
@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder])
def test_what_is_no_file_is_never_a_models_weights(make: Callable[[Path], None], tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path / "m", "m9")
    make(tmp_path / "m" / "model.safetensors")
    assert load_path(tmp_path / "m", safety_checker=False) is not None
    (tmp_path / "m" / "model.ckpt").unlink()
    make(tmp_path / "m" / "model.ckpt")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_path(tmp_path / "m")


@pytest.mark.fault(143)
def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.ckpt"
    torch.save(WEIGHTS, path)
    real = os.open

    def replace_then_open(*args: Any, **kwargs: Any) -> int:
        path.unlink()
        os.mkfifo(path)
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "open", replace_then_open)
    with in_proportion(0), pytest.raises(CheckpointError, match="is a pipe"):
        read_tensors(path)


@pytest.mark.fault(144)
@pytest.mark.parametrize("head", [b"\x1b[2J" * 9, b"\n\n\n", b"\r\x1b]0;x\x07", b"\xff" * 300, b"ustar" * 60])
def test_the_first_bytes_are_shown_escaped(head: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.ckpt").write_bytes(head)
    with pytest.raises(CheckpointError, match="it begins with") as caught:
        read_tensors(tmp_path / "m.ckpt")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.fault(142)
def test_what_nobody_foresaw_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprise(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    save_file(WEIGHTS, tmp_path / "m.ckpt")
    monkeypatch.setattr(json, "loads", surprise)
    with pytest.raises(CheckpointError, match=r"m\.ckpt is damaged, or made to look like .* \(ZeroDivisionError"):
        read_tensors(tmp_path / "m.ckpt")
