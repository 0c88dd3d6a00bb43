"""DPM-Solver++(2M). **Source**: Lu et al. 2022 (arXiv 2211.01095), algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


def dpmpp_2m(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image with a second-order multistep solver; 20 to 25 steps do the work of 50.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Not called: the solver is deterministic.

    Yields:
        One Step per timestep.
    """
    last_x0: Tensor | None = None
    last_h = 0.0
    for i, t, alpha, alpha_prev in schedule:
        pred_x0 = (x - math.sqrt(1 - alpha) * eps(x, t)) / math.sqrt(alpha)
        h = _half_log_snr(alpha_prev) - _half_log_snr(alpha)
        if last_x0 is None or h > 2 * last_h:  # no history, or too short a one to extrapolate so far (the grid's end)
            estimate = pred_x0
        else:
            r = last_h / h
            estimate = (1 + 1 / (2 * r)) * pred_x0 - 1 / (2 * r) * last_x0
        x = math.sqrt((1 - alpha_prev) / (1 - alpha)) * x - math.sqrt(alpha_prev) * math.expm1(-h) * estimate
        last_x0, last_h = pred_x0, h
        yield Step(i, len(schedule), t, x, pred_x0)


def _half_log_snr(alpha: float) -> float:
    """lambda of the paper: log of signal over noise amplitude."""
    return 0.5 * (math.log(alpha) - math.log1p(-alpha))
