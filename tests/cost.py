"""What reading something hostile costs, in processor time and memory, against how large it is.

The bounds are meant for a machine of today that is not busy: elsewhere a second counts as long as the same work takes.
"""

from __future__ import annotations

import gc
import signal
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS_PER_MB = 1.0
MB_PER_MB = 64
USUAL_S = 0.0025
"""Processor time of :func:`_some_work` where a second is a second."""
GIVE_UP_S = 30
"""Processor time after which the block is ended, so that an endless one fails instead of hanging."""
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def in_proportion(size_bytes: int, *, seconds: float = SECONDS_PER_MB, megabytes: float = MB_PER_MB) -> Iterator[None]:
    """Fail if the block costs more than its input may; an error that the block raises is passed on after that.

    Processor time of this thread and the growth of the process's memory are counted; waiting, other threads and
    Python's collector of garbage, which looks through whatever the tests before have left, are not.

    Args:
        size_bytes: Of the input; less than a megabyte counts as one.
        seconds: Of processor time for each megabyte.
        megabytes: Of memory for each megabyte.
    """
    share, slowness = max(size_bytes / 1e6, 1.0), _some_work() / USUAL_S
    collects = gc.isenabled()
    gc.disable()
    before = signal.signal(signal.SIGVTALRM, _give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, GIVE_UP_S)
    start, memory = time.thread_time(), _Memory()
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        spent, grown = time.thread_time() - start, memory.grown_bytes()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if collects:
            gc.enable()
    allowed = seconds * share * max(slowness, _some_work() / USUAL_S, 1.0)
    assert spent <= allowed, f"{size_bytes} bytes cost {spent:.1f} s of processor time, {allowed:.1f} were allowed"
    assert grown <= megabytes * 1e6 * share, f"{size_bytes} bytes cost {grown / 1e6:.0f} MB of memory"
    if failure is not None:
        raise failure


def _some_work() -> float:
    """Processor time of a little work, in seconds."""
    start = time.thread_time()
    table = {str(number): number for number in range(10_000)}
    sum(table[str(number)] for number in range(10_000))
    return time.thread_time() - start


class _Memory:
    """The peak of the process's memory over what it has now; where the system does not tell it, Python's own."""

    def __init__(self) -> None:
        try:
            _CLEAR.write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            self._before = -1
            tracemalloc.start()

    def grown_bytes(self) -> int:
        if self._before >= 0:
            return max(_status("VmHWM") - self._before, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no end after {GIVE_UP_S} s of processor time")
