"""The processes that draw, seen from the server: started, listened to, and started again when one dies."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.messages import Cancel, Draw, Free, FromWorker, Ready, Skip, ToWorker
from flagai_altdiff.web.settings import Drawing

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0
_END_S = 2.0


class Worker:
    """One process.

    Args:
        device: Where it draws.
        settings: With what.
        hear: Called in the event loop with whatever it says.
        mourn: Called in the event loop when it has died, with the jobs that died with it.
    """

    def __init__(
        self,
        device: str,
        settings: Drawing,
        hear: Callable[[Worker, FromWorker], None],
        mourn: Callable[[Worker, Sequence[Job], str], None],
    ) -> None:
        self.device, self.restarts = device, 0
        self.jobs: dict[str, Job] = {}
        self.is_ready = self.was_ready = self.is_free = self.is_stopped = False
        self.gpu: Mapping[str, Any] | None = None
        self._settings, self._hear, self._mourn = settings, hear, mourn
        self._loop = asyncio.get_running_loop()
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._pause_s = _FIRST_PAUSE_S

    @property
    def pid(self) -> int | None:
        """Of the process."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the process; what it says is heard from now on."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, self._settings, self.device)
        self._process = context.Process(target=_run, args=arguments, daemon=True, name=f"altdiff {self.device}")
        self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, args=(self._connection, self._process), daemon=True).start()

    def draw(self, jobs: Sequence[Job]) -> None:
        """Give a free process something to draw."""
        self.is_free = False
        self.jobs = {job.id: job for job in jobs}
        self._send(Draw(tuple(job.task for job in jobs)))

    def cancel(self, job: Job) -> None:
        """Say that nobody wants a job any more."""
        self._send(Cancel(job.id))

    def skip(self, job: Job) -> None:
        """Say that nobody wants what is drawn of a job now."""
        self._send(Skip(job.id))

    def stop(self) -> None:
        """End the process, whatever it does."""
        self.is_stopped, self.is_ready = True, False
        if self._process is not None:
            self._process.kill()
            self._process.join(_END_S)

    def _send(self, message: ToWorker) -> None:
        with suppress(OSError):  # its death is heard elsewhere
            assert self._connection is not None
            self._connection.send(message)

    def _listen(self, connection: Connection, process: BaseProcess) -> None:
        """Hand what a process says to the event loop; ends with it."""
        with suppress(EOFError, OSError, RuntimeError):  # the last one: the loop is closed
            while True:
                message = connection.recv()
                self._loop.call_soon_threadsafe(self._take, message)
        process.join(_END_S)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._bury, process.exitcode)

    def _take(self, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self._pause_s, self.is_ready, self.was_ready = _FIRST_PAUSE_S, True, True
        elif isinstance(message, Free):
            self.is_free, self.jobs, self.gpu = True, {}, message.gpu
        self._hear(self, message)

    def _bury(self, status: int | None) -> None:
        if self.is_stopped:
            return
        how = f"signal {-status}" if status is not None and status < 0 else f"status {status}"
        logger.error("the process that draws on %s ended with %s; starting another", self.device, how)
        died, self.jobs, self.is_ready, self.is_free = list(self.jobs.values()), {}, False, False
        self.restarts += 1
        self._loop.call_later(self._pause_s, self._start_again)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self._mourn(self, died, how)

    def _start_again(self) -> None:
        if not self.is_stopped:
            self.start()


def _run(connection: Connection, settings: Drawing, device: str) -> None:
    """What the process does. The server itself loads no torch."""
    from flagai_altdiff.web.worker import run_worker

    run_worker(connection, settings, device)
