"""Transformers of the packed engine: keys and values of the text once for a walk, three projections in one product."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.engine.packed_layers import PackedLinear
from flagai_altdiff.models.attention import (
    GEGLU,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    SpatialTransformer,
)
from flagai_altdiff.models.tokens import Merging

_INNER_BYTES = 16 << 20
"""Of what a feed-forward layer makes of its tokens at once: what stays near the processor."""
_SCORES_BYTES = 8 << 20
"""Up to so many bytes of scores, plain products beat torch's attention where keys are as few as those of a text."""


class Context:
    """Text states with the keys and values that attention made of them.

    Args:
        states: (B, L, D).
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._made: dict[nn.Module, Keys] = {}

    def keys(self, attention: CrossAttention) -> Keys:
        """Of one attention."""
        if attention not in self._made:
            k, v = attention.to_k(self.states), attention.to_v(self.states)
            self._made[attention] = Keys(k, v, attention.heads)
        return self._made[attention]


class Keys:
    """Keys and values that are looked at again and again.

    Args:
        k: (B, L, heads * d).
        v: The same.
        heads: Number of heads.
    """

    def __init__(self, k: Tensor, v: Tensor, heads: int) -> None:
        self.count, self.heads = len(k), heads
        self._k, self._v = _by_head(k, heads), _by_head(v, heads).contiguous()
        self._across = (self._k.transpose(2, 3) * self._k.shape[-1] ** -0.5).flatten(0, 1).contiguous()  # (B h, d, L)

    def look(self, q: Tensor) -> Tensor:
        """Queries (B, N, heads * d) -> what they find, (B, N, heads * d)."""
        q = _by_head(q, self.heads)
        if q[..., 0].numel() * self._k.shape[2] * q.element_size() > _SCORES_BYTES:
            return _together(F.scaled_dot_product_attention(q, self._k, self._v))
        scores = torch.bmm(q.flatten(0, 1), self._across)
        return _together(torch.bmm(scores.softmax(dim=-1), self._v.flatten(0, 1)).view_as(q))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _together(x: Tensor) -> Tensor:
    """(B, heads, N, d) -> (B, N, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def as_many(x: Tensor, rows: int) -> Tensor:
    """A batch repeated until it has so many rows."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # which leaves channels together


# What modules of the twin do in place of their own forward; rows of x may be fewer than those of the context.


def transform_map(transformer: SpatialTransformer) -> Callable[..., Tensor]:
    """Of a transformer: (n, C, h, w) and the context of N rows -> (N, C, h, w)."""
    # Linear layers, or convolutions of 1x1, which do the same to tokens.
    proj_in, proj_out = (PackedLinear(layer) for layer in (transformer.proj_in, transformer.proj_out))  # type: ignore[arg-type]

    def forward(x: Tensor, context: Context, merged_tokens: float = 0.0) -> Tensor:
        height, width = x.shape[2:]
        merging = transformer.merging(x, merged_tokens)
        y = proj_in(_tokens(transformer.norm(x)))
        for block in transformer.transformer_blocks:
            y = block(y, context, merging)
        y = proj_out(y, as_many(_tokens(x), len(y)))
        return y.view(len(y), height, width, -1).permute(0, 3, 1, 2)

    return forward


def transform_tokens(block: BasicTransformerBlock) -> Callable[..., Tensor]:
    """Of one of its blocks: (n, L, C) and the context of N rows -> (N, L, C)."""
    own, other = block.attn1, block.attn2
    project, inner = PackedLinear(own.to_q, own.to_k, own.to_v), _feed(block.ff)

    def forward(x: Tensor, context: Context, merging: Merging | None = None) -> Tensor:
        if merging is None:
            q, k, v = (_by_head(y, own.heads) for y in project(block.norm1(x)).chunk(3, dim=-1))
            x = own.to_out[0](_together(F.scaled_dot_product_attention(q, k, v)), x)
        else:
            x = x + block.attend_to_itself(x, merging)
        keys = context.keys(other)
        found = keys.look(as_many(other.to_q(block.norm2(x)), keys.count))
        x = other.to_out[0](found, as_many(x, keys.count))
        return inner(block.norm3(x), x)

    return forward


def _feed(layer: FeedForward) -> Callable[[Tensor, Tensor], Tensor]:
    """Of a feed-forward layer: tokens (N, L, C), and what is added to what they become."""
    geglu, back = layer.net[0], layer.net[2]
    assert isinstance(geglu, GEGLU) and isinstance(back, nn.Linear)
    value = PackedLinear(geglu.proj, rows=slice(back.in_features))
    gate = PackedLinear(geglu.proj, rows=slice(back.in_features, None), activation="gelu")

    def fed(x: Tensor, plus: Tensor) -> Tensor:
        return back(value(x).mul_(gate(x)), plus)

    def forward(x: Tensor, plus: Tensor) -> Tensor:
        rows = max(_INNER_BYTES // (back.in_features * x.element_size()), 1)
        if x.shape[0] * x.shape[1] <= rows:
            return fed(x, plus)
        parts = zip(torch.split(x.flatten(0, 1), rows), torch.split(plus.flatten(0, 1), rows), strict=True)
        return torch.cat([fed(*part) for part in parts]).view_as(plus)

    return forward


def _tokens(x: Tensor) -> Tensor:
    """(N, C, h, w) -> (N, h w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
