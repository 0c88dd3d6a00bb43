"""Work that runs side by side and stops together: at the first failure, or when the user interrupts."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol

PARALLEL = 4
"""Files of one model that are on their way at once."""
PATIENCE_S = 2.0
"""How long stopped threads are waited for; they write nothing after that."""


class Stopped(Exception):
    """Raised in a thread whose work is no longer wanted."""


class Readable(Protocol):
    """What a thread reads from another machine."""

    def shutdown(self) -> None:
        """End a read that waits."""
        ...


class Stop:
    """Tells threads to end, and wakes those that wait for a server or for the next try."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._answers: list[Readable] = []

    def set(self) -> None:
        """End the work."""
        self._asked.set()
        with self._lock:
            for answer in self._answers:
                with suppress(Exception):  # it may have ended by itself just now
                    answer.shutdown()

    def check(self) -> None:
        """Raise Stopped if the work has been ended."""
        if self._asked.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleep; raises Stopped as soon as the work is ended."""
        if self._asked.wait(seconds):
            raise Stopped

    @contextmanager
    def watching(self, answer: Readable) -> Iterator[None]:
        """While its body is read, ``set`` closes ``answer``."""
        with self._lock:
            self._answers.append(answer)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._answers.remove(answer)


def run_all(tasks: Sequence[Callable[[], None]], stop: Stop, limit: int = PARALLEL) -> None:
    """Run tasks in their order, several at once, until all are done or one fails.

    Args:
        tasks: What to do.
        stop: Set when a task fails or the caller is interrupted; the tasks watch it.
        limit: Most tasks at a time.

    Raises:
        Exception: The first failure.
    """
    waiting, failures = deque(tasks), list[BaseException]()

    def work() -> None:
        with suppress(IndexError, Stopped):
            while True:
                stop.check()
                task = waiting.popleft()
                try:
                    task()
                except Stopped:
                    raise
                except BaseException as failure:
                    failures.append(failure)
                    stop.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(limit, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S / len(threads))
        raise
    if failures:
        raise failures[0]
