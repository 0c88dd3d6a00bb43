"""The denoising UNet with cross-attention, in both published shapes.

Attribute names are the keys of the released checkpoints (``model.diffusion_model.*``).

**Source**: Rombach et al. 2022 (arXiv 2112.10752); Dhariwal and Nichol 2021 (arXiv 2105.05233) for the residual blocks.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.config import UNetConfig
from flagai_altdiff.models.attention import SpatialTransformer
from flagai_altdiff.models.layers import Upsample
from flagai_altdiff.models.shortcuts import NONE, Shortcuts

OUTER = 1
"""So many blocks at each end of the UNet are computed in every step; those between them may be known from another."""


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of the timestep, cosines first.

    Args:
        timesteps: (B,), integer or fractional.
        dim: Number of features; an odd one is padded with a zero.
        max_period: Longest period, in timesteps.

    Returns:
        (B, dim), float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies[None]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them."""

    def __init__(self, channels: int, emb_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, h, w), (B, emb_channels) -> (B, out_channels, h, w)."""
        y = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(y)


class Downsample(nn.Module):
    """Strided convolution: half the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, ceil(h/2), ceil(w/2))."""
        return self.op(x)


class Block(nn.Sequential):
    """Layers of one step down or up; each takes what it needs of the time embedding and the text."""

    def forward(  # type: ignore[override]
        self, x: Tensor, emb: Tensor, context: Tensor, merged_tokens: float = 0.0
    ) -> Tensor:
        """(B, C, h, w), (B, E), (B, L, D) [, share of tokens to merge] -> (B, C', h', w')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, merged_tokens)
            else:
                x = layer(x)
        return x


class UNetModel(nn.Module):
    """Predicts the noise (or v, or x0) of a latent from its timestep and the text.

    Args:
        config: Sizes; the defaults of :class:`UNetConfig` are those of AltDiffusion and AltDiffusion-m9.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        emb_channels = 4 * width
        self.time_embed = nn.Sequential(
            nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )

        def res_block(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, emb_channels, out_channels, config.norm_groups)

        def transformer(channels: int) -> SpatialTransformer:
            heads = config.heads(channels)
            return SpatialTransformer(
                channels,
                heads,
                channels // heads,
                config.transformer_depth,
                config.context_dim,
                config.use_linear_in_transformer,
                config.norm_groups,
                sees_most=downsampling == min(config.attention_resolutions, default=1),
            )

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        channels, downsampling = width, 1
        skips = [channels]
        for level, mult in enumerate(config.channel_mult):
            for _ in range(config.num_res_blocks):
                layers: list[nn.Module] = [res_block(channels, mult * width)]
                channels = mult * width
                if downsampling in config.attention_resolutions:
                    layers.append(transformer(channels))
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level + 1 < len(config.channel_mult):
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)
                downsampling *= 2

        self.middle_block = Block(res_block(channels, channels), transformer(channels), res_block(channels, channels))

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                layers = [res_block(channels + skips.pop(), mult * width)]
                channels = mult * width
                if downsampling in config.attention_resolutions:
                    layers.append(transformer(channels))
                if level and i == config.num_res_blocks:
                    layers.append(Upsample(channels))
                    downsampling //= 2
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            nn.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, config.out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), (B, L, context_dim) [, what is left out] -> (B, out_channels, h, w)."""
        emb = self.time_embed(timestep_embedding(timesteps, self.config.model_channels).to(x.dtype))
        context = context.to(x.dtype)
        merged = shortcuts.merged_tokens
        skips = []
        for block in [*self.input_blocks][:OUTER]:
            x = block(x, emb, context, merged)
            skips.append(x)
        x = shortcuts.inner(len(context), lambda: self._inner(x, emb, context, merged))
        for block in [*self.output_blocks][-OUTER:]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context, merged)
        return self.out(x)

    def _inner(self, x: Tensor, emb: Tensor, context: Tensor, merged: float) -> Tensor:
        """What lies between the outer blocks, (B, C, h, w) -> (B, C', h, w)."""
        skips = []
        for block in [*self.input_blocks][OUTER:]:
            x = block(x, emb, context, merged)
            skips.append(x)
        x = self.middle_block(x, emb, context, merged)
        for block in [*self.output_blocks][:-OUTER]:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context, merged)
        return x
