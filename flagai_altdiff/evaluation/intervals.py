"""How sure a number is: intervals from resampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CONFIDENCE = 0.95
_FEWEST = 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured number.

    Args:
        value: The number.
        low: Lower end of its interval; ``None`` where it has none.
        high: Upper end.
        count: From how many images, texts or prompts.
    """

    value: float
    low: float | None = None
    high: float | None = None
    count: int


def estimate(
    statistic: Callable[[Tensor], float],
    count: int,
    replicates: int,
    seed: int,
    key: str,
    *,
    width: int = 1,
    at_least: float | None = None,
) -> Estimate:
    """A statistic and its bootstrap interval: percentiles of what it is for resampled rows.

    Args:
        statistic: Rows (an index tensor) -> the number.
        count: Number of rows.
        replicates: How often is resampled; 0 gives no interval.
        seed: Seed of the resampling.
        key: What is measured; every key has random numbers of its own.
        width: Rows that come together, as the images of one prompt do; ``count`` is a multiple of it.
        at_least: For a statistic that hangs on the number of different rows, as a distance does: its smallest value.
            Resampling repeats rows, so that the percentiles alone would lie beside the value; they are moved so that
            the mean of the resampled lies on it.
    """
    value = statistic(torch.arange(count))
    groups = count // width
    if replicates < 1 or groups < _FEWEST:
        return Estimate(value=value, count=count)
    rng = np.random.default_rng([seed, *key.encode()])
    values = np.array([statistic(_rows(rng, groups, width)) for _ in range(replicates)])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    if at_least is not None:
        low, high = (max(end + value - np.nanmean(values), at_least) for end in (low, high))
    return Estimate(value=value, low=float(low), high=float(high), count=count)


def _rows(rng: np.random.Generator, groups: int, width: int) -> Tensor:
    chosen = torch.from_numpy(rng.integers(0, groups, groups))
    return (chosen[:, None] * width + torch.arange(width)).flatten()
