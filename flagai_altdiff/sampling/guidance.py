"""Classifier-free guidance. **Source**: Ho and Salimans 2022 (arXiv 2207.12598), in LDM's form uncond + s (cond -
uncond)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagai_altdiff.sampling.levels import NoiseLevels
from flagai_altdiff.sampling.schedule import to_eps

DenoiseFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,), cond (n B, L, D)) -> eps, v or x0 (n B, C, h, w): all rows of x with the first B states, and
so on."""
WHOLE_WALK = (0.0, 1.0)


class Guidance:
    """The noise prediction of a model, guided by texts.

    Args:
        cond: (B, L, D), states of the prompts.
        uncond: (B, L, D), states of the negative prompts; ``None`` where scale is 1 and they have no weight.
        scale: Guidance scale, of all or (B, 1, 1, 1); 1 is the plain prediction.
        alphas_cumprod: (T,), signal power by timestep.
        parameterization: What the model gives: ``"eps"``, ``"v"`` or ``"x0"``.
        interval: Where on the way of the timesteps, from noise (0) to image (1), it guides; elsewhere the prediction is
            that of the prompts alone, for half of the work.

    **Source**: Kynkäänniemi et al. 2024 (arXiv 2404.07724) for the interval.
    """

    def __init__(
        self,
        cond: Tensor,
        uncond: Tensor | None,
        scale: float | Tensor,
        alphas_cumprod: Tensor,
        parameterization: str = "eps",
        interval: tuple[float, float] = WHOLE_WALK,
    ) -> None:
        self._cond, self._scale, self._interval = cond, scale, interval
        self._both = None if uncond is None else torch.cat([uncond, cond])  # one pass for both halves
        self._alphas_cumprod, self._parameterization = alphas_cumprod, parameterization
        self._levels = NoiseLevels.of(alphas_cumprod)

    def eps(self, denoise: DenoiseFunction, x: Tensor, t: float) -> Tensor:
        """The model's prediction, (B, C, h, w), for x (B, C, h, w) at a timestep."""
        if isinstance(t, int):
            alpha, kind = self._alphas_cumprod[t], torch.long
        else:
            alpha, kind = torch.tensor(self._levels.alpha(t), device=x.device), torch.float32
        timesteps = torch.full((x.shape[0],), t, device=x.device, dtype=kind)
        if self._both is None or not self._guides_at(t):
            return to_eps(denoise(x, timesteps, self._cond), x, alpha, self._parameterization)
        without, with_prompt = denoise(x, timesteps, self._both).chunk(2)
        return to_eps(without + self._scale * (with_prompt - without), x, alpha, self._parameterization)

    def _guides_at(self, t: float) -> bool:
        """Whether a timestep lies in the interval: the highest has gone no part of the way, timestep 0 nearly all."""
        count = len(self._alphas_cumprod)
        return self._interval[0] <= (count - 1 - t) / count < self._interval[1]
