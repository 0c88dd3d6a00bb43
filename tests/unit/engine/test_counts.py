"""What a step costs each engine, counted and not timed: a saving that is lost fails here, on a busy machine too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flagai_altdiff.engine import EagerEngine, Engine, PackedEngine
from flagai_altdiff.engine.packed_layers import PackedConv
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.attention import BasicTransformerBlock
from tests import tiny
from tests.counting import Counting, counted, flop, kept_bytes, size_bytes

MOST_MULTIPLICATIONS = 0.95
"""Of the packed engine over the model as it is, in a step with guidance, of maps too small for minimal filtering."""
MOST_WEIGHTS = 2.8
"""Bytes that the packed engine keeps over those of the UNet's weights; small layers take the larger tiles."""
MOST_MADE = 1.4
"""Pieces of memory that a step of the packed engine asks for, over those of the model as it is."""


@pytest.fixture
def fresh(variant: str) -> LatentDiffusion:
    """Packed by nobody yet."""
    return tiny.fresh_model(variant).eval()


def step(engine: Engine, width: int) -> Callable[[], Tensor]:
    """A step of a picture of 128 px with guidance; always the same texts, as in a walk."""
    generator = torch.Generator().manual_seed(0)
    x, cond = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(2, 77, width, generator=generator)
    return lambda: engine.denoise(x, torch.tensor([5]), cond)


def two_steps(engine: Engine, width: int) -> tuple[Counting, Counting]:
    """The counts of the first and of all others."""
    work = step(engine, width)
    return counted(work), counted(work)


def test_keys_and_values_of_the_text_are_made_once(fresh: LatentDiffusion) -> None:
    blocks = sum(isinstance(module, BasicTransformerBlock) for module in fresh.modules())
    plain = two_steps(EagerEngine(fresh), fresh.config.unet.context_dim)
    packed = two_steps(PackedEngine(fresh), fresh.config.unet.context_dim)
    assert [count.text_products for count in plain] == [2 * blocks] * 2
    assert [count.text_products for count in packed] == [2 * blocks, 0]
    assert plain[1].attentions == 2 * blocks
    assert packed[1].attentions == packed[1].calls["_softmax"] == blocks  # to itself; to the text by plain products


def test_a_packed_step_multiplies_less(fresh: LatentDiffusion) -> None:
    width = fresh.config.unet.context_dim
    plain, packed = step(EagerEngine(fresh), width), step(PackedEngine(fresh), width)
    counted(packed)
    assert flop(packed) <= MOST_MULTIPLICATIONS * flop(plain)


@pytest.mark.parametrize(("channels", "side", "most"), [(320, 32, 0.3), (1280, 4, 0.45)], ids=["large", "wide"])
def test_a_convolution_multiplies_less(channels: int, side: int, most: float) -> None:
    conv, x = nn.Conv2d(channels, channels, 3, padding=1), torch.zeros(1, channels, side, side)
    packed = PackedConv(conv)
    counted(lambda: packed(x))
    assert flop(lambda: packed(x)) <= most * flop(lambda: conv(x))


def test_what_precedes_the_text_is_done_once_for_both_halves(fresh: LatentDiffusion) -> None:
    """The first convolution, the time embedding, the first residual block and self-attention."""
    rows: list[int] = []
    engine = PackedEngine(fresh)
    unet = engine.model.model.diffusion_model
    names = ("input_blocks.0.0", "time_embed.0", "input_blocks.1.0", "input_blocks.1.1.transformer_blocks.0.norm1")
    for name in names:
        _watch(unet.get_submodule(name), rows)
    counted(step(engine, fresh.config.unet.context_dim))
    assert rows == [1, 1, 1, 1]


def _watch(module: nn.Module, rows: list[int]) -> None:
    inner = module.forward

    def forward(x: Tensor, *more: Tensor) -> Tensor:
        rows.append(len(x))
        return inner(x, *more)

    module.forward = forward  # type: ignore[method-assign]


def test_weights_are_laid_out_once(fresh: LatentDiffusion) -> None:
    work = step(PackedEngine(fresh), fresh.config.unet.context_dim)
    weights = sum(map(size_bytes, fresh.model.parameters()))
    assert kept_bytes(work) <= MOST_WEIGHTS * weights
    assert kept_bytes(work) == 0


def test_a_packed_step_asks_for_little_memory(fresh: LatentDiffusion) -> None:
    width = fresh.config.unet.context_dim
    plain, packed = two_steps(EagerEngine(fresh), width)[1], two_steps(PackedEngine(fresh), width)[1]
    assert packed.made <= MOST_MADE * plain.made


def test_a_step_without_a_prompt_costs_half(fresh: LatentDiffusion) -> None:
    engine, width = EagerEngine(fresh), fresh.config.unet.context_dim
    x, t, cond = torch.zeros(1, 4, 16, 16), torch.tensor([5]), torch.zeros(2, 77, width)
    assert flop(lambda: engine.denoise(x, t, cond[:1])) * 2 == flop(lambda: engine.denoise(x, t, cond))
