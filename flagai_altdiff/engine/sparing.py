"""The model itself with little memory: attention in slices, the autoencoder in strips, weights where they work only."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.strips import decode_in_strips, encode_in_strips
from flagai_altdiff.engine.twins import drawing_modules, twin_of
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.attention import CrossAttention, FeedForward
from flagai_altdiff.models.autoencoder import AttnBlock, Decoder, Encoder

_SCORES_BYTES = 128 << 20
"""Of the attention scores of a slice, which some devices hold in memory."""
INNER_BYTES = 32 << 20
"""Of what a feed-forward layer holds of a slice."""


class SparingEngine(EagerEngine):
    """Runs a model with as little memory as can be, to the same numbers.

    Args:
        model: The model.
        axes: Along which an image goes on at its opposite edge.
    """

    def __init__(self, model: LatentDiffusion, axes: str = "") -> None:
        twin = seamless(model, axes) if axes else twin_of(model)
        for module in drawing_modules(twin):
            for way in _own_ways(module, axes):
                module.forward = way  # type: ignore[method-assign, assignment]
        super().__init__(twin)


def _own_ways(module: nn.Module, axes: str) -> Iterator[object]:
    """What a module of the twin does in place of its own forward, if it does."""
    if isinstance(module, CrossAttention):
        yield partial(_attend, module)
    elif isinstance(module, FeedForward):
        yield partial(_feed, module)
    elif isinstance(module, AttnBlock):
        yield partial(_look_around, module)
    elif isinstance(module, Decoder):
        yield partial(decode_in_strips, module, axes)
    elif isinstance(module, Encoder):
        yield partial(encode_in_strips, module, axes)


def _attend(attention: CrossAttention, x: Tensor, context: Tensor | None = None) -> Tensor:
    context = x if context is None else context
    pairs = ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
    q, k, v = (rearrange(linear(y), "b n (h d) -> b h n d", h=attention.heads) for linear, y in pairs)
    return attention.to_out(rearrange(sliced_attention(q, k, v), "b h n d -> b n (h d)"))


def _feed(feed: FeedForward, x: Tensor) -> Tensor:
    inner = 4 * x.shape[0] * 4 * x.shape[2] * x.element_size()  # value and gate, what GELU makes, and the product
    return torch.cat([feed.net(part) for part in torch.split(x, max(INNER_BYTES // inner, 1), dim=1)], dim=1)


def _look_around(block: AttnBlock, x: Tensor) -> Tensor:
    y = block.norm(x)
    # Channels side by side: torch's attention without scores asks for that.
    q, k, v = (rearrange(conv(y), "b c h w -> b 1 (h w) c").contiguous() for conv in (block.q, block.k, block.v))
    return x + block.proj_out(rearrange(sliced_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2]))


def sliced_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a slice of the queries at a time: (B, heads, N, d), (B, heads, L, d) twice -> (B, heads, N, d)."""
    row = q.shape[0] * q.shape[1] * k.shape[2] * q.element_size()
    parts = torch.split(q, max(_SCORES_BYTES // row, 1), dim=2)
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in parts], dim=2)
