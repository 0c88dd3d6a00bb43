"""DDIM. **Source**: Song et al. 2021 (arXiv 2010.02502), equations 12 and 16; draws as in FlagAI's DDIMSampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


def ddim_step(
    x: Tensor, eps: Tensor, alpha: float, alpha_prev: float, noise: Tensor | None = None, sigma: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step of equation 12.

    Args:
        x: (B, C, h, w).
        eps: (B, C, h, w), predicted noise.
        alpha: Signal power of x.
        alpha_prev: Signal power after the step.
        noise: (B, C, h, w), fresh noise; may be left out when sigma is 0.
        sigma: Standard deviation of the fresh noise.

    Returns:
        The latent after the step, and the predicted clean latent.
    """
    pred_x0 = (x - math.sqrt(1.0 - alpha) * eps) / math.sqrt(alpha)
    x_prev = math.sqrt(alpha_prev) * pred_x0 + math.sqrt(max(1.0 - alpha_prev - sigma**2, 0.0)) * eps
    return (x_prev if noise is None else x_prev + sigma * noise), pred_x0


def ddim(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction, eta: float = 0.0) -> Iterator[Step]:
    """Walk from noise to image with eta times the noise of ancestral sampling.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Called once a step, also with eta 0: the original draws there too, and later images depend on it.
        eta: 0 is deterministic, 1 ancestral.

    Yields:
        One Step per timestep.
    """
    for i, t, alpha, alpha_prev in schedule:
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))  # eq. 16
        x, pred_x0 = ddim_step(x, eps(x, t), alpha, alpha_prev, noise(), sigma)
        yield Step(i, len(schedule), t, x, pred_x0)
