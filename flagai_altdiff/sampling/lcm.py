"""Sampling from consistency models. **Source**: Luo et al. 2023 (arXiv 2310.04378), algorithm 3."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


def lcm(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Predict the image, make it noisy anew, and so on; for models that were distilled for it, in 2 to 8 steps.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Called once a step, but not for the last.

    Yields:
        One Step per timestep.
    """
    for i, t, alpha, alpha_prev in schedule:
        pred_x0 = (x - math.sqrt(1 - alpha) * eps(x, t)) / math.sqrt(alpha)
        x = math.sqrt(alpha_prev) * pred_x0
        if i < len(schedule) - 1:
            x = x + math.sqrt(1 - alpha_prev) * noise()
        yield Step(i, len(schedule), t, x, pred_x0)
