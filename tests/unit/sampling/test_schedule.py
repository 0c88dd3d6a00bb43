"""Schedules and grids against a plain numpy account of FlagAI's formulas."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import ConfigError
from flagai_altdiff.sampling.schedule import (
    Schedule,
    add_noise,
    make_betas,
    schedule_buffers,
    timestep_grid,
    to_eps,
    v_target,
)

BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ALPHAS_CUMPROD = np.cumprod(1 - BETAS)


def test_the_released_schedule() -> None:
    betas = make_betas("linear", 1000, 0.00085, 0.012)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas.numpy(), BETAS, rtol=1e-12)
    buffers = schedule_buffers(betas)
    assert len(buffers) == 12
    assert all(b.dtype == torch.float32 and b.shape == (1000,) for b in buffers.values())
    a, prev = ALPHAS_CUMPROD, np.append(1.0, ALPHAS_CUMPROD[:-1])
    variance = BETAS * (1 - prev) / (1 - a)
    expected = {
        "betas": BETAS,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": np.sqrt(a),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - a),
        "log_one_minus_alphas_cumprod": np.log(1 - a),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / a),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / a - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": BETAS * np.sqrt(prev) / (1 - a),
        "posterior_mean_coef2": (1 - prev) * np.sqrt(1 - BETAS) / (1 - a),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(buffers[name].numpy(), values.astype(np.float32), rtol=2e-7, err_msg=name)


@pytest.mark.parametrize("kind", ["linear", "sqrt_linear", "sqrt", "cosine"])
def test_every_kind_of_betas_is_a_variance(kind: str) -> None:
    betas = make_betas(kind, 100, 0.0001, 0.02)
    assert betas.shape == (100,)
    assert bool(((betas > 0) & (betas < 1)).all())
    assert bool((betas.diff() >= 0).all())


def test_other_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'tan'.*cosine"):
        make_betas("tan", 10, 0.1, 0.2)


@pytest.mark.parametrize(
    ("steps", "taken"), [(1, 1), (2, 2), (5, 5), (6, 7), (7, 8), (30, 31), (50, 50), (60, 63), (150, 167), (250, 250)]
)
def test_the_originals_number_of_steps(steps: int, taken: int) -> None:
    assert len(timestep_grid(steps)) == taken


def flagai_grid(steps: int) -> list[int]:
    """The original's timesteps; the one at 1000, where it crashes, is left out."""
    return [t + 1 for t in range(0, 1000, 1000 // steps) if t + 1 < 1000]


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 9, 27, 36, 50, 101, 251, 333, 334, 500, 501, 999, 1000])
def test_grids_and_tables(steps: int) -> None:
    table = torch.from_numpy(ALPHAS_CUMPROD).float()
    schedule = Schedule.make(table, steps)
    grid = flagai_grid(steps)
    alphas = ALPHAS_CUMPROD.astype(np.float32).astype(np.float64)
    assert list(schedule.timesteps) == grid[::-1]
    assert len(schedule) == len(timestep_grid(steps)) == len(grid)
    assert np.array_equal(schedule.alphas, alphas[grid][::-1])
    assert np.array_equal(schedule.alphas_prev, np.append(alphas[0], alphas[grid[:-1]])[::-1])
    assert list(schedule) == list(
        zip(range(len(grid)), schedule.timesteps, schedule.alphas, schedule.alphas_prev, strict=True)
    )
    assert schedule.alphas_prev[-1] == float(table[0])  # not 1


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 1000))
def test_every_number_of_steps_gives_a_walk(steps: int) -> None:
    schedule = Schedule.make(torch.from_numpy(ALPHAS_CUMPROD).float(), steps)
    assert len(schedule) >= min(steps, 999)
    assert all(a > b for a, b in pairwise(schedule.timesteps)) and schedule.timesteps[-1] == 1
    assert all(after > before for before, after in zip(schedule.alphas, schedule.alphas_prev, strict=True))


@settings(max_examples=40, deadline=None)
@given(alpha=st.floats(0.01, 0.99), seed=st.integers(0, 2**31))
def test_eps_v_and_x0_stand_for_the_same_noise(alpha: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    signal = torch.tensor(alpha, dtype=torch.float64)
    x = add_noise(x0, eps, signal)
    torch.testing.assert_close(x, alpha**0.5 * x0 + (1 - alpha) ** 0.5 * eps)
    for output, kind in ((eps, "eps"), (x0, "x0"), (v_target(x0, eps, signal), "v")):
        torch.testing.assert_close(to_eps(output, x, signal, kind), eps)


def test_v_is_the_velocity_of_the_angle() -> None:
    x0, eps = torch.tensor(2.0), torch.tensor(3.0)
    angle = torch.tensor(0.7)
    h = 1e-3
    before, after = (add_noise(x0, eps, torch.cos(angle + d) ** 2) for d in (-h, h))
    torch.testing.assert_close(
        v_target(x0, eps, torch.cos(angle) ** 2), (after - before) / (2 * h), rtol=1e-3, atol=1e-3
    )
