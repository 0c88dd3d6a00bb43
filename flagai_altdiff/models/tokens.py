"""Fewer tokens for an attention: those that are most alike are averaged before it, and share what it finds.

**Source**: Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604); one token of each 2x2
cell stays, as there, and which one is the same in every call, so that a picture can be drawn again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_MERGED = 0.75
"""Share of the tokens that have a partner: all but one of each cell."""
_AT_ONCE = 1 << 23
"""Likenesses of a row that are in memory together."""


@dataclass(frozen=True)
class Merging:
    """How tokens of a map are merged.

    Args:
        share: Of all tokens, how many go; at most ``MOST_MERGED``.
        height: Of the map, in tokens.
        width: Of the map, in tokens.
    """

    share: float
    height: int
    width: int

    def around(self, attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Self-attention among fewer tokens, (B, N, D) -> (B, N, D)."""
        staying, others = (places.to(x.device) for places in _places(self.height, self.width))
        targets, sources = x[:, staying], x[:, others]
        nearest, order = _by_likeness(sources, targets)
        count = min(int(x.shape[1] * self.share), len(others))
        merged, own = order[:, :count], order[:, count:]
        partners = nearest.gather(1, merged)
        mean = targets.scatter_reduce(1, _wide(partners, x), sources.gather(1, _wide(merged, x)), "mean")
        found = attention(torch.cat([mean, sources.gather(1, _wide(own, x))], dim=1))
        of_targets, of_own = found[:, : len(staying)], found[:, len(staying) :]
        of_sources = torch.empty_like(sources, dtype=found.dtype)
        of_sources.scatter_(1, _wide(own, x), of_own)
        of_sources.scatter_(1, _wide(merged, x), of_targets.gather(1, _wide(partners, x)))
        whole = torch.empty_like(x, dtype=found.dtype)
        whole[:, staying], whole[:, others] = of_targets, of_sources
        return whole


def _wide(places: Tensor, x: Tensor) -> Tensor:
    """Places (B, n) for all features of (B, N, D)."""
    return places[..., None].expand(-1, -1, x.shape[2])


def _by_likeness(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of each source the target that it is most like, and the sources in order, those that lose least first: (B, n)."""
    sources, targets = F.normalize(sources, dim=-1), F.normalize(targets, dim=-1).transpose(1, 2)
    parts = torch.split(sources, max(1, _AT_ONCE // targets.shape[2]), dim=1)  # type: ignore[no-untyped-call]
    best, nearest = (
        torch.cat(found, dim=1) for found in zip(*((part @ targets).max(dim=-1) for part in parts), strict=True)
    )
    return nearest, best.argsort(dim=-1, descending=True, stable=True)


@lru_cache(maxsize=16)
def _places(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens that stay, one of each 2x2 cell, and of all others."""
    down, along = height // 2, width // 2
    chosen = torch.randint(4, (down, along), generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    rows = 2 * torch.arange(down, device="cpu")[:, None] + chosen // 2
    columns = 2 * torch.arange(along, device="cpu") + chosen % 2
    stays = torch.zeros(height * width, dtype=torch.bool, device="cpu")
    stays[(rows * width + columns).flatten()] = True
    return stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
