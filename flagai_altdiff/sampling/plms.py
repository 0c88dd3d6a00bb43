"""PLMS: DDIM steps along a linear multistep estimate of the noise.

**Source**: Liu et al. 2022 (arXiv 2202.09778), equations 9 and 12; first step and draws as in FlagAI's PLMSSampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.ddim import ddim_step
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule

# Adams-Bashforth weights of the newest prediction first, by how many predictions there are.
_WEIGHTS = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plms(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image; one model call a step, two in the first.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Called as often as the original draws (once a step, twice in the first); the values are not used.

    Yields:
        One Step per timestep.
    """
    history: list[Tensor] = []
    for i, t, alpha, alpha_prev in schedule:
        history = [eps(x, t), *history[:3]]
        if len(history) == 1:  # improved Euler: average with the prediction at the end of a trial step
            noise()
            trial, _ = ddim_step(x, history[0], alpha, alpha_prev)
            estimate = (history[0] + eps(trial, schedule.timesteps[min(1, len(schedule) - 1)])) / 2
        else:
            estimate = sum((w * e for w, e in zip(_WEIGHTS[len(history)], history, strict=True)), start=x.new_zeros(()))
        noise()
        x, pred_x0 = ddim_step(x, estimate, alpha, alpha_prev)
        yield Step(i, len(schedule), t, x, pred_x0)
