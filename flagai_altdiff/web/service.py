"""The engine room: jobs come in, wait their turn, are given to the processes that draw, and end. No HTTP."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, UnknownModelError
from flagai_altdiff.layout import pixels_of_a_step
from flagai_altdiff.merging import count
from flagai_altdiff.request import GenerationRequest, ResolvedRequest
from flagai_altdiff.web.crew import Worker
from flagai_altdiff.web.jobs import Job, State
from flagai_altdiff.web.journal import Journal
from flagai_altdiff.web.messages import (
    Done,
    Drawn,
    Failed,
    FromWorker,
    Lora,
    ModelCard,
    Problem,
    Progress,
    Ready,
    Refused,
    Task,
)
from flagai_altdiff.web.metrics import Metrics
from flagai_altdiff.web.prompts import PromptReader
from flagai_altdiff.web.settings import MIB, Settings
from flagai_altdiff.web.waiting import FullError, WaitingRoom

logger = logging.getLogger(__name__)

_REMEMBERED, _REMEMBERED_S, _REMEMBERED_BYTES = 500, 3600.0, 256 * MIB
"""Jobs that are over and are still told of, for how long, and how much memory their images may take."""
_MAX_LORA = 10.0
_GUESS_S = 5.0
"""How long a job takes, before any has been drawn."""


class BusyError(Exception):
    """A job that is not taken now.

    Args:
        text: Why.
        retry_after_s: When to ask again.
        is_stopping: Whether the server is about to end.
    """

    def __init__(self, text: str, retry_after_s: float, *, is_stopping: bool = False) -> None:
        self.retry_after_s, self.is_stopping = max(1, round(retry_after_s)), is_stopping
        super().__init__(text)


class Service:
    """Jobs and the processes that draw them.

    Args:
        settings: Of the server.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics = settings, Metrics()
        self.jobs: dict[str, Job] = {}
        self.cards: dict[str, ModelCard] = {}
        self.default_model = next(iter(settings.drawing.names))
        self.loras = tuple(sorted(file.stem for file in settings.drawing.loras))
        self.reader = PromptReader(settings.drawing, settings.limits.chunks)
        self.journal = Journal(settings.drawing.folder)
        self.earlier: dict[str, dict[str, Any]] = {own["id"]: own for own in self.journal.left()}
        """Jobs of earlier servers that have not all of their images, the newest first, by their ids."""
        self.is_stopping = False
        self._room = WaitingRoom(settings.limits.waiting, settings.limits.waiting_each)
        self._workers: list[Worker] = []
        self._ready = asyncio.Event()
        self._missing: dict[str, str] = {}
        self._refusal: Problem | None = None
        self._usual_s = _GUESS_S
        self.metrics.watch_waiting(lambda: len(self._room))

    def start(self) -> None:
        """Start the processes; jobs may be submitted once :meth:`ready` returns."""
        devices = self.settings.devices
        for device in devices:
            drawing = replace(self.settings.drawing, sharers=devices.count(device))
            worker = Worker(device, drawing, self._hear, self._mourn)
            self._workers.append(worker)
            worker.start()

    async def ready(self) -> None:
        """Wait until one of the processes can draw.

        Raises:
            FlagAIAltDiffError: None ever will, as there is no model to draw with.
        """
        await self._ready.wait()
        if self._refusal is not None:
            raise FlagAIAltDiffError(self._refusal.text)

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken, and something draws them."""
        return not self.is_stopping and any(worker.is_ready for worker in self._workers)

    @property
    def workers(self) -> Sequence[Worker]:
        """The processes."""
        return self._workers

    async def submit(
        self,
        options: Mapping[str, Any] | GenerationRequest,
        *,
        client: str,
        model: str | None = None,
        loras: Sequence[Lora] = (),
        is_saved: bool = True,
    ) -> Job:
        """Take a job; it is on the disk when this returns.

        Args:
            options: Of a request; a picture among them is an image, never a path.
            client: Who asks.
            model: One of the server's; its first if left out.
            loras: Names of the server's, with strengths.
            is_saved: Whether the images are filed.

        Raises:
            InvalidRequestError: It cannot be drawn, or is more than one request may ask for.
            UnknownModelError: Such a model is not served.
            BusyError: Too many wait, or the server is stopping or not ready.
        """
        card = self.card(model)
        request = options if isinstance(options, GenerationRequest) else GenerationRequest(**options)
        resolved = card.resolve(request)
        self._check_work(resolved, await self.reader.chunks(resolved, card.name), card.downsampling)
        self._check_open()
        task = Task(
            id=f"{self.settings.name}{'-' if self.settings.name else ''}{secrets.token_hex(8)}",
            request=resolved,
            model=card.name,
            loras=tuple(self._lora(name, strength) for name, strength in loras),
            is_saved=is_saved and self.settings.drawing.folder is not None,
        )
        job = Job(task=task, client=client, notes=tuple(note.text for note in resolved.other_sizes(request)))
        try:
            self._room.add(job)
        except FullError:
            self.metrics.refused.inc()
            wait = self.wait_s()
            text = f"{len(self._room)} jobs wait already; ask again in about {round(wait)} s"
            raise BusyError(text, wait) from None
        self.jobs[job.id] = job
        self._forget_old()
        try:
            await self.journal.open(task, job.created)
        except BaseException:  # whoever asked does not wait for it
            self.cancel(job, "the client went away")
            raise
        self._dispatch()
        return job

    def forget(self, job_id: str) -> dict[str, Any] | None:
        """Tell no more of a job of an earlier server; what was told, if there is one."""
        own = self.earlier.pop(job_id, None)
        if own is not None:
            self.journal.close(job_id)
        return own

    def card(self, name: str | None) -> ModelCard:
        """A model that is served, by its name in any case; the first one for none.

        Raises:
            UnknownModelError: There is no such model here.
            InvalidRequestError: It could not be had when the server started.
            BusyError: None is loaded yet.
        """
        self._check_open()
        known = {own.lower(): card for own, card in self.cards.items()}
        found = known.get((name or self.default_model).lower())
        if found is None:
            if name in self._missing:
                raise InvalidRequestError("model", name, f"it could not be had: {self._missing[name]}")
            raise UnknownModelError(str(name), self.cards)
        return found

    def cancel(self, job: Job, why: str = "it was cancelled") -> None:
        """End a job that nobody wants any more; what of it is there stays."""
        if job.is_over:
            return
        waited = self._room.remove(job)
        if not waited:
            for worker in self._workers:
                if job.id in worker.jobs:
                    worker.cancel(job)
        self._end(job, "cancelled", Problem(code="cancelled", text=why))
        if waited:
            self._tell_positions()

    def skip(self, job: Job) -> None:
        """Leave out what is drawn of a job now, and go on with the rest of it; nothing for one that is not drawn."""
        for worker in self._workers:
            if job.state == "drawing" and job.id in worker.jobs:
                worker.skip(job)

    def position(self, job: Job) -> int:
        """How many jobs are taken before this one."""
        return self._room.position(job)

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._room)

    @property
    def drawing(self) -> list[Job]:
        """Jobs that are drawn now."""
        return [job for worker in self._workers for job in worker.jobs.values() if job.state == "drawing"]

    def wait_s(self) -> float:
        """About how long a new job would wait."""
        return self._usual_s * (len(self._room) + 1) / max(len(self._workers), 1)

    async def stop(self) -> None:
        """Take no more jobs, let those that were begun end within the grace, and end the processes."""
        self.is_stopping = True
        again = Problem(code="stopping", text="the server is stopping; ask again when it is back")
        for job in list(self._room):
            self._room.remove(job)
            self._end(job, "interrupted", again)
        deadline = time.monotonic() + self.settings.limits.grace_s
        while self.drawing and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for job in self.drawing:
            self._end(job, "interrupted", again)
        for worker in self._workers:
            worker.stop()
        await self.journal.flush()
        self.journal.leave()

    def _check_open(self) -> None:
        if self.is_stopping:
            raise BusyError("the server is stopping; ask again when it is back", 10, is_stopping=True)
        if not self.cards:
            raise BusyError("no model is loaded yet; GET /readyz says when there is one", 5, is_stopping=True)

    def _check_work(self, request: ResolvedRequest, chunks: int, cell: int) -> None:
        self._check_margins(request)
        width, height = request.final_size
        pixels, images = max(width * height, pixels_of_a_step(request, cell)), count(request)
        work, most = pixels * (request.steps + chunks - 1) * images, self.settings.limits.work
        if work > most:
            name, value = ("images_per_prompt", images) if images > 1 else ("steps", request.steps)
            expected = (
                f"this server draws at most {most:,} pixels x steps x images for a request, and this is {work:,}; "
                "ask for fewer or smaller images, fewer steps, a shorter prompt, or windows that overlap less"
            )
            raise InvalidRequestError(name, value, expected)

    def _check_margins(self, request: ResolvedRequest) -> None:
        width, height = request.picture_size or (0, 0)
        most = self.settings.limits.picture_pixels
        if request.outpaint and width * height > most:
            expected = f"a picture may have {most:,} pixels here, and with these margins it has {width}x{height}"
            raise InvalidRequestError("outpaint", request.outpaint, expected)

    def _lora(self, name: str, strength: float) -> Lora:
        if name not in self.loras:
            there = f"expected one of {', '.join(self.loras)}" if self.loras else "this server has none"
            raise InvalidRequestError("loras", name, there)
        if not abs(strength) <= _MAX_LORA:  # NaN is none either
            raise InvalidRequestError("loras", strength, f"a strength from {-_MAX_LORA:g} to {_MAX_LORA:g}")
        return name, float(strength)

    def _forget_old(self) -> None:
        """Tell no more of jobs that were over long ago, or have too many after them; of the latest one in any case."""
        over = sorted((job for job in self.jobs.values() if job.is_over), key=lambda job: job.ended or 0, reverse=True)
        size_bytes, too_old = 0, time.time() - _REMEMBERED_S
        for place, job in enumerate(over):
            size_bytes += job.size_bytes
            is_too_much = place and job.size_bytes and size_bytes > _REMEMBERED_BYTES
            if is_too_much or place >= _REMEMBERED or (job.ended or 0) < too_old:
                del self.jobs[job.id]

    def _dispatch(self) -> None:
        """Give free processes something to draw."""
        for worker in self._workers:
            while worker.is_free and (jobs := self._room.take(self.settings.limits.batch)):
                for job in jobs:
                    job.begin()
                self.metrics.batch.observe(len(jobs))
                worker.draw(jobs)
        self._tell_positions()

    def _tell_positions(self) -> None:
        for job in self._room:
            job.change()

    def _hear(self, worker: Worker, message: FromWorker) -> None:
        if isinstance(message, Ready):
            self.cards, self._missing = {card.name: card for card in message.models}, dict(message.missing)
            self._ready.set()
        elif isinstance(message, Refused):
            self._refuse(worker, message.problem)
        elif isinstance(message, Progress | Drawn | Done | Failed):
            job = worker.jobs.get(message.id)
            if job is not None and not job.is_over:
                self._report(job, message)
        if worker.is_free:
            self._dispatch()

    def _refuse(self, worker: Worker, problem: Problem) -> None:
        """A process that could draw before is started again; others are given up, the server with the last one."""
        if not worker.was_ready:
            worker.stop()
            if all(other.is_stopped for other in self._workers):
                self._refusal = problem
                self._ready.set()
                return
        logger.error("the process on %s cannot draw: %s", worker.device, problem.text)

    def _report(self, job: Job, message: Progress | Drawn | Done | Failed) -> None:
        if isinstance(message, Progress):
            job.advance(message)
        elif isinstance(message, Drawn):
            self.metrics.images.inc()
            job.add(message)
        elif isinstance(message, Done):
            self._end(job, "done", notes=message.notes)
        else:
            self._end(job, "failed", message.problem)

    def _mourn(self, worker: Worker, died: Sequence[Job], how: str) -> None:
        self.metrics.restarts.inc()
        text = f"the process that drew it ended ({how}); nothing is wrong with other jobs. Ask again"
        for job in died:
            self._end(job, "failed", Problem(code="worker_died", text=text))

    def _end(self, job: Job, state: State, problem: Problem | None = None, notes: tuple[str, ...] = ()) -> None:
        job.end(state, problem, notes)
        self._forget_old()
        if state == "done":
            self.journal.close(job.id)
        elif state != "interrupted":  # which the next server tells by itself
            self.journal.end(job.task, job.created, state, problem)
        self.metrics.count(job)
        if state == "done" and job.began is not None and job.ended is not None:
            self._usual_s += 0.2 * (job.ended - job.began - self._usual_s)
