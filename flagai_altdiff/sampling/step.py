"""What samplers take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EpsFunction = Callable[["Tensor", float], "Tensor"]
"""(x (B, C, h, w), timestep, which may lie between two whole ones) -> predicted noise (B, C, h, w)."""

NoiseFunction = Callable[[], "Tensor"]
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
    t: float
    x: Tensor
    pred_x0: Tensor


GRIDS = ("flagai", "trailing", "uniform", "karras", "exponential")
"""How the steps of a walk are placed; see ``Schedule.make``."""

Sampler = Callable[..., Iterator[Step]]
"""``(eps, x, schedule, *, noise)``, and ``eta`` where the sampler takes it; ``x`` (B, C, h, w) is pure noise."""


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler and what people must know of it.

    Args:
        function: The generator function.
        title: Its name as other programs write it into images.
        takes_eta: Whether it has ``eta``, the share of fresh noise.
        is_random: Whether it draws fresh noise in its steps, whatever ``eta`` says.
        order: Of convergence: an error of a step's size, its square ...; 0 where it does not converge to one image.
    """

    function: Sampler
    title: str
    takes_eta: bool = False
    is_random: bool = False
    order: int = 1

    def walk(
        self, eps: EpsFunction, x: Tensor, schedule: Any, *, noise: NoiseFunction, eta: float = 0.0
    ) -> Iterator[Step]:
        """Call the sampler; ``eta`` reaches only one that takes it."""
        own = {"eta": eta} if self.takes_eta else {}
        return self.function(eps, x, schedule, noise=noise, **own)
