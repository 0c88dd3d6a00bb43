"""What samplers take and give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EpsFunction = Callable[["Tensor", int], "Tensor"]
"""(x (B, C, h, w), timestep) -> predicted noise (B, C, h, w)."""

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
    t: int
    x: Tensor
    pred_x0: Tensor


Sampler = Callable[..., Iterator[Step]]
"""``(eps, x, schedule, *, noise)``, and ``eta`` where the sampler takes it; ``x`` (B, C, h, w) is pure noise."""


@dataclass(frozen=True)
class SamplerSpec:
    """A sampler and what people must know of it.

    Args:
        function: The generator function.
        title: Its name as other programs write it into images.
        takes_eta: Whether it has ``eta``, the share of fresh noise.
    """

    function: Sampler
    title: str
    takes_eta: bool = False

    def walk(
        self, eps: EpsFunction, x: Tensor, schedule: Any, *, noise: NoiseFunction, eta: float = 0.0
    ) -> Iterator[Step]:
        """Call the sampler; ``eta`` reaches only one that takes it."""
        own = {"eta": eta} if self.takes_eta else {}
        return self.function(eps, x, schedule, noise=noise, **own)
