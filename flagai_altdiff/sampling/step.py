"""What samplers take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flagai_altdiff.sampling.schedule import Schedule

EpsFunction = Callable[[Tensor, int], Tensor]
"""(x (B, C, h, w), timestep) -> predicted noise (B, C, h, w)."""

NoiseFunction = Callable[[], Tensor]
"""() -> standard normal (B, C, h, w)."""


@dataclass(frozen=True)
class Step:
    """State after one sampler step.

    Args:
        index: 0-based number of the step.
        total: Number of steps.
        t: Timestep that the step started from.
        x: (B, C, h, w), the latent after the step.
        pred_x0: (B, C, h, w), the clean latent that the step believed in.
    """

    index: int
    total: int
    t: int
    x: Tensor
    pred_x0: Tensor


class Sampler(Protocol):
    """The shape of every sampler; ``eta`` is the share of fresh noise and only DDIM has it."""

    def __call__(
        self, eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction, eta: float = 0.0
    ) -> Iterator[Step]:
        """Walk ``x`` (B, C, h, w), pure noise, along ``schedule``."""
        ...
