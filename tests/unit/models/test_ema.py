"""An interruption between any two steps of Python leaves a whole model: averaged, or trained, never both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flagai_altdiff.auto_loader import AutoLoader
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.ema import LitEma
from tests import tiny

FILES = ("ema.py", "weights.py", "contextlib.py")


class Interruption(KeyboardInterrupt):
    """As a signal raises it: before a line of ours, or of contextlib."""


def interrupted(action: Callable[[], object], *lines: int) -> bool:
    """Do something with an exception before its ``lines``-th lines; whether it came to the last of them."""
    left, count = list(lines), 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            count += 1
            if left and count == left[0]:
                left.pop(0)
                raise Interruption
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except Interruption:  # suppress would be interrupted itself
        pass
    finally:
        sys.settrace(before)
    return not left


class Averaged(nn.Module):
    """A small model, and averages that differ from it in every number."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        self.model_ema = LitEma(self.model)
        for buffer in list(self.model_ema.buffers())[2:]:
            buffer.add_(1.0)

    def enter_and_leave(self) -> None:
        with self.model_ema.in_place_of_parameters(self.model):
            pass


def averaging_model() -> LatentDiffusion:
    """The same at the size of a model."""
    model = tiny.fresh_model("m9", use_ema=True)
    assert model.model_ema is not None
    for buffer in list(model.model_ema.buffers())[2:]:
        buffer.add_(1.0)
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.fault(152)
def test_an_interruption_of_the_averaged_scope_leaves_the_trained_weights() -> None:
    small = Averaged()
    trained = snapshot(small)
    line = 1
    while interrupted(small.enter_and_leave, line):
        assert same(small, trained), f"interrupted before line {line}"
        line += 1
    assert line > 30
    assert same(small, trained)


@pytest.mark.fault(152)
def test_two_interruptions_leave_a_whole_model() -> None:
    small, first = Averaged(), 1
    trained = snapshot(small)
    with small.model_ema.in_place_of_parameters(small.model):
        averaged = snapshot(small)
    while interrupted(small.enter_and_leave, first):
        for second in range(first + 1, first + 80):
            interrupted(small.enter_and_leave, first, second)
            assert same(small, trained) or same(small, averaged), f"interrupted before lines {first} and {second}"
            if not same(small, trained):
                small = Averaged()
                small.load_state_dict(trained)
        first += 1
    assert first > 30


def test_scopes_may_lie_in_each_other_and_change_nothing_else() -> None:
    model = averaging_model()
    trained, places = snapshot(model), [parameter.data_ptr() for parameter in model.parameters()]
    with model.ema_scope():
        inner = snapshot(model)
        with model.ema_scope():
            assert same(model, inner)
        assert same(model, inner) and not same(model, trained)
    assert same(model, trained)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places


def test_a_model_that_is_cast_in_the_scope_is_cast_after_it() -> None:
    model = averaging_model()
    weight = model.get_parameter("model.diffusion_model.out.2.weight")
    trained = weight.detach().clone()
    with model.ema_scope():
        model.half()
    assert weight.dtype == torch.float16
    assert torch.equal(weight, trained.half())
    with model.ema_scope():
        assert weight.dtype == torch.float16 and not torch.equal(weight, trained.half())


@pytest.mark.fault(152)
def test_an_interruption_of_load_pretrain_params_leaves_a_whole_model(m9_folder: Path, tmp_path: Path) -> None:
    other = tiny.tiny_state("m9", seed=9)
    torch.save(other, tmp_path / "other.ckpt")
    loader = AutoLoader("text2img", str(m9_folder), safety_checker=False)
    model = loader.get_model()
    old = snapshot(model)
    line = 1
    while interrupted(lambda: loader.load_pretrain_params(tmp_path / "other.ckpt"), line):
        assert same(model, old) or same(model, other), f"interrupted before line {line}"
        line += 173
    assert same(model, other)
