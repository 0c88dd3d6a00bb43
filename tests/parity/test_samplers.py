"""Every sampler and grid against diffusers' scheduler of that name: the same latents from the same noise and model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from flagai_altdiff.sampling import SAMPLERS
from flagai_altdiff.sampling.schedule import Schedule, make_betas

TABLE = torch.cumprod(1 - make_betas("linear", 1000, 0.00085, 0.012), dim=0).float()
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def prediction(x: Tensor, t: float = 0.0) -> Tensor:
    """A smooth prediction that depends on all of the latent, and a little on the timestep."""
    return torch.tanh(0.7 * x) + 0.2 * x.roll(1, dims=-1) + 1e-4 * t


@dataclass
class Pair:
    """A sampler and its counterpart.

    Attributes:
        theirs: A scheduler.
        ours: Name of the sampler.
        grid: Name of our grid.
        sees_time: Whether the two ask the model at the same timesteps, not only at the same noise.
        needs: What the scheduler is told beside the noise schedule.
    """

    theirs: Any
    ours: str
    grid: str
    sees_time: bool = True
    needs: dict[str, Any] = field(default_factory=dict)


TRAILING: dict[str, Any] = {"timestep_spacing": "trailing"}
KARRAS: dict[str, Any] = {"use_karras_sigmas": True, "timestep_spacing": "linspace"}
EXPONENTIAL: dict[str, Any] = {"use_exponential_sigmas": True, "timestep_spacing": "linspace"}
MULTISTEP = diffusers.DPMSolverMultistepScheduler
PAIRS = [
    Pair(
        diffusers.DDIMScheduler, "ddim", "trailing", needs={**TRAILING, "set_alpha_to_one": True, "clip_sample": False}
    ),
    Pair(diffusers.EulerDiscreteScheduler, "euler", "trailing", needs=TRAILING),
    Pair(diffusers.EulerDiscreteScheduler, "euler", "uniform", needs={"timestep_spacing": "linspace"}),
    Pair(diffusers.EulerDiscreteScheduler, "euler", "karras", needs=KARRAS),
    Pair(diffusers.EulerDiscreteScheduler, "euler", "exponential", needs=EXPONENTIAL),
    Pair(diffusers.EulerAncestralDiscreteScheduler, "euler_ancestral", "trailing", needs=TRAILING),
    Pair(diffusers.HeunDiscreteScheduler, "heun", "trailing", needs=TRAILING),
    Pair(diffusers.HeunDiscreteScheduler, "heun", "karras", needs=KARRAS),
    Pair(diffusers.KDPM2DiscreteScheduler, "dpm2", "karras", needs=KARRAS),
    Pair(MULTISTEP, "dpmpp_2m", "karras", sees_time=False, needs=KARRAS),
    Pair(MULTISTEP, "dpmpp_2m_sde", "karras", sees_time=False, needs={**KARRAS, "algorithm_type": "sde-dpmsolver++"}),
    Pair(MULTISTEP, "dpmpp_2m_sde", "trailing", needs={**TRAILING, "algorithm_type": "sde-dpmsolver++"}),
    Pair(diffusers.DPMSolverSDEScheduler, "dpmpp_sde", "karras", needs=KARRAS),
    Pair(
        diffusers.UniPCMultistepScheduler,
        "unipc",
        "karras",
        sees_time=False,
        needs={**KARRAS, "final_sigmas_type": "zero"},
    ),
    Pair(diffusers.UniPCMultistepScheduler, "unipc", "trailing", needs={**TRAILING, "final_sigmas_type": "zero"}),
]


def draws(seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(X.shape, generator=generator, dtype=X.dtype)


def our_latents(pair: Pair, steps: int) -> list[Tensor]:
    schedule = Schedule.make(TABLE, steps, pair.grid)
    asked = prediction if pair.sees_time else lambda x, t: prediction(x)
    return [step.x for step in SAMPLERS[pair.ours].walk(asked, X, schedule, noise=draws(7))]


def their_latent(pair: Pair, steps: int) -> Tensor:
    scheduler = pair.theirs(**BETAS, **pair.needs)
    scheduler.set_timesteps(steps)
    noise = draws(7)
    if pair.ours == "dpmpp_sde":
        scheduler.noise_sampler = lambda *sigmas: noise()
    options: dict[str, Any] = {}
    if pair.ours == "euler_ancestral":
        options["generator"] = torch.Generator().manual_seed(7)
    # Ours begins with noise of the variance that the model expects; theirs is told per unit of signal.
    scaled = hasattr(scheduler, "sigmas") and pair.ours in ("euler", "euler_ancestral", "heun", "dpm2", "dpmpp_sde")
    x = X * float((scheduler.sigmas[0] ** 2 + 1) ** 0.5) if scaled else X
    for t in scheduler.timesteps:
        if pair.ours == "dpmpp_2m_sde":
            options["variance_noise"] = noise()
        seen = scheduler.scale_model_input(x, t)
        output = prediction(seen, float(t)) if pair.sees_time else prediction(seen)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.ours}-{pair.grid}")
def test_latents_are_diffusers(pair: Pair, steps: int) -> None:
    if steps == 1 and pair.grid in ("karras", "exponential", "uniform"):
        pytest.skip("diffusers divides by zero")
    if steps == 3 and pair.ours == "ddim":
        pytest.skip("diffusers' DDIM ends its steps elsewhere where their number divides no thousand")
    ours, theirs = our_latents(pair, steps)[-1], their_latent(pair, steps)
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_lcm_is_diffusers_on_its_timesteps() -> None:
    """Theirs mixes in the noisy latent where little noise is left; at these timesteps by less than a millionth."""
    scheduler: Any = diffusers.LCMScheduler(**BETAS, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    levels = Schedule.make(TABLE, 4).levels
    schedule = Schedule.through([int(t) for t in scheduler.timesteps], 1.0, levels)
    generator = torch.Generator().manual_seed(7)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(prediction(x, float(t)), t, x, generator=generator).prev_sample
    ours = [step.x for step in SAMPLERS["lcm"].walk(prediction, X, schedule, noise=draws(7))][-1]
    torch.testing.assert_close(ours, x.to(ours), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("grid", "needs"), [("trailing", TRAILING), ("karras", KARRAS), ("exponential", EXPONENTIAL)])
def test_grids_are_diffusers(grid: str, needs: dict[str, Any]) -> None:
    scheduler: Any = diffusers.EulerDiscreteScheduler(**BETAS, **needs)
    for steps in (2, 7, 30):
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(Schedule.make(TABLE, steps, grid).timesteps, scheduler.timesteps, atol=2e-2)
