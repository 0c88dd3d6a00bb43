"""Euler's method, Heun's, and Euler with renewed noise.

**Source**: Karras et al. 2022 (arXiv 2206.00364), algorithm 1 without its noise; Song et al. 2021 for the renewed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.sigmas import Denoiser, ancestral_split
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


def euler(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image in straight lines; DDIM without fresh noise, in other variables.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Not called.

    Yields:
        One Step per timestep.
    """
    model = Denoiser(eps, x, schedule)
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        model.x = pred_x0 + sigma_next / sigma * (model.x - pred_x0)
        yield model.step(i, t, sigma_next, pred_x0)


def heun(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Second order by the mean of the slopes at both ends of a step; arguments as of :func:`euler`."""
    model = Denoiser(eps, x, schedule)
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        slope = (model.x - pred_x0) / sigma
        if sigma_next > 0:
            end = model.x + (sigma_next - sigma) * slope
            slope = (slope + (end - model(end, sigma_next)) / sigma_next) / 2
        model.x = model.x + (sigma_next - sigma) * slope
        yield model.step(i, t, sigma_next, pred_x0)


def euler_ancestral(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image, renewing part of the noise in every step; ``noise`` is called once a step."""
    model = Denoiser(eps, x, schedule)
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        down, up = ancestral_split(sigma, sigma_next)
        model.x = pred_x0 + down / sigma * (model.x - pred_x0) + up * noise()
        yield model.step(i, t, sigma_next, pred_x0)
