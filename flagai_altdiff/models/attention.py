"""Attention blocks of the UNet: cross-attention, GEGLU feed-forward and the spatial transformer.

Attribute names are the keys of the released checkpoints.

**Source**: Rombach et al. 2022 (arXiv 2112.10752), section 3.3 and appendix E.2.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.models.tokens import Merging


class CrossAttention(nn.Module):
    """Multi-head attention of ``x`` over ``context``, or over itself without one.

    Args:
        query_dim: Width of ``x``.
        context_dim: Width of the context; ``None`` for self-attention.
        heads: Number of heads.
        dim_head: Width of a head.
    """

    def __init__(self, query_dim: int, context_dim: int | None, heads: int, dim_head: int) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, N, query_dim) [, (B, L, context_dim)] -> (B, N, query_dim)."""
        context = x if context is None else context
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """Gated linear unit with the exact (erf) GELU. **Source**: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU, then a linear map back; four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, dim: int, heads: int, dim_head: int, context_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, heads, dim_head)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim_head)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor, merging: Merging | None = None) -> Tensor:
        """(B, N, dim), (B, L, context_dim) [, how tokens are merged] -> (B, N, dim)."""
        x = x + self.attend_to_itself(x, merging)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))

    def attend_to_itself(self, x: Tensor, merging: Merging | None) -> Tensor:
        """What self-attention adds, (B, N, dim)."""
        y = self.norm1(x)
        return self.attn1(y) if merging is None else merging.around(self.attn1, y)


class SpatialTransformer(nn.Module):
    """Transformer over the pixels of a feature map, conditioned on the text.

    Args:
        in_channels: Channels of the feature map.
        heads: Number of heads.
        dim_head: Width of a head.
        depth: Number of transformer blocks.
        context_dim: Width of the text states.
        use_linear: Project with linear layers (m18) instead of 1x1 convolutions (m9, AltDiffusion).
        norm_groups: Groups of the entry norm.
        sees_most: Whether no transformer of the UNet sees a larger map; then tokens can be merged.
    """

    def __init__(
        self,
        in_channels: int,
        heads: int,
        dim_head: int,
        depth: int,
        context_dim: int,
        use_linear: bool,
        norm_groups: int,
        sees_most: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        self.sees_most = sees_most
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(norm_groups, in_channels, eps=1e-6)
        self.proj_in: nn.Module
        self.proj_out: nn.Module
        if use_linear:
            self.proj_in, self.proj_out = nn.Linear(in_channels, inner_dim), nn.Linear(inner_dim, in_channels)
        else:
            self.proj_in, self.proj_out = nn.Conv2d(in_channels, inner_dim, 1), nn.Conv2d(inner_dim, in_channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner_dim, heads, dim_head, context_dim) for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Tensor, merged_tokens: float = 0.0) -> Tensor:
        """(B, C, h, w), (B, L, context_dim) [, share of tokens to merge] -> (B, C, h, w)."""
        height = x.shape[2]
        merging = self.merging(x, merged_tokens)
        y = self.norm(x)
        if not self.use_linear:
            y = self.proj_in(y)
        y = rearrange(y, "b c h w -> b (h w) c")
        if self.use_linear:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, context, merging)
        if self.use_linear:
            y = self.proj_out(y)
        y = rearrange(y, "b (h w) c -> b c h w", h=height)
        if not self.use_linear:
            y = self.proj_out(y)
        return x + y

    def merging(self, x: Tensor, share: float) -> Merging | None:
        """How tokens of a map (B, C, h, w) are merged here, if they are."""
        has_cells = min(x.shape[2:]) > 1
        return Merging(share, x.shape[2], x.shape[3]) if share and self.sees_most and has_cells else None
