"""The autoencoder a strip of rows at a time: what it gives as a whole, to rounding, in less than a third of the memory.

A norm needs the mean and the variance of a whole feature map, so the layers are taken one after the other: statistics
of all strips first, then strip by strip the norm and the convolution, each with the row above and the row below. A
strip is given up, or written over, when the next one is begun: a map and the one made of it never stand side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.models.autoencoder import Decoder, Downsample, Encoder, Level, Middle, ResnetBlock

Strips = deque[Tensor]
"""Rows of a feature map of one image, (1, C, rows, W) each, from top to bottom."""
Change = Callable[[Tensor], Tensor]

STRIP_BYTES = 4 << 20
"""Of a strip; a layer takes some six times as much beside the maps that it reads and writes."""


def decode_in_strips(decoder: Decoder, axes: str, z: Tensor) -> Tensor:
    """What a decoder gives, image by image.

    Args:
        decoder: The decoder.
        axes: Along which an image goes on at its opposite edge: ``""``, ``"x"``, ``"y"`` or ``"xy"``.
        z: (B, z_channels, h, w).

    Returns:
        (B, 3, H, W).
    """
    work = _Work(axes)

    def decoded(z: Tensor) -> Tensor:
        x = work.middle(decoder.mid, deque(work.convolved(deque([z]), decoder.conv_in)))
        for level in reversed(decoder.up):
            x = work.level(level, x)  # type: ignore[arg-type]
        return work.finished(x, decoder.norm_out, decoder.conv_out)

    return torch.cat([decoded(one) for one in torch.split(z, 1)])


def encode_in_strips(encoder: Encoder, axes: str, images: Tensor) -> Tensor:
    """What an encoder gives, image by image.

    Args:
        encoder: The encoder.
        axes: As of :func:`decode_in_strips`.
        images: (B, 3, H, W).

    Returns:
        (B, 2 z_channels, h, w).
    """
    work = _Work(axes)

    def encoded(image: Tensor) -> Tensor:
        x = deque(work.convolved(_cut(deque([image]), encoder.conv_in.out_channels), encoder.conv_in))
        for level in encoder.down:
            x = work.level(level, x)  # type: ignore[arg-type]
        return work.finished(work.middle(encoder.mid, x), encoder.norm_out, encoder.conv_out)

    return torch.cat([encoded(one) for one in torch.split(images, 1)])


class _Work:
    """Layers, each from strips to strips. The strips that one is given are used up.

    Args:
        axes: Along which an image goes on at its opposite edge.
    """

    def __init__(self, axes: str) -> None:
        self._axes = axes

    def level(self, level: Level, x: Strips) -> Strips:
        """Blocks, attention where there is any, and the change of resolution."""
        for i, block in enumerate(level.block):
            x = self.block(block, x)  # type: ignore[arg-type]
            if level.attn:
                x = _as_a_whole(level.attn[i], x)
        if hasattr(level, "upsample"):
            return self.upsampled(x, level.upsample.conv)
        return self.downsampled(x, level.downsample) if hasattr(level, "downsample") else x

    def middle(self, middle: Middle, x: Strips) -> Strips:
        """Residual block, attention, residual block."""
        return self.block(middle.block_2, _as_a_whole(middle.attn_1, self.block(middle.block_1, x)))

    def block(self, block: ResnetBlock, x: Strips) -> Strips:
        """Two convolutions around a shortcut."""
        x = _cut(x, max(block.conv1.in_channels, block.conv1.out_channels))
        shortcuts, y = Strips(), Strips()
        changes = hasattr(block, "nin_shortcut")
        for strip, inner in self._convolved(x, block.conv1, _norm(block.norm1, x)):
            shortcut, inner = _in_place_of(strip, block.nin_shortcut(strip), inner) if changes else (strip, inner)
            shortcuts.append(shortcut)
            y.append(inner)
        del strip, shortcut, inner
        outer = self.convolved(y, block.conv2, _norm(block.norm2, y))
        if changes:
            return deque(part.add_(shortcuts.popleft()) for part in outer)
        return deque(shortcuts.popleft().add_(part) for part in outer)

    def upsampled(self, x: Strips, conv: nn.Conv2d) -> Strips:
        """Twice the rows and columns, and a convolution."""
        return deque(out for _, out in self._convolved(_cut(x, 4 * conv.out_channels), conv, _doubled, scale=2))

    def downsampled(self, x: Strips, down: Downsample) -> Strips:
        """Half the rows and columns: padded on the right and below only, whatever the axes."""
        x = _joined(x) if any(strip.shape[2] % 2 for strip in x) else x
        x = _cut(x, down.conv.in_channels)
        made = Strips()
        while x:
            strip = x.popleft()
            rows = torch.cat([strip, x[0][:, :, :1]], dim=2) if x else F.pad(strip, (0, 0, 0, 1))
            made.append(F.conv2d(F.pad(rows, (0, 1)), down.conv.weight, down.conv.bias, stride=2))
        return made

    def finished(self, x: Strips, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
        """The last norm and convolution, as a whole."""
        return torch.cat([*self.convolved(x, conv, _norm(norm, x))], dim=2)

    def convolved(self, x: Strips, conv: nn.Conv2d, change: Change | None = None) -> Iterator[Tensor]:
        """A 3x3 convolution of what ``change`` makes of the strips."""
        return (out for _, out in self._convolved(x, conv, change))

    def _convolved(
        self, x: Strips, conv: nn.Conv2d, change: Change | None = None, scale: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, with each strip as it was; ``change`` makes ``scale`` times as many rows."""
        goes_on = "y" in self._axes
        first, above = x[0][:, :, :1].clone(), x[-1][:, :, -1:].clone() if goes_on else None
        while x:
            strip = x.popleft()
            below = x[0][:, :, :1] if x else first if goes_on else None
            rows = torch.cat([part for part in (above, strip, below) if part is not None], dim=2)
            rows = change(rows) if change else rows
            top, bottom = (0 if part is None else scale - 1 for part in (above, below))
            rows = rows[:, :, top : rows.shape[2] - bottom]
            rows = F.pad(rows, (0, 0, int(above is None), int(below is None)))
            above = strip[:, :, -1:].clone()
            yield strip, self._of_rows(rows.to(conv.weight.dtype), conv)

    def _of_rows(self, rows: Tensor, conv: nn.Conv2d) -> Tensor:
        """A 3x3 convolution of rows that have their neighbours."""
        rows = F.pad(rows, (1, 1, 0, 0), mode="circular" if "x" in self._axes else "constant")
        return F.conv2d(rows, conv.weight, conv.bias)


def _doubled(rows: Tensor) -> Tensor:
    return F.interpolate(rows, scale_factor=2.0, mode="nearest")


def _as_a_whole(layer: nn.Module, x: Strips) -> Strips:
    return deque([layer(_joined(x).pop())])


def _joined(x: Strips) -> Strips:
    """All rows in one."""
    whole = torch.cat([*x], dim=2)
    x.clear()
    return deque([whole])


def _in_place_of(strip: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two strips in the memory of one that is not needed any more, if they are as large together."""
    made = first.shape[1]
    if strip.shape[1] != 2 * made or not strip.dtype == first.dtype == second.dtype:
        return first, second
    strip[:, :made], strip[:, made:] = first, second
    return strip[:, :made], strip[:, made:]


def _cut(x: Strips, channels: int) -> Strips:
    """Strips of no more than so many bytes at a width of ``channels``; of an even number of rows."""
    row = channels * x[0].shape[3] * x[0].element_size()
    rows = max(STRIP_BYTES // row // 2 * 2, 2)
    made = Strips()
    while x:
        made.extend(torch.split(x.popleft(), rows, dim=2))
    return made


def _norm(norm: nn.GroupNorm, x: Strips) -> Change:
    """SiLU of a norm, whose statistics are those of all strips together."""
    groups = norm.num_groups
    by_group = (rearrange(_full(part), "1 (g c) h w -> g (c h w)", g=groups) for part in x)
    found = [torch.var_mean(part, 1, correction=0) for part in by_group]
    shares = torch.tensor([part.shape[2] for part in x], dtype=torch.float64)
    shares = (shares / shares.sum()).to(x[0].device if x[0].device.type != "mps" else "cpu")[:, None]
    variances, means = (torch.stack(values).to(shares.device).double() for values in zip(*found, strict=True))
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    each = x[0].shape[1] // groups
    like = _full(x[0][:, :0])
    rstd, mean = (value.repeat_interleave(each).to(like) for value in ((variance + norm.eps).rsqrt(), mean))
    factor = (norm.weight * rstd)[:, None, None]
    shift = norm.bias[:, None, None] - mean[:, None, None] * factor
    return lambda rows: F.silu(torch.addcmul(shift, _full(rows), factor), inplace=True)


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
