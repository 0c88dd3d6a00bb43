"""How much memory a generation needs, how much there is, and what to ask for instead."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from flagai_altdiff.errors import InsufficientMemoryError, is_out_of_memory
from flagai_altdiff.machine import free_main_memory
from flagai_altdiff.request import ResolvedRequest

_SURELY = 0.75
"""Of what is planned, so much is taken in any case: plans are that good."""
_SIDE_STEP = 64
"""Of advised heights and widths, px."""


def _no_other_way(request: ResolvedRequest) -> Mapping[str, int]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Planning:
    """What requests take of a device beside what is held already, in bytes; see ``engine.plan``.

    Args:
        batch: Of a batch of a request.
        otherwise: Of the same, where something else is asked for: option and value, as they are typed -> bytes.
    """

    batch: Callable[[ResolvedRequest], int]
    otherwise: Callable[[ResolvedRequest], Mapping[str, int]] = _no_other_way


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; NaN where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_main_memory() if device.type == "cpu" else math.nan


def check_memory(request: ResolvedRequest, planning: Planning, device: torch.device) -> None:
    """Refuse what cannot fit.

    Args:
        request: What is asked for.
        planning: What requests take.
        device: Where it will be drawn.

    Raises:
        InsufficientMemoryError: One batch needs more than is free; the message has what fits.
    """
    free, needed = free_memory(device), planning.batch(request)
    if _SURELY * needed > free:
        problem = f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}"
        raise InsufficientMemoryError(_sentence(request, problem, planning, free))


@contextmanager
def memory_advice(request: ResolvedRequest, planning: Planning) -> Iterator[None]:
    """Turn every device's way of running out of memory into one error with advice.

    Args:
        request: What is drawn in the block.
        planning: What requests take.

    Raises:
        InsufficientMemoryError: Memory ran out in the block; the message has what takes half of it.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        room = planning.batch(request) / 2
        raise InsufficientMemoryError(_sentence(request, "ran out of memory", planning, room)) from error


def _sentence(request: ResolvedRequest, problem: str, planning: Planning, room: float) -> str:
    """The problem, and what needs no more than ``room``."""
    parts, more, smaller = [], "", _fitting(request, planning, room)
    if smaller and smaller.batch_size < request.batch_size:
        parts.append(f"n_samples={smaller.batch_size}")
        more = "; n_iter draws more of them one batch after another"
    if smaller and (smaller.height, smaller.width) != (request.height, request.width):
        parts.append(f"H={smaller.height} and W={smaller.width}")
    ways = [" and ".join(parts)] if parts else []
    ways += [way for way, needed in planning.otherwise(request).items() if needed <= room]
    size, count = "x".join(map(str, request.final_size)), request.batch_size
    drawn = f"{count} images of {size} at once" if count > 1 else f"an image of {size}"
    return f"drawing {drawn} {problem}. Try {', or '.join(ways) or 'a larger machine'}{more}."


def _fitting(request: ResolvedRequest, planning: Planning, room: float) -> ResolvedRequest | None:
    """The most images that fit, else the largest one; ``None`` where none does."""
    counts, longest = range(1, request.batch_size + 1), max(request.height, request.width)
    fewer = bisect(counts, room, key=lambda count: planning.batch(replace(request, batch_size=count)))
    if fewer:
        return replace(request, batch_size=counts[fewer - 1])
    one, sides = replace(request, batch_size=1), range(_SIDE_STEP, longest, _SIDE_STEP)
    smaller = bisect(sides, room, key=lambda side: planning.batch(_shrunk(one, side / longest)))
    return _shrunk(one, sides[smaller - 1] / longest) if smaller else None


def _shrunk(request: ResolvedRequest, factor: float) -> ResolvedRequest:
    """The same with smaller images of about the same shape."""
    height, width = (
        max(_SIDE_STEP, int(side * factor) // _SIDE_STEP * _SIDE_STEP) for side in (request.height, request.width)
    )
    final_width, final_height = request.final_size
    final_size = final_width * width // request.width, final_height * height // request.height
    return replace(request, height=height, width=width, final_size=final_size)
