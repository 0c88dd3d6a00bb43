"""How much signal and noise there is at a timestep, and between two of them. Plain numbers, no torch.

**Source**: Karras et al. 2022 (arXiv 2206.00364) for sigma, the noise per unit of signal.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class NoiseLevels:
    """Signal power and noise by timestep, also between the timesteps that a model was trained on.

    There the logarithm of sigma, the noise per unit of signal, is read off a straight line.

    Args:
        alphas: Signal power by timestep.
    """

    def __init__(self, alphas: Sequence[float]) -> None:
        self.alphas = tuple(alphas)
        self._log_sigmas = [math.log(sigma_of(alpha)) for alpha in self.alphas]

    @classmethod
    def of(cls, alphas_cumprod: Tensor) -> NoiseLevels:
        """The levels of a table, (T,), of any floating dtype."""
        return cls(alphas_cumprod.detach().double().tolist())

    def __len__(self) -> int:
        return len(self.alphas)

    def alpha(self, t: float) -> float:
        """Signal power at a timestep."""
        return self.alphas[t] if isinstance(t, int) else alpha_of(math.exp(self._log_sigma(t)))

    def timestep(self, sigma: float) -> float:
        """The timestep at which there is so much noise per unit of signal; the nearest where there is none."""
        wanted = math.log(sigma)
        upper = min(max(bisect.bisect_left(self._log_sigmas, wanted), 1), len(self) - 1)
        low, high = self._log_sigmas[upper - 1 : upper + 1]
        return upper - 1 + min(max((wanted - low) / (high - low), 0.0), 1.0)

    def _log_sigma(self, t: float) -> float:
        lower = min(int(t), len(self) - 2)
        low, high = self._log_sigmas[lower : lower + 2]
        return low + (t - lower) * (high - low)


def sigma_of(alpha: float) -> float:
    """Noise per unit of signal, from signal power."""
    return math.sqrt((1 - alpha) / alpha)


def alpha_of(sigma: float) -> float:
    """Signal power, from noise per unit of signal."""
    return 1 / (1 + sigma**2)
