"""Whatever nobody foresaw is an error of ours at the doors: load_model, load_path, convert, load_pretrain_params."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flagai_altdiff.auto_loader import AutoLoader
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError, ConfigError, HubError, InsufficientMemoryError, UnknownModelError
from flagai_altdiff.loading import load_model, load_path
from tests import tiny

Door = Callable[[Path, Path], object]


@pytest.fixture
def folder(m9_folder: Path, tmp_path: Path) -> Path:
    convert(m9_folder, tmp_path / "d", "diffusers")
    return tmp_path / "d"


DOORS: dict[str, Door] = {
    "load_model": lambda folder, target: load_model(folder),
    "load_path": lambda folder, target: load_path(folder),
    "convert": lambda folder, target: convert(folder, target, "flagai"),
}


@pytest.mark.fault(151)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ZeroDivisionError("\x1b[31m" + "x" * 10_000), CheckpointError),
        (RecursionError("too deep"), CheckpointError),
        (OverflowError(), CheckpointError),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), CheckpointError),
        (OSError(5, "Input/output error"), CheckpointError),
        (MemoryError(), InsufficientMemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), InsufficientMemoryError),
        (HubError("ours"), HubError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_what_nobody_foresaw_is_an_error_of_ours(
    door: str,
    error: BaseException,
    kind: type[BaseException],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise error

    monkeypatch.setattr(torch.Tensor, "aminmax", fail)
    with pytest.raises(kind) as caught:
        DOORS[door](folder, tmp_path / "new")
    message = str(caught.value)
    if kind in (CheckpointError, InsufficientMemoryError):
        assert message.startswith(str(folder)) and len(message) < 1000 and message.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.fault(151)
def test_load_pretrain_params_has_the_net(m9_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = AutoLoader("text2img", str(m9_folder), safety_checker=False)
    torch.save(tiny.tiny_state("m9", seed=9), tmp_path / "other.ckpt")

    def fail(*args: object, **kwargs: object) -> object:
        raise ZeroDivisionError("nobody foresaw")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "aminmax", fail)
        with pytest.raises(CheckpointError, match=r"other\.ckpt.*nobody foresaw"):
            loader.load_pretrain_params(tmp_path / "other.ckpt")
    state = loader.get_model().state_dict()
    assert all(torch.equal(state[key], value) for key, value in tiny.tiny_state("m9").items())


@pytest.mark.fault(151)
@pytest.mark.parametrize(
    "value", [None, [], [1], {"a": 1}, "", 7, True, [None, None], ["x"], [["x"]], ["diffusers", ["x"]], 1e308]
)
@pytest.mark.parametrize(
    "field", ["_class_name", "unet", "vae", "text_encoder", "scheduler", "tokenizer", "safety_checker"]
)
def test_odd_values_of_model_index_are_named_or_of_no_concern(
    field: str, value: object, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    if field in ("scheduler", "tokenizer", "safety_checker"):
        load_path(folder, safety_checker=False)
        return
    with pytest.raises(ConfigError, match=rf"model_index\.json: {field}="):
        load_path(folder, safety_checker=False)


@pytest.mark.fault(151)
@pytest.mark.parametrize(
    "name", ["", ".", "\0", "a\0b", "n" * 300, "n" * 5000, "\ud83d", "a/" * 3000, "~", "\x1b[31m", "NUL", "//"]
)
def test_odd_names_are_errors_of_ours(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (
        lambda: load_model(name),
        lambda: load_path(name),
        lambda: convert(name, tmp_path / "new", "flagai"),
        lambda: convert(tmp_path, Path(name or "."), "flagai"),
    ):
        with pytest.raises((CheckpointError, UnknownModelError)) as caught:
            act()
        assert "\x1b" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
