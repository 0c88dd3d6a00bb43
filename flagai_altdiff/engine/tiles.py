"""Decoding and encoding part by part, so that memory grows with the image and not with its feature maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from flagai_altdiff.sampling.windows import Window, make_windows


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
    cells = latents.shape[2:]
    windows = make_windows(cells, tile, max(tile - overlap, 1), wraps_y=wraps_y, wraps_x=wraps_x)
    parts = ((window.times(factor), decode(window.cut(latents))) for window in windows)
    return _blended(parts, [side * factor for side in cells], max(overlap, 1) * factor)


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
    cells, overlap = [side // factor for side in images.shape[2:]], max(tile // 4, 1)
    windows = make_windows(cells, tile, max(tile - overlap, 1))
    return _blended(((window, encode(window.times(factor).cut(images))) for window in windows), cells, overlap)


def _blended(parts: Iterable[tuple[Window, Tensor]], shape: Sequence[int], fade: int) -> Tensor:
    """One map from overlapping parts of it.

    Args:
        parts: Places and what is there, (B, C, h, w).
        shape: (H, W) of the whole.
        fade: From a part's edge so far, it counts less.
    """
    total = weight = torch.zeros(())
    for window, part in parts:
        if not total.shape:
            total, weight = part.new_zeros(*part.shape[:2], *shape), part.new_zeros(1, 1, *shape)
        share = _ramp(part.shape[2], fade, part)[:, None] * _ramp(part.shape[3], fade, part)[None]
        window.add(part * share, total)
        window.add(share[None, None], weight)
    return total.div_(weight)


def _ramp(length: int, fade: int, like: Tensor) -> Tensor:
    """How much a tile counts along a side, (length,): rising from its edges to 1 within ``fade`` pixels."""
    place = torch.arange(length, device=like.device, dtype=like.dtype)
    return (torch.minimum(place, length - 1 - place).add(1) / fade).clamp(max=1)
