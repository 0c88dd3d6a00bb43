"""How much memory there is, in the words of A1111's clients: bytes that are free, used, and both together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flagai_altdiff.machine import free_main_memory, total_main_memory

NO_GPU = {"error": "unavailable"}
"""What is said of a GPU where there is none."""
_STATISTICS = {
    "active": "active_bytes",
    "allocated": "allocated_bytes",
    "reserved": "reserved_bytes",
    "inactive": "inactive_split_bytes",
}
"""A1111's names → torch's."""


def main_memory() -> dict[str, int | None]:
    """This machine's, or its container's where that has less; ``None`` for what cannot be told."""
    total, free = total_main_memory(), free_main_memory()
    found = {"free": free, "used": max(total - free, 0.0), "total": total}
    return {name: None if math.isnan(value) else int(value) for name, value in found.items()}


def gpu_memory(device: str) -> dict[str, Any] | None:
    """A GPU's, seen from a process that draws on it; ``None`` for a CPU."""
    import torch

    if torch.device(device).type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return gpu_report(free, total, torch.cuda.memory_stats(device))


def gpu_report(free: int, total: int, statistics: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of torch's as A1111 tells them.

    Args:
        free: Bytes of the whole GPU.
        total: Bytes of the whole GPU.
        statistics: Of the process; see ``torch.cuda.memory_stats``.
    """

    def ever(name: str) -> dict[str, int]:
        return {when: int(statistics.get(f"{name}.all.{when}", 0)) for when in ("current", "peak")}

    return {
        "system": {"free": free, "used": total - free, "total": total},
        **{name: ever(own) for name, own in _STATISTICS.items()},
        "events": {"retries": statistics.get("num_alloc_retries", 0), "oom": statistics.get("num_ooms", 0)},
    }
