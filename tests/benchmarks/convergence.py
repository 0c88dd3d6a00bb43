"""How fast samplers converge, on data whose exact solution is known: ``python -m tests.benchmarks.convergence``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flagai_altdiff.sampling import SAMPLERS
from flagai_altdiff.sampling.schedule import Schedule, make_betas

STEPS = (5, 10, 15, 20, 30, 50)
MEAN, STD = 0.4, 0.6


def exact_eps(schedule: Schedule) -> object:
    """What an ideal model predicts where the data are N(MEAN, STD**2)."""

    def eps(x: Tensor, t: float) -> Tensor:
        alpha = schedule.levels.alpha(t)
        return math.sqrt(1 - alpha) * (x - math.sqrt(alpha) * MEAN) / (alpha * STD**2 + 1 - alpha)

    return eps


def end(name: str, steps: int, noise: Tensor) -> Tensor:
    """Where a walk ends."""
    table = torch.cumprod(1 - make_betas("linear", 1000, 0.00085, 0.012), dim=0)
    schedule = Schedule.make(table, steps, "exponential")
    *_, last = SAMPLERS[name].walk(exact_eps(schedule), noise, schedule, noise=lambda: torch.zeros_like(noise))  # type: ignore[arg-type]
    return last.x


def main() -> None:
    """Print the table."""
    noise = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    print("| sampler | order | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |")
    print("|---|---:|" + "---:|" * len(STEPS))
    for name, spec in SAMPLERS.items():
        if spec.is_random:
            continue
        wanted = end(name, 1000, noise)
        errors = [float((end(name, steps, noise) - wanted).square().mean().sqrt()) for steps in STEPS]
        print(f"| `{name}` | {spec.order} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


if __name__ == "__main__":
    main()
