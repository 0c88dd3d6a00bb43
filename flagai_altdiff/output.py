"""Drawing into a folder: numbered files as FlagAI names them, a grid, progress, and going on after an interruption."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import InvalidRequestError, OutputError, printable
from flagai_altdiff.images import NumberedFolder, grid_size, make_grid
from flagai_altdiff.metadata import grid_texts, png_texts
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pictures import Picture, as_mask
from flagai_altdiff.pipeline import (
    GenerationResult,
    Prompts,
    Sample,
    added_to,
    as_request,
    draw,
    prepare,
    say,
    unwrapped,
)
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.ranking import BestOf, check_choice
from flagai_altdiff.request import OPTIONS, GenerationRequest, Note, Output, ResolvedRequest
from flagai_altdiff.runs import MANY, Saved, find_grid, find_run, new_run
from flagai_altdiff.sampling import Step
from flagai_altdiff.walks import step_counts

logger = logging.getLogger(__name__)


def draw_to_folder(
    model: LatentDiffusion,
    request: GenerationRequest | Prompts,
    output: Output | OpenFolder | str | Path | None = None,
    *,
    callback: Callable[[Step], object] | None = None,
    best_of: BestOf | None = None,
    **options: Any,
) -> GenerationResult:
    """Draw a request and save its images, each as soon as it is finished.

    Args:
        model: From ``load_model``.
        request: What to draw: a prompt, several, or a request.
        output: Where to: a folder, or more of it in an ``Output``; ``./AltDiffusionOutputs`` if left out. For many
            calls one after the other, an ``OpenFolder``.
        callback: Called after every sampler step.
        best_of: Keeps the best images of each prompt only; all are kept if left out.
        options: Options of ``GenerationRequest``, where ``request`` is only prompts.

    Returns:
        The images by their files; what is not saved is kept in memory.

    Raises:
        InvalidRequestError: Something that cannot be drawn; nothing was drawn or written.
        InsufficientMemoryError: A batch does not fit into memory; the message has one that does.
        NotFiniteError: Sampling gave no image.
        OutputError: An image cannot be saved; those saved before stay.
    """
    began = time.perf_counter()
    place = output if isinstance(output, OpenFolder) else OpenFolder(_as_output(output))
    request = as_request(request, options)
    place.output.check_resumable(request)
    resolved, notes = prepare(model, request)
    if best_of is not None:
        check_choice(best_of.best, resolved)
    model = unwrapped(model)
    filing = Filing(place, resolved, model, best_of)
    events: Iterator[Step | Sample] = _with_bars(draw(model, resolved, filing.skip), resolved, model, len(filing.skip))
    for event in events if best_of is None else best_of.choose(events, resolved):
        if isinstance(event, Sample):
            filing.save(event)
            if event.safety == "flagged":
                text = f"image {event.index} was flagged by the safety checker and is black"
                notes.append(say(Note("flagged", text)))
        elif callback is not None:
            callback(event)
    result = GenerationResult(request=resolved, samples=filing.samples(), notes=notes, grid_path=filing.grid_path)
    if not place.output.skip_grid and result.grid_path is None:
        filing.save_grid(result)
    result.seconds = time.perf_counter() - began
    return result


def redraw(
    model: LatentDiffusion,
    record: Mapping[str, Any],
    output: Output | str | Path | None = None,
    *,
    pictures: Mapping[str, Any] | None = None,
) -> GenerationResult:
    """Draw an image again, to the same pixels on the same machine: in a batch as large as it was drawn in.

    Args:
        model: The one that drew it.
        record: What ``metadata.read_record`` says of its file.
        output: As for :func:`draw_to_folder`.
        pictures: ``init_image`` and ``mask_image``, where they are not where the record says.

    Raises:
        InvalidRequestError: The record asks for what cannot be drawn, a picture that is gone for one.
    """
    for name, value in (pictures or {}).items():
        _check_same(name, value, record.get(name))
    index, own = int(record["index"]), {name: record[name] for name in OPTIONS if name in record}
    per_prompt, iterations = int(own.get("images_per_prompt", 1)), int(own.get("iterations", 1))
    least = index // per_prompt + 1 if iterations == 1 else 1
    count = int(record.get("prompt_count") or least)
    request = GenerationRequest(
        **{**own, "seed": record["request_seed"], "prompts": (record["prompt"],) * count, **(pictures or {})}
    )
    resolved, notes = prepare(model, request)
    all_indices = {number for batch in resolved.batches() for number in batch.indices}
    if index not in all_indices:
        raise InvalidRequestError("index", index, f"the record says that there were {len(all_indices)} images")
    model = unwrapped(model)
    place = OpenFolder(replace(_as_output(output), skip_grid=True))
    filing = Filing(place, resolved, model, None, choice="redrawn")
    for event in draw(model, resolved, frozenset(all_indices - {index})):
        if isinstance(event, Sample):
            filing.save(event)
    return GenerationResult(request=resolved, samples=filing.samples(), notes=notes)


def _as_output(output: Output | str | Path | None) -> Output:
    if isinstance(output, Output):
        return output
    return Output() if output is None else Output(folder=Path(output))


def _check_same(name: str, given: object, recorded: object) -> None:
    """InvalidRequestError where a picture is not the one that a record tells of."""
    try:
        picture = as_mask(given)
    except ValueError as error:
        raise InvalidRequestError(name, given, str(error)) from error
    if isinstance(picture, Picture) and isinstance(recorded, Mapping) and picture.sha256 == recorded.get("sha256"):
        return
    if not isinstance(picture, Picture) and picture == recorded:
        return
    expected = "the very picture of the record; this one differs. A seed in place of it draws with another picture"
    raise InvalidRequestError(name, given, expected if recorded else "the record tells of no such picture")


def _with_bars(
    events: Iterator[Step | Sample], request: ResolvedRequest, model: LatentDiffusion, finished: int
) -> Iterator[Step | Sample]:
    """The events of a drawing, with one bar for the images and one below it for the steps towards them."""
    batches = [len(batch) for batch in request.batches()]
    steps = len(batches) * sum(step_counts(request, model.num_timesteps))
    bar, hidden = bar_class(), not show_bars()
    with (
        bar(total=sum(batches), initial=finished, desc="images", unit="image", disable=hidden) as image_bar,
        bar(total=steps, desc=request.sampler, unit="step", leave=False, disable=hidden) as step_bar,
    ):
        for event in events:
            (step_bar if isinstance(event, Step) else image_bar).update()
            yield event


class OpenFolder:
    """A folder for images, looked through once for however many calls.

    Args:
        output: Which one, and what is kept.

    Attributes:
        saved: What lay in it.
        samples: Its images, numbered.
        grids: Its grids, numbered.

    Raises:
        InvalidRequestError: A run of very many pictures has the folder for itself.
    """

    def __init__(self, output: Output) -> None:
        if (output.folder / MANY).exists():
            expected = f"a run of many pictures has it for itself ({MANY}); name another one, or go on with its command"
            raise InvalidRequestError("folder", str(output.folder), expected)
        self.output, self.saved = output, Saved(output.folder)
        home = output.folder.absolute()  # a program may change its folder while it draws
        self.samples, self.grids = NumberedFolder(home / "samples", "%05d.png"), NumberedFolder(home, "grid-%04d.png")

    def prepare(self) -> None:
        """Try it out, before hours of drawing."""
        home = self.output.folder.absolute()
        if not (self.output.skip_save and self.output.skip_grid):
            _prepare(self.grids, home)
        if not self.output.skip_save:
            _prepare(self.samples, home / "samples")


class Filing:
    """The files of one call.

    Args:
        place: Where they go.
        request: What is drawn.
        model: What draws.
        best_of: How the images to keep are chosen; all are kept if left out.
        choice: What else tells the call from others.

    Attributes:
        run: What the call's records are known by, and what it found.
        skip: Indices of the images that need not be drawn.
    """

    def __init__(
        self,
        place: OpenFolder,
        request: ResolvedRequest,
        model: LatentDiffusion,
        best_of: BestOf | None = None,
        choice: str = "",
    ) -> None:
        name, output = model.spec.name, place.output
        self._output, self._request, self._name = output, request, name
        self._added = added_to(model, request)
        choice = ", ".join(filter(None, [*map(str, self._added), best_of.key if best_of else "", choice]))
        self.run = find_run(place.saved, request, name, choice) if output.resume else new_run(request, name, choice)
        if output.resume and not self.run.finished:
            logger.warning(
                "no image of this very request lies in %s: everything is drawn", printable(str(output.folder))
            )
        self._samples = self.run.finished
        self._columns = output.columns or request.batch_size
        drawn = sum(len(batch) for batch in request.batches())
        kept = drawn // request.images_per_prompt * best_of.best if best_of else drawn
        size = grid_size(kept, self._columns, request.final_size)
        self.grid_path = find_grid(place.saved, self.run, size) if output.resume else None
        self.skip = best_of.finished(self._samples, request) if best_of else frozenset(self._samples)
        self._numbered, self._grids = place.samples, place.grids
        place.prepare()

    def samples(self) -> list[Sample]:
        """The images: by index, or the best of each prompt first."""
        per_prompt = self._request.images_per_prompt

        def place(sample: Sample) -> tuple[int, int]:
            return (sample.index // per_prompt, sample.fit.rank) if sample.fit else (sample.index, 0)

        return sorted(self._samples.values(), key=place)

    def texts(self, sample: Sample) -> dict[str, str]:
        """What the file of an image says."""
        return png_texts(sample, self._request, self._name, self.run.id, self._added)

    def save(self, sample: Sample) -> None:
        """Save an image, unless an earlier call has saved it."""
        if self._samples.setdefault(sample.index, sample) is not sample or self._output.skip_save:
            return
        folder = self._output.folder / "samples"
        with _saving(folder):
            file = self._numbered.save(sample.image, self.texts(sample))
        sample.saved(folder / file.name, file)

    def save_grid(self, result: GenerationResult) -> None:
        """Make the grid; one that is too large is left out with a note, as the images are there."""
        count = len(result.samples)
        try:
            grid = make_grid((sample.image for sample in result.samples), count, self._columns)
        except (OSError, ValueError, MemoryError) as error:
            reason = str(error) or "there is not enough memory"
            result.notes.append(say(Note("grid", f"no grid was made: {reason}. All {count} images are there.")))
            return
        with _saving(self._output.folder):
            texts = grid_texts(result.samples[0], self._request, self._name, self.run.id, self._added)
            result.grid_path = self._output.folder / self._grids.save(grid, texts).name


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Say what to do where a disk refuses."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Make room" if full else "See to it"
        text = f"{folder}: {error.strerror or error}. What was saved before stays. {advice}, and go on with resume."
        raise OutputError(text, error.errno) from error


def _prepare(folder: NumberedFolder, where: Path) -> None:
    """Try a folder out, before hours of drawing."""
    try:
        folder.prepare()
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = "it is not a folder"
        text = f"images cannot be saved in {where}: {reason}. Choose another folder; nothing was drawn."
        raise OutputError(text, getattr(error, "errno", None)) from error
