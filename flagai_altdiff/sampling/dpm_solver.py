"""Solvers in the logarithm of the noise: DPM-Solver-2, DPM-Solver++(2M), and their kin with fresh noise.

**Source**: Lu et al. 2022 (arXiv 2206.00927) for DPM-Solver-2, in the variables of Karras et al. 2022 (arXiv
2206.00364), and (arXiv 2211.01095) for DPM-Solver++: 2M is its algorithm 2, the stochastic solvers are in section 5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.sigmas import Denoiser, ancestral_split
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule

_FARTHEST = 4
"""How many times the last step a step may be that a straight line through two predictions is trusted for."""
_MIDDLE = 0.5
"""Where DPM++ SDE looks a second time, as a share of its step."""


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
    return math.inf if alpha == 1 else 0.5 * (math.log(alpha) - math.log1p(-alpha))


def dpm2(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Second order by looking a second time, in the middle of each step; arguments as of :func:`dpmpp_2m`."""
    model = Denoiser(eps, x, schedule)
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        slope = (model.x - pred_x0) / sigma
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            half = model.x + (middle - sigma) * slope
            slope = (half - model(half, middle)) / middle
        model.x = model.x + (sigma_next - sigma) * slope
        yield model.step(i, t, sigma_next, pred_x0)


def dpmpp_sde(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """A solver that looks twice and renews noise twice in each step; arguments as of :func:`dpmpp_2m`."""
    model = Denoiser(eps, x, schedule)
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        if sigma_next == 0:
            model.x = pred_x0
        else:
            middle = math.exp(math.log(sigma) + _MIDDLE * (math.log(sigma_next) - math.log(sigma)))
            between = _towards(model.x, pred_x0, sigma, middle, noise)
            second = model(between, middle)
            weight = 1 / (2 * _MIDDLE)
            model.x = _towards(model.x, (1 - weight) * pred_x0 + weight * second, sigma, sigma_next, noise)
        yield model.step(i, t, sigma_next, pred_x0)


def _towards(x: Tensor, pred_x0: Tensor, sigma: float, sigma_next: float, noise: NoiseFunction) -> Tensor:
    """From one noise to another along a straight line to an image, part of the noise renewed."""
    down, up = ancestral_split(sigma, sigma_next)
    return pred_x0 + down / sigma * (x - pred_x0) + up * noise()


def dpmpp_2m_sde(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """DPM-Solver++(2M) with fresh noise in each step; arguments as of :func:`dpmpp_2m`."""
    model = Denoiser(eps, x, schedule)
    last_x0: Tensor | None = None
    last_h = 0.0
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        if sigma_next == 0:
            model.x = pred_x0
        else:
            h = math.log(sigma / sigma_next)
            weight = -math.expm1(-2 * h)
            estimate = pred_x0
            if last_x0 is not None and h <= _FARTHEST * last_h:
                estimate = pred_x0 + h / (2 * last_h) * (pred_x0 - last_x0)
            kept = sigma_next / sigma * math.exp(-h)
            model.x = kept * model.x + weight * estimate + sigma_next * math.sqrt(weight) * noise()
            last_h = h
        last_x0 = pred_x0
        yield model.step(i, t, sigma_next, pred_x0)
