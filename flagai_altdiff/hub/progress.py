"""How far a download is: bars on a terminal, now and then a line in the log elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flagai_altdiff.progress import bar_class, show_bars

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Seconds between two lines in the log."""

Report = Callable[[int, int | None], None]
"""Called with the bytes of a file that are there, and with its size if that is known."""


def human(size_bytes: float) -> str:
    """A size as people read it, in decimal units."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} GB"


class Progress:
    """Progress of one model and of each of its files.

    Args:
        label: Name of the model.
        total_bytes: Size of everything that is to come, as far as it is known.
    """

    def __init__(self, label: str, total_bytes: int) -> None:
        self._label, self._total, self._lock = label, total_bytes, threading.Lock()
        self._done, self._began, self._said = 0, time.monotonic(), time.monotonic()
        self._shown = show_bars()
        self._bar = self._make_bar(label, total_bytes, leave=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    @contextmanager
    def file(self, name: str, size_bytes: int | None) -> Iterator[Report]:
        """Follow one file; what it yields takes the absolute position, which may also go back."""
        at = 0
        with self._make_bar(name, size_bytes, leave=False) as bar:

            def report(position: int, total: int | None) -> None:
                nonlocal at
                moved, at = position - at, position
                bar.total = total
                bar.update(moved)
                self._advance(moved)

            yield report

    def _make_bar(self, label: str, total: int | None, *, leave: bool) -> tqdm:  # type: ignore[type-arg]
        return bar_class()(total=total, unit="B", unit_scale=True, desc=label, disable=not self._shown, leave=leave)

    def _advance(self, moved: int) -> None:
        with self._lock:
            self._done += moved
            self._bar.update(moved)
            now = time.monotonic()
            if self._shown or now - self._said < EVERY_S:
                return
            self._said = now
            speed, share = self._done / (now - self._began), 100 * self._done / max(self._total, self._done, 1)
        logger.info("%s: %s, %.0f %%, %s/s", self._label, human(self._done), share, human(speed))
