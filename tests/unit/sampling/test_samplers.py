"""Every sampler against data whose exact noise prediction is known, and DDIM and PLMS against FlagAI's formulas in
numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from flagai_altdiff.sampling import GRIDS, SAMPLERS, Step, find_sampler
from flagai_altdiff.sampling.levels import NoiseLevels
from flagai_altdiff.sampling.schedule import Schedule, make_betas, timestep_grid

TABLE = torch.cumprod(1 - make_betas("linear", 1000, 0.00085, 0.012), dim=0).float()
MEAN, STD = 0.4, 0.6
LEVELS = NoiseLevels.of(TABLE)
DETERMINISTIC = [name for name, spec in SAMPLERS.items() if not spec.is_random]
CONVERGING = [name for name, spec in SAMPLERS.items() if spec.order]
CALLS = {"heun": 2, "dpm2": 2, "dpmpp_sde": 2}
DRAWS = {"ddim": 1, "plms": 1, "euler_ancestral": 1, "dpmpp_sde": 2, "dpmpp_2m_sde": 1, "lcm": 1}
"""Per step, where it is not once and never."""
Array = npt.NDArray[np.float64]


def exact_eps(x: Tensor, t: float) -> Tensor:
    """The noise that an ideal model predicts where the data are N(MEAN, STD**2)."""
    alpha = LEVELS.alpha(t)
    return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * STD**2 + 1 - alpha)


def spread(alpha: float) -> float:
    return math.sqrt(alpha * STD**2 + 1 - alpha)


def walk(
    name: str, x: Tensor, steps: int, eps: Callable[[Tensor, float], Tensor] = exact_eps, eta: float = 0.0
) -> list[Step]:
    generator = torch.Generator().manual_seed(1)
    schedule = Schedule.make(TABLE, steps)
    draw = lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    return list(SAMPLERS[name].walk(eps, x, schedule, noise=draw, eta=eta))


def start(schedule: Schedule, n: int) -> Tensor:
    """Draws of the noisy data at the first timestep of a schedule."""
    alpha = float(schedule.alphas[0])
    z = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (math.sqrt(alpha) * MEAN + spread(alpha) * (z - z.mean()) / z.std()).reshape(-1, 4, 10, 10)


def error_of(name: str, steps: int) -> float:
    """Mean distance from where the exact probability flow would have ended."""
    schedule = Schedule.make(TABLE, steps)
    x = start(schedule, 400)
    first, last = float(schedule.alphas[0]), float(TABLE[0])
    exact = math.sqrt(last) * MEAN + spread(last) / spread(first) * (x - math.sqrt(first) * MEAN)
    return float((walk(name, x, steps)[-1].x - exact).abs().mean())


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_converge_to_the_exact_flow(name: str) -> None:
    errors = [error_of(name, steps) for steps in (10, 40, 200)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize(("name", "share"), [("plms", 0.2), ("dpmpp_2m", 1.0)])
def test_multistep_samplers_beat_ddim(name: str, share: float) -> None:
    assert error_of(name, 25) < share * error_of("ddim", 25)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_order_of_convergence_is_what_theory_promises(name: str) -> None:
    """Twice as many steps, even in the logarithm of the noise, divide the error by two to the order's power."""

    def error(steps: int) -> float:
        whole = Schedule.make(TABLE, steps + 1, "exponential")  # the step to no noise at all is of first order
        x = start(whole, 400)
        first, last = whole.alphas[0], whole.alphas[-1]
        exact = math.sqrt(last) * MEAN + spread(last) / spread(first) * (x - math.sqrt(first) * MEAN)
        cut = slice(0, steps)
        walked = replace(
            whole, timesteps=whole.timesteps[cut], alphas=whole.alphas[cut], alphas_prev=whole.alphas_prev[cut]
        )
        *_, end = SAMPLERS[name].walk(exact_eps, x, walked, noise=lambda: torch.zeros_like(x))
        return float((end.x - exact).abs().mean())

    order = math.log2(error(80) / error(160))
    assert order > SAMPLERS[name].order - 0.3, order


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", CONVERGING)
def test_every_sampler_walks_every_grid(name: str, grid: str) -> None:
    schedule = Schedule.make(TABLE, 100, grid)
    x = start(schedule, 4000)
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    *_, end = SAMPLERS[name].walk(exact_eps, x, schedule, noise=draw)
    last = schedule.alphas_prev[-1]
    assert last == (LEVELS.alphas[0] if grid == "flagai" else 1)
    assert abs(float(end.x.mean()) - math.sqrt(last) * MEAN) < 0.03
    assert abs(float(end.x.std()) - spread(last)) < 0.06


@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in CONVERGING), ("ddim", 0.5), ("ddim", 1.0)])
def test_every_sampler_reaches_the_distribution_of_the_data(name: str, eta: float) -> None:
    x = walk(name, start(Schedule.make(TABLE, 250), 10_000), 250, eta=eta)[-1].x
    last = float(TABLE[0])
    assert abs(float(x.mean()) - math.sqrt(last) * MEAN) < 0.02
    assert abs(float(x.std()) - spread(last)) < 0.03  # fresh noise in every step leaves a bias of the step's size


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_predicted_image_becomes_the_image(name: str) -> None:
    steps = walk(name, start(Schedule.make(TABLE, 50), 400), 50)
    assert (steps[-1].pred_x0 - steps[-1].x).abs().mean() < 0.05
    assert (steps[0].pred_x0 - steps[-1].x).abs().mean() > 0.3


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_shape_dtype_and_input_are_kept(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(3)).to(dtype)
    before = x.clone()
    for step in walk(name, x, 4):
        assert step.x.shape == step.pred_x0.shape == x.shape
        assert step.x.dtype == step.pred_x0.dtype == dtype
        assert bool(step.x.isfinite().all())
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_numbers_give_the_same_latent(name: str) -> None:
    x = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    first, second = walk(name, x, 7), walk(name, x, 7)
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 25])
def test_steps_model_calls_and_draws_are_counted(name: str, steps: int) -> None:
    seen: list[float] = []
    draws: list[int] = []

    def eps(x: Tensor, t: float) -> Tensor:
        seen.append(t)
        return exact_eps(x, t)

    def noise() -> Tensor:
        draws.append(1)
        return torch.zeros(1, 1, 2, 2)

    schedule = Schedule.make(TABLE, steps)
    taken = list(SAMPLERS[name].walk(eps, torch.ones(1, 1, 2, 2), schedule, noise=noise))
    n = len(timestep_grid(steps))
    assert [step.index for step in taken] == list(range(n))
    assert {step.total for step in taken} == {n}
    assert [step.t for step in taken] == list(schedule.timesteps)
    assert len(seen) == n * CALLS.get(name, 1) + (name == "plms")
    assert len(draws) == n * DRAWS.get(name, 0) + (name == "plms") - (name == "lcm")
    if name == "plms":
        assert seen[1] == schedule.timesteps[min(1, n - 1)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_walk_is_lazy(name: str) -> None:
    calls: list[float] = []

    def eps(x: Tensor, t: float) -> Tensor:
        calls.append(t)
        return x

    steps = SAMPLERS[name].walk(eps, torch.ones(1, 1, 2, 2), Schedule.make(TABLE, 50), noise=lambda: torch.zeros(1))
    assert calls == []
    next(iter(steps))
    assert len(calls) <= 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_eta_reaches_the_samplers_that_take_it(name: str) -> None:
    x = torch.ones(1, 1, 2, 2)
    without, with_eta = (walk(name, x, 3, eta=eta)[-1].x for eta in (0.0, 0.5))
    assert torch.equal(without, with_eta) is not SAMPLERS[name].takes_eta


def model_of_the_test(x: Array, t: int) -> Array:
    """A smooth prediction that depends on everything."""
    return np.tanh(0.7 * x + 0.001 * t) + 0.2 * np.roll(x, 1, axis=-1)


def flagai_tables(steps: int) -> tuple[list[int], Array, Array]:
    table = TABLE.numpy().astype(np.float64)
    grid = [t + 1 for t in range(0, 1000, 1000 // steps) if t + 1 < 1000]
    return grid, table[grid], np.array([table[0], *table[grid[:-1]]])


def flagai_update(x: Array, e: Array, a: float, a_prev: float, sigma: float, noise: Array) -> Array:
    pred_x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
    direction = np.sqrt(1 - a_prev - sigma**2) * e
    return np.sqrt(a_prev) * pred_x0 + direction + sigma * noise


def flagai_ddim(x: Array, steps: int, eta: float, noises: list[Array]) -> list[Array]:
    grid, alphas, previous = flagai_tables(steps)
    sigmas = eta * np.sqrt((1 - previous) / (1 - alphas) * (1 - alphas / previous))
    out = []
    for k, i in enumerate(reversed(range(len(grid)))):
        x = flagai_update(x, model_of_the_test(x, grid[i]), alphas[i], previous[i], sigmas[i], noises[k])
        out.append(x)
    return out


def flagai_plms(x: Array, steps: int) -> list[Array]:
    grid, alphas, previous = flagai_tables(steps)
    old: list[Array] = []
    out = []
    for i in reversed(range(len(grid))):
        e = model_of_the_test(x, grid[i])
        if not old:
            trial = flagai_update(x, e, alphas[i], previous[i], 0.0, x)
            prime = (e + model_of_the_test(trial, grid[max(i - 1, 0)])) / 2
        elif len(old) == 1:
            prime = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = flagai_update(x, prime, alphas[i], previous[i], 0.0, x)
        old = [*old, e][-3:]
        out.append(x)
    return out


def in_torch(x: Tensor, t: float) -> Tensor:
    return torch.from_numpy(model_of_the_test(x.double().numpy(), int(t))).to(x.dtype)


@pytest.mark.parametrize(
    ("steps", "dtype"), [*((steps, torch.float64) for steps in (1, 2, 3, 6, 9, 27, 501, 1000)), (6, torch.float32)]
)
@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddim", 1.0), ("plms", 0.0)])
def test_trajectories_are_flagais(name: str, eta: float, steps: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(steps)
    x = rng.standard_normal((1, 2, 3, 3))
    noises = [rng.standard_normal(x.shape) for _ in range(len(timestep_grid(steps)))]
    expected = flagai_ddim(x, steps, eta, noises) if name == "ddim" else flagai_plms(x, steps)
    draws = iter(torch.from_numpy(n).to(dtype) for n in noises)
    noise = (lambda: next(draws)) if name == "ddim" else (lambda: torch.full((1,), math.nan))
    schedule = Schedule.make(TABLE, steps)
    taken = list(SAMPLERS[name].walk(in_torch, torch.from_numpy(x).to(dtype), schedule, noise=noise, eta=eta))
    assert len(taken) == len(expected)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for step, want in zip(taken, expected, strict=True):
        np.testing.assert_allclose(
            step.x.double().numpy(), want, rtol=tolerance, atol=tolerance * max(1, np.abs(want).max())
        )


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("Euler a", ("euler_ancestral", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("dpmpp_2m_karras", ("dpmpp_2m", "karras")),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("  unipc ", ("unipc", None)),
        ("uni_pc", ("unipc", None)),
        ("DPM2 a", None),
        ("karras", None),
        ("", None),
    ],
)
def test_other_programs_names_are_understood(name: str, found: tuple[str, str | None] | None) -> None:
    assert find_sampler(name) == found
