"""The algebra of classifier-free guidance."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flagai_altdiff.sampling.guidance import DenoiseFunction, Guidance
from flagai_altdiff.sampling.schedule import to_eps
from flagai_altdiff.sampling.step import EpsFunction

ALPHAS = torch.linspace(0.99, 0.01, 10)
COND, UNCOND = torch.full((2, 3, 4), 2.0), torch.full((2, 3, 4), 5.0)
X = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def denoise(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """Depends on all three, row by row; all of x with the first states, then with the next."""
    x, t = x.repeat(len(cond) // len(x), 1, 1, 1), t.repeat(len(cond) // len(x))
    return x.sin() * cond.mean(dim=(1, 2))[:, None, None, None] + 0.1 * t[:, None, None, None]


def guided(model: DenoiseFunction, *texts: Any, **settings: Any) -> EpsFunction:
    return partial(Guidance(*texts, **settings).eps, model)


def one(x: Tensor, t: int, cond: Tensor) -> Tensor:
    return denoise(x, torch.full((len(x),), t), cond)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 7.5])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_prompt_counts_scale_times(scale: float, kind: str) -> None:
    eps = guided(denoise, COND, UNCOND, scale, ALPHAS, kind)(X, 4)
    with_prompt, without = one(X, 4, COND), one(X, 4, UNCOND)
    mixed = without + scale * (with_prompt - without)
    torch.testing.assert_close(eps, to_eps(mixed, X, ALPHAS[4], kind))
    # Guidance in eps, as the original does it, is the same where the conversion is linear.
    parts = [to_eps(part, X, ALPHAS[4], kind) for part in (without, with_prompt)]
    torch.testing.assert_close(eps, parts[0] + scale * (parts[1] - parts[0]))


def test_without_a_negative_side_the_model_is_asked_once() -> None:
    rows: list[int] = []

    def counting(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        rows.append(len(cond))
        assert t.dtype == torch.long
        return denoise(x, t, cond)

    torch.testing.assert_close(guided(counting, COND, None, 1.0, ALPHAS)(X, 3), one(X, 3, COND))
    assert rows == [2]
    guided(counting, COND, UNCOND, 3.0, ALPHAS)(X, 3)
    assert rows[1:] == [4]


def test_equal_texts_need_no_scale() -> None:
    a, b = (guided(denoise, COND, COND, scale, ALPHAS)(X, 2) for scale in (1.0, 30.0))
    torch.testing.assert_close(a, b)


def test_outside_its_interval_guidance_costs_nothing() -> None:
    rows: list[int] = []

    def counting(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        rows.append(len(cond))
        return denoise(x, t, cond)

    eps = guided(counting, COND, UNCOND, 3.0, ALPHAS, interval=(0.2, 0.7))
    found = {t: eps(X, t) for t in range(9, -1, -1)}
    assert rows == [2, 2, 4, 4, 4, 4, 4, 2, 2, 2]
    torch.testing.assert_close(found[9], one(X, 9, COND))
    torch.testing.assert_close(found[5], guided(counting, COND, UNCOND, 3.0, ALPHAS)(X, 5))
    whole = guided(counting, COND, UNCOND, 3.0, ALPHAS, interval=(0.0, 1.0))
    for t in (9, 0, 0.5, 8.7):
        whole(X, t)
        assert rows[-1] == 4, "all of the walk is all of it, between timesteps too"
