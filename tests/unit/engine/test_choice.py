"""Which engine draws, and what a packed model sees of changes to the one it was made from."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flagai_altdiff.engine import choice, make_engine, packed
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.packed import PackedEngine
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.loading import load_path
from flagai_altdiff.lora import finished, make_trainable
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare
from tests import tiny


@pytest.fixture
def own(m9_folder: Path) -> LatentDiffusion:
    """A model that a test may change."""
    return load_path(m9_folder, safety_checker=False)


def chosen(model: LatentDiffusion, circular: str = "", **options: int | str) -> type:
    request = prepare(model, tiny.CAT, height=64, width=64, **{"steps": 20, **options})[0]
    return type(make_engine(model, request, circular))


def test_the_quick_one_is_taken_where_it_pays(own: LatentDiffusion) -> None:
    assert chosen(own) is PackedEngine
    assert chosen(own, steps=2) is chosen(own, engine="eager") is chosen(own, circular="x") is EagerEngine
    assert chosen(own, steps=2, engine="packed") is PackedEngine


def test_it_needs_room_unless_it_is_there(own: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "free_memory", lambda device: 1e4)
    assert chosen(own) is EagerEngine
    monkeypatch.setattr(choice, "free_memory", lambda device: math.nan)
    assert chosen(own) is PackedEngine
    monkeypatch.setattr(choice, "free_memory", lambda device: 1e4)
    assert chosen(own) is PackedEngine


def test_what_it_cannot_run_is_left_to_the_model_itself(own: LatentDiffusion) -> None:
    with pytest.raises(InvalidRequestError, match="edges"):
        chosen(own, circular="x", engine="packed")
    hook = own.model.diffusion_model.register_forward_hook(lambda *_: None)
    assert chosen(own) is EagerEngine
    with pytest.raises(InvalidRequestError, match="hooks"):
        chosen(own, engine="packed")
    hook.remove()
    assert chosen(own) is PackedEngine
    make_trainable(own, rank=2, alpha=2, generator=torch.Generator())
    assert chosen(own) is EagerEngine, "weights that are made anew at each look"
    finished(own)
    assert chosen(own) is PackedEngine
    own.first_stage_model.half()
    assert chosen(own) is EagerEngine
    assert chosen(own.half()) is EagerEngine


def test_layers_of_somebodys_own_are_left_to_the_model_itself(own: LatentDiffusion) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert chosen(own) is PackedEngine
    first: Any = own.model.diffusion_model.input_blocks[0]
    first[0] = Doubled(4, first[0].out_channels, 3, padding=1)
    assert chosen(own) is EagerEngine


def test_threads_that_begin_together_pack_once(own: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    pack, packed_twins = packed._packed, []

    def slowly(model: LatentDiffusion) -> LatentDiffusion:
        time.sleep(0.2)
        packed_twins.append(pack(model))
        return packed_twins[-1]

    monkeypatch.setattr(packed, "_packed", slowly)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(PackedEngine, [own, own])
    assert len(packed_twins) == 1 and first.model is second.model


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "another tensor", "another module"])
def test_changes_of_the_model_are_seen(own: LatentDiffusion, how: str) -> None:
    unet = own.model.diffusion_model
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    states = own.get_learned_conditioning([tiny.CAT])
    before = PackedEngine(own).denoise(x, t, states)
    first: Any = unet.input_blocks[0]
    conv = first[0]
    if how == "in place":
        conv.weight.mul_(2)
    elif how == "another tensor":
        conv.weight = nn.Parameter(2 * conv.weight)
    else:
        first[0] = nn.Conv2d(4, conv.out_channels, 3, padding=1)
    after = PackedEngine(own).denoise(x, t, states)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, own.apply_model(x, t, states), rtol=1e-4, atol=1e-4)
