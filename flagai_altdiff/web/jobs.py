"""A job: a request that somebody waits for, from the queue to its images. Lives in the server's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Literal

from flagai_altdiff.merging import count
from flagai_altdiff.web.messages import Drawn, Problem, Progress, Task

State = Literal["waiting", "drawing", "done", "failed", "cancelled", "interrupted"]
OVER: frozenset[State] = frozenset({"done", "failed", "cancelled", "interrupted"})


class JobError(Exception):
    """A job that ended without all its images.

    Args:
        problem: Why.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(problem.text)


@dataclass(eq=False, kw_only=True)
class Job:
    """A request on its way.

    Args:
        task: What is drawn.
        client: Who asked, for the queue to be fair.
    """

    task: Task
    client: str
    created: float = field(default_factory=time.time)
    state: State = "waiting"
    step: int = 0
    steps: int = 0
    began: float | None = None
    ended: float | None = None
    preview: bytes | None = None
    previews: int = 0
    images: list[Drawn] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    problem: Problem | None = None

    def __post_init__(self) -> None:
        self._version = 0
        self._changed = asyncio.Event()

    @property
    def id(self) -> str:
        """Its name, which cannot be guessed."""
        return self.task.id

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in OVER

    @property
    def count(self) -> int:
        """Images that it asks for."""
        return count(self.task.request)

    @property
    def size_bytes(self) -> int:
        """Of its images, as far as they lie in memory."""
        return sum(len(image.png or b"") for image in self.images)

    @property
    def seconds_left(self) -> float | None:
        """About how long it will still be drawn; ``None`` before that can be told."""
        if self.state != "drawing" or not self.step or self.began is None:
            return None
        return (time.time() - self.began) / self.step * (self.steps - self.step)

    def begin(self) -> None:
        """It is drawn now."""
        self.state, self.began = "drawing", time.time()
        self.change()

    def advance(self, progress: Progress) -> None:
        """Some steps are done."""
        self.step, self.steps = progress.step, progress.steps
        if progress.preview is not None:
            self.preview, self.previews = progress.preview, self.previews + 1
        self.change()

    def add(self, image: Drawn) -> None:
        """One of its images is there."""
        self.images.append(image)
        self.change()

    def end(self, state: State, problem: Problem | None = None, notes: tuple[str, ...] = ()) -> None:
        """Nothing more will come, so pictures that it began with are let go; only the first end counts."""
        if not self.is_over:
            self.task = replace(self.task, request=self.task.request.without_pixels())
            self.state, self.problem, self.notes = state, problem, (*self.notes, *notes)
            self.ended, self.preview = time.time(), None
            self.change()

    def change(self) -> None:
        """Wake everybody who watches."""
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, patience_s: float | None = None) -> AsyncIterator[bool]:
        """Its state, again and again until it is over: whoever is slow misses what was in between, and holds nobody up.

        Args:
            patience_s: Also say something when nothing has changed for so long.

        Yields:
            Whether anything has changed.
        """
        seen = -1
        while True:
            changed = self._changed
            if seen != self._version:
                seen = self._version
                yield True
                if self.is_over and seen == self._version:
                    return
                continue
            try:
                await asyncio.wait_for(changed.wait(), patience_s)
            except TimeoutError:
                yield False

    async def finished(self) -> Job:
        """Itself, once it is done.

        Raises:
            JobError: It ended in another way.
        """
        async for _ in self.watch():
            pass
        if self.state != "done":
            raise JobError(self.problem or Problem(code=self.state, text=f"the job was {self.state}"))
        return self
