"""Noise schedule, timestep grids, and the conversions between eps, v and x0.

**Source**: Ho et al. 2020 (arXiv 2006.11239); Salimans and Ho 2022 (arXiv 2202.00512) for v; FlagAI for its grid; Lin
et al. 2023 (arXiv 2305.08891) for the trailing one; Karras et al. 2022 (arXiv 2206.00364) for theirs and for sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flagai_altdiff.errors import ConfigError
from flagai_altdiff.sampling.levels import NoiseLevels, sigma_of


def make_betas(kind: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3) -> Tensor:
    """Variances of the forward process.

    Args:
        kind: ``"linear"`` (LDM's name for linear in the square root; every released model), ``"sqrt_linear"`` (linear
            in beta), ``"sqrt"`` or ``"cosine"``.
        timesteps: Number of steps.
        linear_start: First beta.
        linear_end: Last beta.
        cosine_s: Offset of the cosine schedule.

    Returns:
        (timesteps,), float64, on the CPU whatever the default device is.

    Raises:
        ConfigError: Unknown kind.
    """
    if kind == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64, device="cpu") ** 2
    if kind == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64, device="cpu")
    if kind == "sqrt":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64, device="cpu") ** 0.5
    if kind == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
        alphas = ((t + cosine_s) / (1 + cosine_s) * (torch.pi / 2)).cos() ** 2
        return (1 - alphas[1:] / alphas[:-1]).clamp(0.0, 0.999)
    raise ConfigError(f"beta_schedule {kind!r} is unknown. Known: linear, sqrt_linear, sqrt, cosine.")


def schedule_buffers(betas: Tensor) -> dict[str, Tensor]:
    """The twelve schedule buffers that LDM checkpoints carry.

    Args:
        betas: (T,), float64.

    Returns:
        Name -> (T,), float32.
    """
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    previous = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
    posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": previous,
        "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - alphas_cumprod).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - alphas_cumprod).log(),
        "sqrt_recip_alphas_cumprod": (1.0 / alphas_cumprod).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / alphas_cumprod - 1.0).sqrt(),
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": posterior_variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * previous.sqrt() / (1.0 - alphas_cumprod),
        "posterior_mean_coef2": (1.0 - previous) * (1.0 - betas).sqrt() / (1.0 - alphas_cumprod),
    }
    return {name: value.float() for name, value in buffers.items()}


def timestep_grid(steps: int, timesteps: int = 1000) -> range:
    """FlagAI's grid, ascending: stride T // steps, shifted by one; it may be longer than ``steps`` (6 gives 7, 50 gives
    50).

    The original indexes its tables at t = T when the stride leaves that last point, and crashes; that point is dropped.
    """
    return range(1, timesteps, timesteps // steps)


_RHO = 7.0
"""Curvature of Karras' grid, as the paper has it."""


@dataclass(frozen=True)
class Schedule:
    """One walk from noise to image: which timesteps, and how much signal is left at each.

    Iterating gives (number of the step, timestep, alpha, alpha after the step) for each.

    Args:
        timesteps: Descending: the model's inputs. Whole ones are of type int.
        alphas: Signal power (alpha bar) at each timestep.
        alphas_prev: Signal power after each step.
        levels: Of the model.
    """

    timesteps: tuple[float, ...]
    alphas: tuple[float, ...]
    alphas_prev: tuple[float, ...]
    levels: NoiseLevels = field(repr=False, compare=False)

    @classmethod
    def make(cls, alphas_cumprod: Tensor, steps: int, grid: str = "flagai") -> Schedule:
        """A whole walk.

        Args:
            alphas_cumprod: (T,), of any floating dtype.
            steps: Steps asked for, 1 to T.
            grid: One of ``GRIDS``. ``"flagai"`` is :func:`timestep_grid`, and ends at the noise of timestep 0. The
                others end without noise: ``"trailing"`` begins at the last timestep and goes on in equal strides,
                ``"uniform"`` divides all timesteps evenly, between them too, ``"karras"`` and ``"exponential"`` divide
                sigma's seventh root and its logarithm.
        """
        levels = NoiseLevels.of(alphas_cumprod)
        last = len(levels) - 1
        if grid == "flagai":
            numbers = tuple(timestep_grid(steps, len(levels))[::-1])
            return cls.through(numbers, levels.alphas[0], levels)
        if grid == "trailing":
            stride = len(levels) / steps
            return cls.through(tuple(round(len(levels) - k * stride) - 1 for k in range(steps)), 1.0, levels)
        if grid == "uniform":
            return cls.through(tuple(last - k * last / max(steps - 1, 1) for k in range(steps)), 1.0, levels)
        bend, back = (lambda s: s ** (1 / _RHO), lambda s: s**_RHO) if grid == "karras" else (math.log, math.exp)
        first, final = (bend(sigma_of(levels.alphas[i])) for i in (last, 0))
        sigmas = [back(first + k * (final - first) / max(steps - 1, 1)) for k in range(steps)]
        return cls.through(tuple(levels.timestep(sigma) for sigma in sigmas), 1.0, levels)

    @classmethod
    def through(cls, timesteps: Sequence[float], end: float, levels: NoiseLevels) -> Schedule:
        """A walk along given timesteps.

        Args:
            timesteps: Descending; whole ones of type int.
            end: Signal power that the last step ends with.
            levels: Of the model.
        """
        alphas = tuple(levels.alpha(t) for t in timesteps)
        return cls(tuple(timesteps), alphas, (*alphas[1:], end), levels)

    def tail(self, steps: int) -> Schedule:
        """The last steps of the walk."""
        cut = slice(len(self) - steps, None)
        return replace(self, timesteps=self.timesteps[cut], alphas=self.alphas[cut], alphas_prev=self.alphas_prev[cut])

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[tuple[int, float, float, float]]:
        return zip(range(len(self)), self.timesteps, self.alphas, self.alphas_prev, strict=True)


def add_noise(x0: Tensor, eps: Tensor, alpha: Tensor | float) -> Tensor:
    """sqrt(alpha) x0 + sqrt(1 - alpha) eps; ``alpha`` broadcasts."""
    alpha = torch.as_tensor(alpha, dtype=x0.dtype, device=x0.device)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps


def to_eps(output: Tensor, x: Tensor, alpha: Tensor, parameterization: str) -> Tensor:
    """The noise that a model output of the given kind stands for.

    Args:
        output: (B, C, h, w): eps, v or x0.
        x: (B, C, h, w): the noisy latent that the model saw.
        alpha: Signal power at its timestep; broadcasts against x.
        parameterization: ``"eps"``, ``"v"`` or ``"x0"``.
    """
    if parameterization == "eps":
        return output
    if parameterization == "v":  # v = sqrt(alpha) eps - sqrt(1 - alpha) x0
        return alpha.sqrt() * output + (1 - alpha).sqrt() * x
    return (x - alpha.sqrt() * output) / (1 - alpha).sqrt()


def v_target(x0: Tensor, eps: Tensor, alpha: Tensor) -> Tensor:
    """v = sqrt(alpha) eps - sqrt(1 - alpha) x0 (Salimans and Ho 2022, appendix D)."""
    return alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
