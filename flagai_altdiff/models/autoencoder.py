"""The KL autoencoder between images and latents.

Attribute names are the keys of the released checkpoints (``first_stage_model.*``).

**Source**: Esser et al. 2021 (arXiv 2012.09841) for the network; Rombach et al. 2022, appendix G, for the KL variant.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.config import AutoencoderConfig
from flagai_altdiff.models.layers import Upsample


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out_channels, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class AttnBlock(nn.Module):
    """Single-head self-attention over the pixels of a feature map."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        y = self.norm(x)
        q, k, v = (rearrange(conv(y), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        y = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(y)


class Downsample(nn.Module):
    """Strided convolution, padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each where configured, and a change of resolution."""

    def __init__(self, channels: list[int], attention: bool, groups: int, resample: str | None) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(ResnetBlock(i, o, groups) for i, o in pairs)
        self.attn = nn.ModuleList(AttnBlock(o, groups) for _, o in pairs) if attention else nn.ModuleList()
        if resample == "downsample":
            self.downsample = Downsample(channels[-1])
        elif resample == "upsample":
            self.upsample = Upsample(channels[-1])
        self._resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.get_submodule(self._resample)(x) if self._resample else x


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Picture -> moments of the latent, before ``quant_conv``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels, last = config.ch, len(widths) - 1
        for level, width in enumerate(widths):
            attention = config.resolution // 2**level in config.attn_resolutions
            chain = [channels] + [width] * config.num_res_blocks
            self.down.append(Level(chain, attention, groups, "downsample" if level < last else None))
            channels = width
        self.mid = Middle(channels, groups)
        self.norm_out = _norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 z_channels, h, w)."""
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latent after ``post_quant_conv`` -> image."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        groups, widths = config.norm_groups, [config.ch * m for m in config.ch_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels: list[Level] = []
        for level, width in reversed(list(enumerate(widths))):
            attention = config.resolution // 2**level in config.attn_resolutions
            chain = [channels] + [width] * (config.num_res_blocks + 1)
            levels.append(Level(chain, attention, groups, "upsample" if level else None))
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # checkpoints number the levels from the image down
        self.norm_out = _norm(channels, groups)
        self.conv_out = nn.Conv2d(channels, config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, z_channels, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DiagonalGaussianDistribution:
    """Posterior of an image's latent.

    Args:
        moments: (B, 2 C, h, w): means, then log-variances (clamped to [-30, 20]).
    """

    def __init__(self, moments: Tensor) -> None:
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, (B, C, h, w); from the global generator unless one is given."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self) -> Tensor:
        """The mean, (B, C, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """Divergence from the standard normal, (B,), in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class AutoencoderKL(nn.Module):
    """Encoder and decoder with the 1x1 convolutions around the latent.

    Args:
        config: Sizes; the defaults of :class:`AutoencoderConfig` are those of all released models.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """(B, 3, H, W) in [-1, 1] -> posterior over (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w) -> (B, 3, h*f, w*f), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """(B, 3, H, W) -> reconstruction of a posterior sample, and the posterior."""
        posterior = self.encode(x)
        return self.decode(posterior.sample()), posterior
