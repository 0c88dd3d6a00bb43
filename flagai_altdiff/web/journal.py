"""Jobs as files: those that are not over, and how those ended that gave no images. A server that starts tells of them.

Several servers may share a folder: each holds a lock while it lives, and nobody tells of the jobs of one that does.
Every write is flushed to the disk by a thread of its own, one after the other; the event loop waits for none of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flagai_altdiff.files import new_file
from flagai_altdiff.web.messages import Problem, Task

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 23
_KEPT = 500
"""Jobs that are over and are still told of; older ones are forgotten."""


class Journal:
    """A file for each job.

    Args:
        folder: Where the images go; ``None`` keeps no journal.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.absolute() / ".jobs" if folder else None
        self._writer = ThreadPoolExecutor(1, "journal")
        self._written = dict[str, Future[None]]()
        self._ended: deque[str] = deque()
        self._name = secrets.token_hex(8)
        self._lock = _lock(self._folder / f"{self._name}.lock") if self._folder else None

    async def open(self, task: Task, created: float) -> None:
        """Remember a job: it is on the disk when this returns. A disk that refuses is logged, and the job goes on.

        Args:
            task: What is drawn; one whose images are not saved is not remembered.
            created: When it was accepted, in seconds since 1970.
        """
        if self._folder is not None and task.is_saved:
            await asyncio.wrap_future(self._later(_record(task, created)))

    def end(self, task: Task, created: float, state: str, problem: Problem | None) -> None:
        """Remember how a job ended that has not all of its images.

        Args:
            task: What was to be drawn.
            created: When it was accepted.
            state: As of a job.
            problem: Why.
        """
        if self._folder is not None and task.is_saved:
            self._later({**_record(task, created), "state": state, "error": problem and vars(problem)})
            self._ended.append(task.id)
            while len(self._ended) > _KEPT:
                self.close(self._ended.popleft())

    def close(self, job_id: str) -> None:
        """Forget a job: at once, unless it is still being written, or after that."""
        written = self._written.pop(job_id, None)
        if written is None or written.done():
            self._forget(job_id)
        else:
            self._writer.submit(self._forget, job_id)

    async def flush(self) -> None:
        """Wait until all that was said up to now is on the disk."""
        await asyncio.wrap_future(self._writer.submit(lambda: None))

    def leave(self) -> None:
        """Leave what is not drawn to the next server."""
        if self._lock is not None and self._lock.is_locked:
            _remove(self._lock)

    def left(self) -> Iterator[dict[str, Any]]:
        """What earlier servers accepted and did not draw, the newest first: as it was asked for, and its ``state``."""
        there = self._folder if self._folder and self._folder.is_dir() else None
        others = [file.stem for file in (there.glob("*.lock") if there else ()) if _is_held(file)]
        files = there.glob("*.json") if there else ()
        found = []
        for file in files:
            try:
                with file.open("rb") as opened:
                    own = json.loads(opened.read(_MAX_BYTES))
                if not isinstance(own, dict) or own.pop("server", None) in others:
                    continue
                if own.get("id") == file.stem and isinstance(own.get("created"), float):
                    found.append({"state": "interrupted", **own})
            except (OSError, ValueError, RecursionError) as error:
                logger.warning("%s cannot be read: %s", file, error)
        found.sort(key=lambda own: own["created"], reverse=True)
        self._ended.extendleft(own["id"] for own in found[:_KEPT])
        for own in found[_KEPT:]:
            self._forget(own["id"])
        yield from found[:_KEPT]

    def _later(self, record: dict[str, Any]) -> Future[None]:
        """Have a record written after all that was said before."""
        self._written[record["id"]] = future = self._writer.submit(self._write, record)
        return future

    def _write(self, record: dict[str, Any]) -> None:
        assert self._folder is not None
        job_id = record["id"]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            with new_file(self._folder / f"{job_id}.json", replace=True) as unfinished:
                text = json.dumps({**record, "server": self._name}, ensure_ascii=False)
                unfinished.write_text(text, encoding="utf-8")
        except OSError as error:
            logger.warning("job %s is not in the journal: %s", job_id, error)

    def _hold(self) -> None:
        """Show other servers that this one lives; where there are no locks, they take it for dead."""
        if self._lock is not None and not self._lock.is_locked:
            with suppress(OSError):
                self._lock.acquire(timeout=1)

    def _forget(self, job_id: str) -> None:
        if self._folder is not None:
            try:
                (self._folder / f"{job_id}.json").unlink(missing_ok=True)
            except OSError as error:
                logger.warning("job %s stays in the journal: %s", job_id, error)


def _record(task: Task, created: float) -> dict[str, Any]:
    return {"id": task.id, "created": created, "model": task.model, "request": task.request.as_json()}


def _lock(file: Path) -> FileLock:
    """A lock of the system's own, which is gone with the process that has it."""
    return FileLock(file, fallback_to_soft=False, thread_local=False)


def _is_held(file: Path) -> bool:
    """Whether a server lives; what a dead one left of its lock is removed."""
    lock = _lock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:
        return False
    _remove(lock)
    return False


def _remove(lock: FileLock) -> None:
    """Give up a lock that is held, its file first, so that nobody gets it in between."""
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
