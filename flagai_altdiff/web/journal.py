"""Jobs that were accepted and are not over, as files: what a killed server leaves is told when it starts again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagai_altdiff.files import new_file
from flagai_altdiff.web.messages import Task

logger = logging.getLogger(__name__)

_MAX_BYTES = 1 << 20


class Journal:
    """A file for each open job.

    Args:
        folder: Where the images go; ``None`` keeps no journal.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.absolute() / ".jobs" if folder else None

    def open(self, task: Task, created: float) -> None:
        """Remember a job; a disk that refuses is logged, and the job goes on."""
        if self._folder is None or not task.is_saved:
            return
        own = {"id": task.id, "created": created, "model": task.model, "request": task.request.as_json()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with new_file(self._folder / f"{task.id}.json") as unfinished:
                unfinished.write_text(json.dumps(own, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            logger.warning("job %s is not in the journal: %s", task.id, error)

    def close(self, job_id: str) -> None:
        """Forget a job that is over."""
        if self._folder is not None:
            try:
                (self._folder / f"{job_id}.json").unlink(missing_ok=True)
            except OSError as error:
                logger.warning("job %s stays in the journal: %s", job_id, error)

    def left(self) -> Iterator[dict[str, Any]]:
        """What earlier servers accepted and did not finish, the newest first."""
        files = self._folder.glob("*.json") if self._folder and self._folder.is_dir() else ()
        found = []
        for file in files:
            try:
                with file.open("rb") as opened:
                    own = json.loads(opened.read(_MAX_BYTES))
                if isinstance(own, dict) and own.get("id") == file.stem and isinstance(own.get("created"), float):
                    found.append(own)
            except (OSError, ValueError, RecursionError) as error:
                logger.warning("%s cannot be read: %s", file, error)
        yield from sorted(found, key=lambda own: own["created"], reverse=True)
