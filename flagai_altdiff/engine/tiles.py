"""Decoding large latents part by part, so that memory grows with the image and not with its feature maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagai_altdiff.sampling.windows import make_windows


def decode_in_tiles(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    *,
    tile: int,
    overlap: int,
    factor: int,
    wraps_y: bool = False,
    wraps_x: bool = False,
) -> Tensor:
    """Decode overlapping tiles, each fading into its neighbours.

    Args:
        decode: (B, C, h, w) -> (B, 3, h * factor, w * factor).
        latents: (B, C, h, w).
        tile: Side of a tile, in cells.
        overlap: Cells that neighbours share.
        factor: Pixels of a cell's side.
        wraps_y: Whether the lower edge goes on at the upper one.
        wraps_x: Whether the right edge goes on at the left one.

    Returns:
        (B, 3, h * factor, w * factor).
    """
    height, width = latents.shape[2:]
    total = latents.new_zeros(len(latents), 3, height * factor, width * factor)
    weight = latents.new_zeros(1, 1, height * factor, width * factor)
    fade = max(overlap, 1) * factor
    for window in make_windows((height, width), tile, max(tile - overlap, 1), wraps_y=wraps_y, wraps_x=wraps_x):
        part = decode(window.cut(latents))
        share = _ramp(part.shape[2], fade, part)[:, None] * _ramp(part.shape[3], fade, part)[None]
        pixels = window.times(factor)
        pixels.add(part * share, total)
        pixels.add(share[None, None], weight)
    return total.div_(weight)


def encode_in_tiles(encode: Callable[[Tensor], Tensor], images: Tensor, *, tile: int, factor: int) -> Tensor:
    """Encode overlapping tiles, each fading into its neighbours.

    Args:
        encode: (B, 3, H, W) -> (B, C, H / factor, W / factor).
        images: (B, 3, H, W).
        tile: Side of a tile, in cells.
        factor: Pixels of a cell's side.

    Returns:
        (B, C, H / factor, W / factor).
    """
    height, width = (side // factor for side in images.shape[2:])
    overlap = max(tile // 4, 1)
    total, weight = None, images.new_zeros(1, 1, height, width)
    for window in make_windows((height, width), tile, tile - overlap):
        part = encode(window.times(factor).cut(images))
        if total is None:
            total = part.new_zeros(len(images), part.shape[1], height, width)
        share = _ramp(part.shape[2], overlap, part)[:, None] * _ramp(part.shape[3], overlap, part)[None]
        window.add(part * share, total)
        window.add(share[None, None], weight)
    assert total is not None
    return total.div_(weight)


def _ramp(length: int, fade: int, like: Tensor) -> Tensor:
    """How much a tile counts along a side, (length,): rising from its edges to 1 within ``fade`` pixels."""
    place = torch.arange(length, device=like.device, dtype=like.dtype)
    return (torch.minimum(place, length - 1 - place).add(1) / fade).clamp(max=1)
