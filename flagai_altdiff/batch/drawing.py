"""A process's share of a run, drawn under Lightning's predict loop."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

from pytorch_lightning import LightningModule

from flagai_altdiff.batch.places import Drawn, Places
from flagai_altdiff.batch.ranks import make_trainer, quiet
from flagai_altdiff.batch.work import Lot, Work
from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.evaluation.measuring import Share
from flagai_altdiff.merging import MergedRequest
from flagai_altdiff.metadata import png_texts
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import Sample, added_to, draw, examine, say
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.request import MAX_SEED, Note, ResolvedRequest

_REPORT_EVERY = 1000
_MOST_NOTES = 20
_BEHIND = 2
"""Lots that may wait for the disk."""


class NotWanted(Exception):
    """Whoever started this process is gone."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is drawn, by what, and where to.

    Args:
        model: The model, on the device of this process.
        work: What.
        places: Where to.
        id: What the records of its pictures are known by.
    """

    model: LatentDiffusion
    work: Work
    places: Places
    id: str


def check(model: LatentDiffusion, work: Work) -> None:
    """InvalidRequestError, with the line, where a model cannot draw what is asked for, here and now."""
    for line, lot in work.checks():
        try:
            examine(model, lot.request())
        except FlagAIAltDiffError as error:
            raise work.wrong(line, error) from None


@dataclass
class Tally:
    """What a process did.

    Args:
        share: Which of the processes it was.
        drawn: Pictures that it drew.
        there: Pictures of its share that were there already.
        flagged: Pictures that the safety checker made black.
        seconds: Since it began.
        drawing_s: So many of them were spent in the model.
    """

    share: Share
    drawn: int = 0
    there: int = 0
    flagged: int = 0
    seconds: float = 0.0
    drawing_s: float = 0.0

    def __str__(self) -> str:
        each = f", {self.seconds / self.drawn:.2f} s each" if self.drawn else ""
        there = f", {self.there:,} were there" if self.there else ""
        black = f", {self.flagged:,} of them flagged and black" if self.flagged else ""
        outside = f", {1 - self.drawing_s / self.seconds:.1%} of the time outside the model" if self.drawn else ""
        return f"share {self.share.rank} of {self.share.processes}: {self.drawn:,} drawn{each}{there}{black}{outside}"


def draw_share(
    run: Run,
    devices: int = 1,
    nodes: int = 1,
    *,
    is_wanted: Callable[[], bool] = lambda: True,
    report: Callable[[Tally], object] = lambda tally: None,
) -> Tally:
    """Draw what this process has to draw of a run, and nothing that is there.

    Args:
        run: The run.
        devices: Processes of a machine.
        nodes: Machines.
        is_wanted: Asked before each lot; where it says no, the process ends.
        report: Called after each thousand pictures.

    Returns:
        What it did.

    Raises:
        ConfigError: There are not so many devices, or another number of processes was started.
        OutputError: The disk refuses.
        NotFiniteError: Sampling gave no image.
    """
    quiet()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = make_trainer(run.model.device, devices, nodes)
    tally = Tally(Share(trainer.global_rank, trainer.world_size))
    drawing = _Drawing(run, tally, is_wanted, report)
    try:
        trainer.predict(drawing, dataloaders=_Missing(run, tally), return_predictions=False)
        drawing.disk.finish()
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        raise error.__context__ or error from None
    finally:
        drawing.close()
        run.places.close()
        drawing.look_at_clock()
    return tally


class _Missing:
    """The lots of a share that are not there yet, each found when the one before is drawn."""

    def __init__(self, run: Run, tally: Tally) -> None:
        self._run, self._tally = run, tally

    def __iter__(self) -> Iterator[tuple[int, int, frozenset[int]]]:
        places = self._run.places
        for unit in self._tally.share.of(len(places)):
            lots, lacking = places.lots(unit), places.lacks(unit)
            self._tally.there += sum(map(self._run.work.size, lots)) - len(lacking)
            if lacking:
                yield from ((unit, lot, lacking) for lot in lots)


class _Disk:
    """Writes behind the drawing, in the order in which it is asked to, and not far behind."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def write(self, task: Callable[[], None]) -> None:
        """Have something written; errors of what was to be written before come out here."""
        while len(self._waiting) >= _BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(task))

    def finish(self) -> None:
        """Wait until all is written."""
        while self._waiting:
            self._waiting.popleft().result()

    def stop(self) -> None:
        """Write nothing more."""
        self._thread.shutdown(cancel_futures=True)


class _Drawing(LightningModule):
    """The loop's step: a lot is drawn, and handed over to be written."""

    def __init__(
        self, run: Run, tally: Tally, is_wanted: Callable[[], bool], report: Callable[[Tally], object]
    ) -> None:
        super().__init__()
        self.model = run.model
        self.disk = _Disk()
        self._run_of, self._tally, self._is_wanted, self._report = run, tally, is_wanted, report
        self._told: set[str] = set()
        self._began = time.perf_counter()
        count = sum(sum(map(run.work.size, run.places.lots(unit))) for unit in tally.share.of(len(run.places)))
        hidden = tally.share.rank > 0 or not show_bars()
        self._bar = bar_class()(total=count, desc="images", unit="image", disable=hidden)

    def predict_step(self, batch: tuple[int, int, frozenset[int]], batch_idx: int) -> int:
        """Draw a lot; how many pictures it gave."""
        if not self._is_wanted():
            raise NotWanted
        unit, number, lacking = batch
        run = self._run_of
        lot = run.work[number]
        request, notes = examine(self.model, lot.request())
        self._say(notes)
        skip = frozenset(row for row, picture in enumerate(lot.pictures) if picture not in lacking)
        began = time.perf_counter()
        found = [event for event in draw(self.model, _seeded(request, lot), skip) if isinstance(event, Sample)]
        self._count(found, time.perf_counter() - began)
        self.disk.write(lambda: run.places.put(unit, number, [_drawn(sample, request, lot, run) for sample in found]))
        return len(found)

    def _count(self, found: list[Sample], drawing_s: float) -> None:
        tally, before = self._tally, self._tally.drawn
        tally.drawn += len(found)
        tally.flagged += sum(sample.safety == "flagged" for sample in found)
        tally.drawing_s += drawing_s
        self._bar.n = tally.drawn + tally.there
        self._bar.refresh()
        self.look_at_clock()
        if tally.drawn // _REPORT_EVERY > before // _REPORT_EVERY:
            self._report(tally)

    def look_at_clock(self) -> None:
        """Note how long it takes so far."""
        self._tally.seconds = time.perf_counter() - self._began

    def close(self) -> None:
        """End the bar, and write nothing more."""
        self._bar.close()
        self.disk.stop()

    def _say(self, notes: list[Note]) -> None:
        for note in notes:
            if note.text not in self._told and len(self._told) < _MOST_NOTES:
                self._told.add(note.text)
                say(note)


def _seeded(request: ResolvedRequest, lot: Lot) -> MergedRequest:
    """The request with a seed of its own for each picture."""
    shared, count = {f.name: getattr(request, f.name) for f in fields(ResolvedRequest)}, len(lot.prompts)
    negatives, scales = (request.negative_prompt,) * count, (request.guidance_scale,) * count
    return MergedRequest(**shared, seeds=lot.seeds, negatives=negatives, scales=scales)


def _drawn(sample: Sample, request: ResolvedRequest, lot: Lot, run: Run) -> Drawn:
    """A picture with its record, which is that of a request of its lot's size, so that it can be drawn again alone."""
    model, row = run.model, sample.index
    own = replace(request, prompts=("",) * len(lot.prompts), seed=(sample.seed - row) % (MAX_SEED + 1))
    texts = png_texts(sample, own, model.spec.name, run.id, added_to(model, request))
    return Drawn(number=lot.first + row, prompt=sample.prompt, image=sample.image, texts=texts)
