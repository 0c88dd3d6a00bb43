"""UniPC: a multistep predictor, corrected by what the model says at the step's end, for no further call of it.

**Source**: Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 6 (data prediction), with B(h) = exp(h) - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.sigmas import Denoiser
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Step

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.schedule import Schedule

_ORDER = 2
"""Of the predictor; the corrector raises it by one."""


def unipc(eps: EpsFunction, x: Tensor, schedule: Schedule, *, noise: NoiseFunction) -> Iterator[Step]:
    """Walk from noise to image with UniPC-2; 10 to 20 steps do the work of 50.

    Args:
        eps: Noise prediction.
        x: (B, C, h, w), standard normal.
        schedule: Timesteps and signal powers.
        noise: Not called.

    Yields:
        One Step per timestep.
    """
    model = Denoiser(eps, x, schedule)
    history: list[tuple[float, Tensor]] = []  # (sigma, image), the newest first
    start: Tensor | None = None  # of the last step
    order = 1
    for i, t, sigma, sigma_next in model:
        pred_x0 = model(model.x, sigma, t)
        if start is not None:  # the last step once more, with what the model says at its end
            model.x = _moved(start, sigma, history[:order], pred_x0)
        history = [(sigma, pred_x0), *history[: _ORDER - 1]]
        order = min(len(history), len(schedule) - i)
        start = model.x
        model.x = pred_x0 if sigma_next == 0 else _moved(start, sigma_next, history[:order])
        yield model.step(i, t, sigma_next, pred_x0)


def _moved(x: Tensor, sigma: float, history: Sequence[tuple[float, Tensor]], end: Tensor | None = None) -> Tensor:
    """A latent moved to another noise.

    Args:
        x: (B, C, h, w), per unit of signal, at the noise of the newest prediction.
        sigma: The noise to move to.
        history: (sigma, predicted image), the newest first.
        end: What was predicted at ``sigma``, where that is known: it makes a predictor a corrector.
    """
    (first, newest), *older = history
    h = math.log(first / sigma)
    places = [math.log(first / other) / h for other, _ in older] + ([1.0] if end is not None else [])
    differences = [image - newest for _, image in older] + ([end - newest] if end is not None else [])
    weights = _weights(places, h)
    moved = sigma / first * x - math.expm1(-h) * newest
    for place, weight, difference in zip(places, weights, differences, strict=True):
        moved = moved - math.expm1(-h) * weight / place * difference
    return moved


def _weights(places: Sequence[float], h: float) -> tuple[float, ...]:
    """How much each of up to two differences counts: a half, or the solution of the paper's equation 9."""
    if len(places) < 2:
        return (0.5,) * len(places)
    whole = math.expm1(-h)
    second = whole / -h - 1
    third = second / -h - 0.5
    first_sum, second_sum = second / whole, 2 * third / whole
    of_older = (second_sum - first_sum) / (places[0] - places[1])
    return of_older, first_sum - of_older
