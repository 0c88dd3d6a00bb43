"""NaN, infinity and zeros are found and named; what is zero by construction is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import build_model
from tests import tiny

LARGE = 300_000


@pytest.mark.fault(37)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("place", [0, 4095, LARGE // 2, LARGE - 1])
def test_a_number_that_is_none_is_named(value: float, dtype: torch.dtype, place: int) -> None:
    weight = torch.ones(LARGE, dtype=dtype)
    weight[place] = value
    with pytest.raises(CheckpointError, match=r"m\.ckpt: b\.weight holds (NaN|infinity)"):
        check_weights({"a": torch.ones(3), "b.weight": weight}, "m.ckpt")


@pytest.mark.fault(37)
def test_one_in_between_is_found_by_a_thorough_look() -> None:
    weight = torch.ones(3, LARGE // 3).T
    weight[7000, 1] = float("nan")
    check_weights({"w": weight}, "m")
    with pytest.raises(CheckpointError, match="w holds NaN"):
        check_weights({"w": weight}, "m", thorough=True)


@pytest.mark.fault(37)
@pytest.mark.parametrize("thorough", [True, False])
def test_zeros_are_warned_of_in_one_line(thorough: bool, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"{i}.weight": torch.zeros(300, 300) for i in range(5)} | {"norm.weight": torch.zeros(8)}
    check_weights(state, "m.ckpt", thorough=thorough)
    assert [r.getMessage() for r in caplog.records] == [
        "m.ckpt: 6 tensors are all zero: 0.weight, 1.weight, 2.weight and 3 more. Is the file whole? Fetch it again."
    ]


@pytest.mark.fault(37)
def test_zeros_that_are_meant_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    window_of_zeros = torch.zeros(LARGE)
    window_of_zeros[5000] = 1
    empty, whole = torch.empty(0, 4), torch.zeros(9, dtype=torch.int64)
    for thorough in (True, False):
        state = {"w": window_of_zeros, "a.bias": torch.zeros(9), "empty": empty, "position_ids": whole}
        check_weights(state, "m", thorough=thorough)
    model = build_model(tiny.tiny_config(tiny.M18))  # as training begins
    check_weights(model.state_dict(), "m", thorough=True)
    assert caplog.records == []


def folder_with(tmp_path: Path, key: str, value: Tensor) -> Path:
    return tiny.write_flagai_folder(tmp_path / "model", "m9", {**tiny.tiny_state("m9"), key: value})


@pytest.mark.fault(37)
@pytest.mark.parametrize("half", [True, False])
def test_a_model_with_nan_does_not_load(half: bool, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.weight"
    value = tiny.tiny_state("m9")[key].clone()
    value[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=rf"{key} holds NaN"):
        load_path(folder_with(tmp_path, key, value.half() if half else value))


@pytest.mark.fault(37)
def test_a_conversion_looks_at_every_number(tmp_path: Path) -> None:
    key = "cond_stage_model.roberta.embeddings.word_embeddings.weight"
    value = torch.ones(tiny.vocabulary_size(), 128).repeat(1, 1)
    state = {**tiny.tiny_state("m9"), key: value}
    value[40, 5] = float("inf")
    tiny.write_flagai_folder(tmp_path / "model", "m9", state)
    with pytest.raises(CheckpointError, match="holds infinity"):
        convert(tmp_path / "model", tmp_path / "new", "flagai")
    assert not (tmp_path / "new").exists()


@pytest.mark.fault(37)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_weights_of_another_kind_of_number_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    from safetensors.torch import save_file

    folder = folder_with(tmp_path, key, torch.ones(4))
    (folder / "model.ckpt").unlink()
    save_file({**tiny.tiny_state("m9"), key: torch.ones(4).to(dtype)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{key} (holds|has the unknown dtype)"):
        load_path(folder)
