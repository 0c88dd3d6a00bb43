"""How much memory a generation needs, how much there is, and what to ask for instead."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import InsufficientMemoryError
from flagai_altdiff.request import GenerationRequest

_LIVE_MAPS = 2
"""Feature maps of a picture's full size that the decoder must hold at once: the input and the output of a convolution."""
_USUAL_MAPS = 6
"""Feature maps that it holds at its widest."""
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; NaN where that cannot be told."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return math.nan
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.nan


def check_memory(request: GenerationRequest, config: LatentDiffusionConfig, device: torch.device) -> None:
    """Refuse what cannot fit, by a bound that every decoder exceeds.

    Args:
        request: With height and width filled in.
        config: The model's.
        device: Where it will be drawn.

    Raises:
        InsufficientMemoryError: One batch needs more than is free; the message has what fits by the usual need.
    """
    assert request.height is not None and request.width is not None
    one_map = 4 * config.first_stage.ch * request.height * request.width * request.pictures_at_once
    free = free_memory(device)
    if _LIVE_MAPS * one_map > free:
        need = f"needs more than {_LIVE_MAPS * one_map / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}"
        raise InsufficientMemoryError(_sentence(request, need, _USUAL_MAPS * one_map / free))


@contextmanager
def memory_advice(request: GenerationRequest) -> Iterator[None]:
    """Turn every device's way of running out of memory into one error with advice.

    Raises:
        InsufficientMemoryError: Memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; the CPU raises a plain one
        if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise InsufficientMemoryError(_sentence(request, "ran out of memory", 2.0)) from error


def _sentence(request: GenerationRequest, problem: str, factor: float) -> str:
    """The problem, and a request that needs about ``factor`` times less."""
    assert request.height is not None and request.width is not None
    batch = request.pictures_at_once
    fewer = max(1, int(batch / factor))
    shrink = math.sqrt(max(1.0, factor * fewer / batch if fewer < batch else factor))
    height, width = (max(64, int(side / shrink) // 64 * 64) for side in (request.height, request.width))
    smaller = f"H={height} and W={width}" if (height, width) != (request.height, request.width) else ""
    count = f"n_samples={fewer}" if fewer < batch else ""
    joined = " and ".join(part for part in (count, smaller) if part) or "a GPU with more memory, or fp16=True"
    drawn = f"{batch} pictures of {request.width}x{request.height} at once"
    return f"drawing {drawn} {problem}. Try {joined}; n_iter draws more of them one batch after another."
