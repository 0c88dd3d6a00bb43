"""A process that owns a device and draws what the server sends it, batch by batch; between two steps it listens."""

from __future__ import annotations

import io
import logging
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from flagai_altdiff.engine.plan import planning_of
from flagai_altdiff.errors import InsufficientMemoryError, OutputError
from flagai_altdiff.images import save_png
from flagai_altdiff.machine import give_back_memory
from flagai_altdiff.memory import check_memory
from flagai_altdiff.merging import count, merged
from flagai_altdiff.mini.things.knowing import hint
from flagai_altdiff.output import Filing, OpenFolder
from flagai_altdiff.pipeline import Sample, draw, prepare
from flagai_altdiff.registry import find_model
from flagai_altdiff.request import Note, Output, ResolvedRequest
from flagai_altdiff.sampling import Step
from flagai_altdiff.walks import step_counts
from flagai_altdiff.web.memory_report import gpu_memory
from flagai_altdiff.web.messages import (
    Cancel,
    Done,
    Draw,
    Drawn,
    Failed,
    Free,
    FromWorker,
    Problem,
    Progress,
    Ready,
    Refused,
    Skip,
    Task,
)
from flagai_altdiff.web.settings import Drawing
from flagai_altdiff.web.shelf import Loaded, Shelf

logger = logging.getLogger(__name__)

_BETWEEN_PREVIEWS_S, _SHARE = 0.1, 100
"""After the first of a drawing, previews come at most so often, and take at most a hundredth of the time."""
_REMEMBERED = 1000


def run_worker(connection: Connection, settings: Drawing, device: str) -> None:
    """Draw until the server goes away; where a process begins.

    Args:
        connection: To the server.
        settings: What it may draw with.
        device: Where it draws.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the server says when to stop
        signal.signal(number, signal.SIG_IGN)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the server is gone
        try:
            shelf = Shelf(settings, device)
            cards, missing = shelf.cards()
        except Exception as error:
            logger.debug("%s cannot draw", device, exc_info=True)
            problem = Problem.of(error)
            named = problem.code == "internal_error"  # as of torch, where there is no such device
            connection.send(Refused(replace(problem, text=f"{device}: {problem.text}") if named else problem))
            return
        with suppress(Exception):  # what is wrong with its files is said to whoever asks for it
            shelf.get(cards[0].name)
        connection.send(Ready(cards, missing))
        _Worker(connection, shelf, settings.folder, device).live()


@dataclass(eq=False)
class _Drawing:
    """A task in work, with the images that are still to come by their numbers within all that are drawn together."""

    task: Task
    request: ResolvedRequest
    notes: list[Note]
    filing: Filing
    rows: set[int] = field(default_factory=set)
    is_over: bool = False


class _Worker:
    def __init__(self, connection: Connection, shelf: Shelf, folder: Path | None, device: str) -> None:
        self._connection, self._shelf, self._folder, self._device = connection, shelf, folder, device
        self._waiting: deque[Draw] = deque()
        self._cancelled: deque[str] = deque(maxlen=_REMEMBERED)
        self._skipping: set[str] = set()
        self._next_preview = 0.0

    def live(self) -> None:
        """Draw what comes."""
        while True:
            self._say(Free(gpu_memory(self._device)))
            while not self._waiting:
                self._hear()
            self._draw(self._waiting.popleft().tasks)
            give_back_memory()

    def _say(self, message: FromWorker) -> None:
        self._connection.send(message)

    def _hear(self) -> None:
        order = self._connection.recv()
        if isinstance(order, Cancel):
            self._cancelled.append(order.id)
        elif isinstance(order, Skip):
            self._skipping.add(order.id)
        else:
            self._waiting.append(order)

    def _listen(self) -> None:
        """Hear all that the server has said up to now."""
        while self._connection.poll():
            self._hear()

    def _draw(self, tasks: Sequence[Task]) -> None:
        self._listen()
        tasks = [task for task in tasks if task.id not in self._cancelled]
        if not tasks:
            return
        try:
            loaded = self._shelf.get(tasks[0].model, tasks[0].loras)
        except Exception as error:
            for task in tasks:
                self._fail(task, error)
            return
        begun = [drawing for task in tasks if (drawing := self._begin(loaded, task))]
        if begun:
            self._draw_together(loaded, begun)

    def _begin(self, loaded: Loaded, task: Task) -> _Drawing | None:
        """Get ready for a task; ``None`` where it cannot be drawn, which is said."""
        try:
            request, notes = prepare(loaded.model, task.request)
            notes += self._hints(task)
            saved = self._folder is not None and task.is_saved
            output = Output(folder=self._folder or Path(), skip_grid=True, skip_save=not saved)
            try:
                filing = Filing(OpenFolder(output), request, loaded.model)
            except OutputError as error:
                notes.append(_not_saved(error))
                filing = Filing(OpenFolder(replace(output, skip_save=True)), request, loaded.model)
            return _Drawing(task, request, notes, filing)
        except Exception as error:
            self._fail(task, error)
            return None

    def _hints(self, task: Task) -> Iterator[Note]:
        """Which prompts name nothing the embedded model knows; looking takes time, so the server itself does not."""
        spec = find_model(task.model)
        if spec is not None and spec.embedded and not (task.loras or self._shelf.has_words):
            for text in filter(None, (hint(prompt, task.model) for prompt in dict.fromkeys(task.request.prompts))):
                yield Note("unknown", text)

    def _fail(self, task: Task, error: Exception) -> None:
        if Problem.of(error).code == "internal_error":
            logger.exception("job %s failed", task.id)
        self._say(Failed(task.id, Problem.of(error)))

    def _draw_together(self, loaded: Loaded, drawings: Sequence[_Drawing]) -> None:
        try:
            self._walk(loaded, drawings)
        except InsufficientMemoryError as error:
            if len(drawings) == 1:
                self._fail(drawings[0].task, error)
                return
            for drawing in drawings:
                if not drawing.is_over:
                    self._draw_together(loaded, [drawing])
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            for drawing in drawings:
                self._fail(drawing.task, error)

    def _walk(self, loaded: Loaded, drawings: Sequence[_Drawing]) -> None:
        """Draw tasks of one likeness as one; each ends by itself, and nothing is computed for those that have ended."""
        owners = [(drawing, index) for drawing in drawings for index in range(count(drawing.request))]
        for drawing in drawings:
            drawing.rows = {row for row, (owner, _) in enumerate(owners) if owner is drawing}
        request = merged([drawing.request for drawing in drawings])
        if len(drawings) > 1:  # each of them was found to fit when it was begun
            check_memory(request, planning_of(loaded.model), loaded.model.device)
        steps, batches = sum(step_counts(request, loaded.model.num_timesteps)), list(request.batches())
        begun, dropped, self._next_preview = 0, set[int](), 0.0
        for event in draw(loaded.model, request, dropped=dropped):
            begun += isinstance(event, Step) and event.index == 0
            dropped |= self._dropped(drawings, batches[max(begun - 1, 0)].indices)
            if isinstance(event, Step):
                self._show(loaded, event, owners, drawings, (begun - 1) * steps, len(batches) * steps)
            elif event.index in (drawing := owners[event.index][0]).rows:
                drawing.rows.remove(event.index)
                self._hand_over(drawing, replace(event, index=owners[event.index][1]))
            for drawing in drawings:
                if not drawing.rows and not drawing.is_over:
                    drawing.is_over = True
                    self._say(Done(drawing.task.id, tuple(note.text for note in drawing.notes)))
            if all(drawing.is_over for drawing in drawings):
                return

    def _dropped(self, drawings: Sequence[_Drawing], current: range) -> set[int]:
        """Images that will not come: of tasks that were cancelled, and the current ones of those that skip them."""
        self._listen()
        found = set[int]()
        for drawing in drawings:
            if drawing.task.id in self._cancelled:
                gone = set(drawing.rows)
            elif drawing.task.id in self._skipping:
                gone = drawing.rows & set(current)
                drawing.notes.append(Note("skipped", f"images that were skipped: {len(gone)}"))
            else:
                continue
            drawing.rows -= gone
            found |= gone
        self._skipping.clear()
        return found

    def _show(
        self,
        loaded: Loaded,
        step: Step,
        owners: Sequence[tuple[_Drawing, int]],
        drawings: Sequence[_Drawing],
        before: int,
        total: int,
    ) -> None:
        """Say how far a batch is, now and then with a picture of it."""
        began = time.monotonic()
        shows = began >= self._next_preview
        for drawing in drawings:
            if not drawing.rows:
                continue
            preview = None
            if shows:
                alone = len({id(owner) for owner, _ in owners}) == 1
                own = [row for row, (owner, _) in enumerate(owners) if owner is drawing]
                preview = loaded.previewer.jpeg(step.pred_x0 if alone else step.pred_x0[own])
            self._say(Progress(drawing.task.id, before + step.index + 1, total, preview))
        if shows:
            self._next_preview = began + max(_BETWEEN_PREVIEWS_S, _SHARE * (time.monotonic() - began))

    def _hand_over(self, drawing: _Drawing, sample: Sample) -> None:
        image = sample.image
        try:
            drawing.filing.save(sample)
        except OutputError as error:
            drawing.notes.append(_not_saved(error))
        png = None
        if sample.path is None:
            written = io.BytesIO()
            save_png(image, drawing.filing.texts(sample), written)
            png = written.getvalue()
        if sample.safety == "flagged":
            text = f"image {sample.index} was flagged by the safety checker and is black"
            drawing.notes.append(Note("flagged", text))
        self._say(
            Drawn(
                id=drawing.task.id,
                index=sample.index,
                prompt=sample.prompt,
                seed=sample.seed,
                safety=sample.safety,
                size=image.size,
                path=sample.path and sample.path.absolute(),
                png=png,
            )
        )


def _not_saved(error: OutputError) -> Note:
    logger.warning("%s", error)
    return Note("not saved", f"the image is in this answer only: {error}")
