"""A walk in the variables of Karras et al.: the latent per unit of signal, and sigma, the noise in it.

**Source**: Karras et al. 2022 (arXiv 2206.00364), whose equations become those of the other samplers by a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.levels import alpha_of, sigma_of
from flagai_altdiff.sampling.step import EpsFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule


class Denoiser:
    """Says which image a noisy latent comes from. Iterating gives (number, timestep, sigma, sigma after the step).

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), the noisy latent at the walk's beginning, as the model takes it.
        schedule: The walk.

    Attributes:
        x: (B, C, h, w), the latent per unit of signal, to be moved by the sampler.
    """

    def __init__(self, eps: EpsFunction, x: Tensor, schedule: Schedule) -> None:
        self._eps, self._schedule = eps, schedule
        self.x = x / math.sqrt(schedule.alphas[0])

    def __iter__(self) -> Iterator[tuple[int, float, float, float]]:
        for i, t, alpha, alpha_prev in self._schedule:
            yield i, t, sigma_of(alpha), sigma_of(alpha_prev)

    def __call__(self, x: Tensor, sigma: float, t: float | None = None) -> Tensor:
        """The image without noise, (B, C, h, w).

        Args:
            x: (B, C, h, w), per unit of signal.
            sigma: Its noise.
            t: The timestep of this noise, where it is known.
        """
        t = self._schedule.levels.timestep(sigma) if t is None else t
        return x - sigma * self._eps(x * math.sqrt(alpha_of(sigma)), t)

    def step(self, number: int, t: float, sigma: float, pred_x0: Tensor) -> Step:
        """The state after a step, as the model takes it."""
        return Step(number, len(self._schedule), t, self.x * math.sqrt(alpha_of(sigma)), pred_x0)


def ancestral_split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The noise to go down to, and the fresh noise to add so that there is as much as the step should end with."""
    up = min(sigma_next, sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up
