"""Jobs as files: those that are not over, and how those ended that gave no images. A server that starts tells of them.

Every write is flushed to the disk by a thread of its own, one after the other; the event loop waits for none of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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

    def left(self) -> Iterator[dict[str, Any]]:
        """What earlier servers accepted and did not draw, the newest first: as it was asked for, and its ``state``."""
        files = self._folder.glob("*.json") if self._folder and self._folder.is_dir() else ()
        found = []
        for file in files:
            try:
                with file.open("rb") as opened:
                    own = json.loads(opened.read(_MAX_BYTES))
                if isinstance(own, dict) and own.get("id") == file.stem and isinstance(own.get("created"), float):
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
            with new_file(self._folder / f"{job_id}.json", replace=True) as unfinished:
                unfinished.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            logger.warning("job %s is not in the journal: %s", job_id, error)

    def _forget(self, job_id: str) -> None:
        if self._folder is not None:
            try:
                (self._folder / f"{job_id}.json").unlink(missing_ok=True)
            except OSError as error:
                logger.warning("job %s stays in the journal: %s", job_id, error)


def _record(task: Task, created: float) -> dict[str, Any]:
    return {"id": task.id, "created": created, "model": task.model, "request": task.request.as_json()}
