"""Jobs that wait: so many and no more, the clients in turn, and like ones taken out together."""

from __future__ import annotations

from collections.abc import Iterator

from flagai_altdiff.merging import likeness
from flagai_altdiff.web.jobs import Job


class FullError(Exception):
    """No more jobs can wait."""


class WaitingRoom:
    """A bounded queue that is fair between clients.

    Each client has a line of its own, and the lines are served in turn: whoever asks for a hundred images delays
    others by one of them at a time.

    Args:
        most: Jobs that may wait.
        most_each: Jobs of one client.
    """

    def __init__(self, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._lines: dict[str, list[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Job]:
        """In the order in which they will be taken."""
        lines = list(self._lines.values())
        for place in range(max(map(len, lines), default=0)):
            yield from (line[place] for line in lines if place < len(line))

    def add(self, job: Job) -> None:
        """Let a job wait.

        Raises:
            FullError: There are too many.
        """
        line = self._lines.get(job.client, [])
        if len(self) >= self._most or len(line) >= self._most_each:
            raise FullError
        self._lines.setdefault(job.client, line).append(job)

    def remove(self, job: Job) -> bool:
        """Take a job out; whether it was there."""
        line = self._lines.get(job.client, [])
        if job not in line:
            return False
        line.remove(job)
        if not line:
            del self._lines[job.client]
        return True

    def position(self, job: Job) -> int:
        """How many jobs will be taken before it."""
        return next((place for place, other in enumerate(self) if other is job), 0)

    def take(self, most_images: int) -> list[Job]:
        """The next job, with those that can be drawn in one batch with it; none if nobody waits.

        Args:
            most_images: Of such a batch; a job alone may have more.
        """
        first = next(iter(self), None)
        if first is None:
            return []
        together, images, like = [first], first.count, _likeness(first)
        if like is not None:
            for job in self:
                if job is not first and images + job.count <= most_images and _likeness(job) == like:
                    together.append(job)
                    images += job.count
        served = first.client
        for job in together:
            self.remove(job)
        if served in self._lines:  # to the end of those who wait for their turn
            self._lines[served] = self._lines.pop(served)
        return together


def _likeness(job: Job) -> object:
    """What jobs must have in common to be drawn together."""
    own = likeness(job.task.request)
    return own and (own, job.task.model, job.task.loras)
