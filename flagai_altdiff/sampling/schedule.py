"""Noise schedule, timestep grids, and the conversions between eps, v and x0.

**Source**: Ho et al. 2020 (arXiv 2006.11239); Salimans and Ho 2022 (arXiv 2202.00512) for v; the grids are FlagAI's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flagai_altdiff.errors import ConfigError


def make_betas(kind: str, timesteps: int, linear_start: float, linear_end: float, cosine_s: float = 8e-3) -> Tensor:
    """Variances of the forward process.

    Args:
        kind: ``"linear"`` (LDM's name for linear in the square root; every released model), ``"sqrt_linear"`` (linear in
            beta), ``"sqrt"`` or ``"cosine"``.
        timesteps: Number of steps.
        linear_start: First beta.
        linear_end: Last beta.
        cosine_s: Offset of the cosine schedule.

    Returns:
        (timesteps,), float64.

    Raises:
        ConfigError: Unknown kind.
    """
    if kind == "linear":
        return torch.linspace(linear_start**0.5, linear_end**0.5, timesteps, dtype=torch.float64) ** 2
    if kind == "sqrt_linear":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64)
    if kind == "sqrt":
        return torch.linspace(linear_start, linear_end, timesteps, dtype=torch.float64) ** 0.5
    if kind == "cosine":
        angles = (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + cosine_s) / (1 + cosine_s) * (torch.pi / 2)
        alphas = angles.cos() ** 2
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
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
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


def step_count(steps: int, timesteps: int = 1000) -> int:
    """Model steps that FlagAI's grid takes when ``steps`` are asked for (6 gives 7, 50 gives 50)."""
    return len(_grid(steps, timesteps))


def _grid(steps: int, timesteps: int) -> npt.NDArray[np.int64]:
    # The original indexes its tables at t = T when the stride leaves that last point, and crashes; that point is dropped.
    grid = np.arange(0, timesteps, timesteps // steps, dtype=np.int64) + 1
    return grid[grid < timesteps]


@dataclass(frozen=True)
class Schedule:
    """One walk from noise to picture: which timesteps, and how much signal is left at each.

    Args:
        timesteps: (S,) int64, descending: the model's inputs.
        alphas: (S,) float64: signal power (alpha bar) at each timestep.
        alphas_prev: (S,) float64: signal power after each step.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_prev: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, steps: int) -> Schedule:
        """FlagAI's grid: stride T // steps, shifted by one; the last step ends at alphas_cumprod[0], not at 1.

        Args:
            alphas_cumprod: (T,), as in the checkpoint.
            steps: Steps asked for, 1 to T.
        """
        table = alphas_cumprod.detach().double().cpu()
        grid = torch.from_numpy(_grid(steps, len(table)))
        alphas = table[grid]
        alphas_prev = torch.cat([table[:1], alphas[:-1]])
        return cls(grid.flip(0), alphas.flip(0), alphas_prev.flip(0))

    def __len__(self) -> int:
        return len(self.timesteps)


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
