"""How much memory a generation needs, how much there is, and what to ask for instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flagai_altdiff.errors import InsufficientMemoryError, is_out_of_memory
from flagai_altdiff.machine import free_main_memory
from flagai_altdiff.request import ResolvedRequest

_SURELY = 0.75
"""Of what is planned, so much is taken in any case: plans are that good."""


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; NaN where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_main_memory() if device.type == "cpu" else math.nan


def check_memory(request: ResolvedRequest, need: int, device: torch.device) -> None:
    """Refuse what cannot fit.

    Args:
        request: What is asked for.
        need: Bytes that a batch of it takes, beside what is held already; see ``engine.plan``.
        device: Where it will be drawn.

    Raises:
        InsufficientMemoryError: One batch needs more than is free; the message has what fits.
    """
    free = free_memory(device)
    if _SURELY * need > free:
        problem = f"needs about {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}"
        raise InsufficientMemoryError(_sentence(request, problem, need / max(free, 1)))


@contextmanager
def memory_advice(request: ResolvedRequest) -> Iterator[None]:
    """Turn every device's way of running out of memory into one error with advice.

    Raises:
        InsufficientMemoryError: Memory ran out in the block.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(_sentence(request, "ran out of memory", 2.0)) from error


def _sentence(request: ResolvedRequest, problem: str, factor: float) -> str:
    """The problem, and a request that needs about ``factor`` times less."""
    batch = request.batch_size
    fewer = max(1, int(batch / factor))
    shrink = math.sqrt(max(1.0, factor * fewer / batch if fewer < batch else factor))
    height, width = (max(64, int(side / shrink) // 64 * 64) for side in (request.height, request.width))
    smaller = f"H={height} and W={width}" if (height, width) != (request.height, request.width) else ""
    count = f"n_samples={fewer}" if fewer < batch else ""
    joined = " and ".join(part for part in (count, smaller) if part) or "memory='lowest', or a larger GPU"
    drawn = f"{batch} images of {request.width}x{request.height} at once"
    return f"drawing {drawn} {problem}. Try {joined}; n_iter draws more of them one batch after another."
