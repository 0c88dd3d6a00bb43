"""Euler ancestral. **Source**: Karras et al. 2022 (arXiv 2206.00364) for the variables; Song et al. 2021 for the
noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


def euler_ancestral(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image, renewing part of the noise in every step.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Called once a step.

    Yields:
        One Step per timestep.
    """
    for i, t, alpha, alpha_prev in schedule:
        prediction = eps(x, t)
        pred_x0 = (x - math.sqrt(1 - alpha) * prediction) / math.sqrt(alpha)
        # Noise per unit of signal before and after; sigma_down**2 + sigma_up**2 = sigma_prev**2.
        sigma, sigma_prev = (math.sqrt((1 - a) / a) for a in (alpha, alpha_prev))
        sigma_up = min(sigma_prev, sigma_prev * math.sqrt(1 - (sigma_prev / sigma) ** 2))
        sigma_down = math.sqrt(sigma_prev**2 - sigma_up**2)
        x = math.sqrt(alpha_prev) * (pred_x0 + sigma_down * prediction + sigma_up * noise())
        yield Step(i, len(schedule), t, x, pred_x0)
