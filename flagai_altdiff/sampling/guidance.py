"""Classifier-free guidance. **Source**: Ho and Salimans 2022 (arXiv 2207.12598), in LDM's form uncond + s (cond -
uncond)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagai_altdiff.sampling.levels import NoiseLevels
from flagai_altdiff.sampling.schedule import to_eps
from flagai_altdiff.sampling.step import EpsFunction

DenoiseFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,), cond (n B, L, D)) -> eps, v or x0 (n B, C, h, w): all rows of x with the first B states, and
so on."""


def guided(
    denoise: DenoiseFunction,
    cond: Tensor,
    uncond: Tensor | None,
    scale: float | Tensor,
    alphas_cumprod: Tensor,
    parameterization: str = "eps",
) -> EpsFunction:
    """The noise prediction of a conditioned model.

    Args:
        denoise: The model.
        cond: (B, L, D), states of the prompts.
        uncond: (B, L, D), states of the negative prompts; ``None`` where scale is 1 and they have no weight.
        scale: Guidance scale, of all or (B, 1, 1, 1); 1 is the plain prediction.
        alphas_cumprod: (T,), signal power by timestep.
        parameterization: What ``denoise`` gives: ``"eps"``, ``"v"`` or ``"x0"``.

    Returns:
        (x, t) -> eps.
    """

    levels = NoiseLevels.of(alphas_cumprod)
    both = None if uncond is None else torch.cat([uncond, cond])  # one pass for both halves

    def eps(x: Tensor, t: float) -> Tensor:
        if isinstance(t, int):
            alpha, kind = alphas_cumprod[t], torch.long
        else:
            alpha, kind = torch.tensor(levels.alpha(t), device=x.device), torch.float32
        timesteps = torch.full((x.shape[0],), t, device=x.device, dtype=kind)
        if both is None:
            return to_eps(denoise(x, timesteps, cond), x, alpha, parameterization)
        without, with_prompt = denoise(x, timesteps, both).chunk(2)
        return to_eps(without + scale * (with_prompt - without), x, alpha, parameterization)

    return eps
