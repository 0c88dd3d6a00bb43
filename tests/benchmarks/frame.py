"""How sides are compared: in turn in one process, by the medians of each round's ratios.

A busy machine slows all sides of a round alike, so that ratios hold where seconds drift. What comes before the rounds
does not count: weights are laid out in it, graphs compiled.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.memory import free_memory

Work = Callable[[], Tensor]
"""Does what is timed, and gives its numbers."""
_TOUCHED_BYTES = 6 << 30
"""What the largest set-up takes."""


@dataclass(kw_only=True)
class Side:
    """What one side took.

    Attributes:
        first_s: Seconds of the first call, set-up and all.
        seconds: Of each round.
        error: Largest difference from the reference's numbers, over their largest; NaN where it was not compared.
        gib: What the process held at most beyond the weights, where that was measured; else NaN.
    """

    first_s: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    error: float = float("nan")
    gib: float = float("nan")

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)


@dataclass(kw_only=True)
class Row:
    """One comparison.

    Attributes:
        name: Its key.
        what: In words.
        reference: The side that errors and ratios refer to.
        sides: By name, in the order of their turns.
        flop: Of the work as the plain model does it; 0 where it was not counted.
        machine: What it ran on.
    """

    name: str
    what: str
    reference: str
    sides: dict[str, Side]
    flop: float = 0.0
    machine: dict[str, Any] = field(default_factory=dict)

    def ratios(self, side: str) -> list[float]:
        """How many times faster than the reference a side is, round by round."""
        pairs = zip(self.sides[self.reference].seconds, self.sides[side].seconds, strict=True)
        return [theirs / own for theirs, own in pairs]

    def ratio(self, side: str, over: str | None = None) -> float:
        """Median of the rounds' ratios, to the reference or to another side."""
        other = self.sides[over or self.reference].seconds
        return statistics.median(a / b for a, b in zip(other, self.sides[side].seconds, strict=True))


def compare(
    name: str,
    what: str,
    sides: Mapping[str, Work],
    *,
    rounds: int,
    reference: str = "eager",
    flop: float = 0.0,
    warm_up: Mapping[str, Work] | None = None,
) -> Row:
    """Time sides in turn: A B C, A B C.

    Args:
        name: Key of the row.
        what: In words.
        sides: What each does.
        rounds: That count.
        reference: Whose numbers are right.
        flop: Of the reference's work.
        warm_up: What each does before the rounds, where its work itself would take too long.
    """
    row = Row(name=name, what=what, reference=reference, sides={side: Side() for side in sides}, flop=flop)
    rates = [matrix_rate()]
    loads = [os.getloadavg()[0]]
    found: dict[str, Tensor] = {}
    for side in sides:
        _touch_memory()
        first_s, found[side] = timed((warm_up or sides)[side])
        row.sides[side].first_s = float("nan") if warm_up else first_s
        print(f"{name}: {side} is ready after {first_s:.1f} s", flush=True)
    for number in range(rounds):
        for side, work in sides.items():
            seconds, found[side] = timed(work)
            row.sides[side].seconds.append(seconds)
        loads.append(os.getloadavg()[0])
        shown = ", ".join(f"{side} {own.seconds[-1]:.3g}" for side, own in row.sides.items())
        print(f"{name}: round {number + 1} of {rounds}: {shown} s, load {loads[-1]:.1f}", flush=True)
    for side, own in row.sides.items():
        own.error = relative_error(found[side], found[reference])
    rates.append(matrix_rate())
    row.machine = {**machine(), "gflops": max(rates), "load": [min(loads), max(loads)]}
    return row


def _touch_memory() -> None:
    """Have the system find memory beforehand, whoever comes first.

    A virtual machine may get it from its host when it is touched: 5 GB were seen to take from half a second to 7 s.
    """
    free = free_memory(torch.device("cpu"))
    torch.empty(int(min(_TOUCHED_BYTES, free / 2)), dtype=torch.uint8).fill_(1)  # all of it, where nobody knows


def timed(work: Work) -> tuple[float, Tensor]:
    """Seconds, and what was made."""
    began = time.perf_counter()
    with torch.no_grad():
        found = work()
    return time.perf_counter() - began, found


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest number; 1 means that they have nothing in common."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def matrix_rate(size: int = 2048, tries: int = 4) -> float:
    """The best of a few matrix products in float32, GFLOP/s: what the machine can do just now."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = min(timed(lambda: a @ b)[0] for _ in range(tries))
    return 2 * size**3 / seconds / 1e9


def machine() -> dict[str, Any]:
    """What the numbers depend on beside the program."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    wide = next((name for name in ("avx512f", "avx2") if name in text), "")
    return f"{found[1] if found else platform.machine()} ({wide or 'no AVX2'})"


def table(rows: Sequence[Row]) -> str:
    """Rows as they are read in a terminal."""
    lines = []
    for row in rows:
        about = row.machine
        load = "-".join(f"{value:.1f}" for value in about.get("load", []))
        lines.append(
            f"\n{row.what} ({about.get('threads')} threads, load {load}, matrices {about.get('gflops', 0):.0f} GFLOP/s)"
        )
        for side, own in row.sides.items():
            ratios = row.ratios(side)
            rate = f"{row.flop / own.median / 1e9:6.0f} GF/s" if row.flop else ""
            lines.append(
                f"  {side:22}{own.median:9.3f} s{row.ratio(side):7.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
                f"{rate:>12}  error {own.error:.0e}  first {own.first_s:.1f} s"
            )
    return "\n".join(lines)


def save(rows: Sequence[Row], path: Path) -> None:
    """Add rows to a file; those of the same name are replaced."""
    known = {row.name: row for row in load(path)} if path.exists() else {}
    known.update({row.name: row for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in known.values()], indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> list[Row]:
    """Rows of a file."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**{**row, "sides": {name: Side(**own) for name, own in row["sides"].items()}}) for row in rows]
