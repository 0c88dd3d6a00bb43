"""Drawing into a folder: numbered files as FlagAI names them, a grid, progress, and going on after an interruption."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import OutputError
from flagai_altdiff.images import NumberedFolder, grid_size, make_grid
from flagai_altdiff.metadata import grid_texts, png_texts
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import GenerationResult, Prompts, as_request, draw, prepare, say, unwrapped
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.request import GenerationRequest, Note, Output
from flagai_altdiff.runs import Run, find_grid, find_run, new_run
from flagai_altdiff.sampling import Step
from flagai_altdiff.sampling.schedule import timestep_grid

logger = logging.getLogger(__name__)


def draw_to_folder(
    model: LatentDiffusion,
    request: GenerationRequest | Prompts,
    output: Output | str | Path | None = None,
    *,
    callback: Callable[[Step], object] | None = None,
    **options: Any,
) -> GenerationResult:
    """Draw a request and save its images, each as soon as it is finished.

    Args:
        model: From ``load_model``.
        request: What to draw: a prompt, several, or a request.
        output: Where to: a folder, or more of it in an ``Output``; ``./AltDiffusionOutputs`` if left out.
        callback: Called after every sampler step.
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
    if not isinstance(output, Output):
        output = Output() if output is None else Output(folder=Path(output))
    request = as_request(request, options)
    output.check_resumable(request)
    resolved, notes = prepare(model, request)
    model = unwrapped(model)
    name = model.spec.name
    run = find_run(output.folder, resolved, name) if output.resume else new_run(resolved, name)
    if output.resume and not run.finished:
        logger.warning("no image of this very request lies in %s: everything is drawn", output.folder)
    home = output.folder.absolute()  # a program may change its folder while it draws
    numbered, grids = NumberedFolder(home / "samples", "%05d.png"), NumberedFolder(home, "grid-%04d.png")
    if not (output.skip_save and output.skip_grid):
        _prepare(grids, home)
    if not output.skip_save:
        _prepare(numbered, home / "samples")
    samples = dict(run.finished)
    batches = [len(batch) for batch in resolved.batches()]
    steps = len(batches) * len(timestep_grid(resolved.steps, model.num_timesteps))
    bar, hidden = bar_class(), not show_bars()
    with (  # one bar for the images, one below it for the steps towards them
        bar(total=sum(batches), initial=len(samples), desc="images", unit="image", disable=hidden) as image_bar,
        bar(total=steps, desc=resolved.sampler, unit="step", leave=False, disable=hidden) as step_bar,
    ):
        for event in draw(model, resolved, run.finished.keys()):
            if isinstance(event, Step):
                step_bar.update()
                if callback is not None:
                    callback(event)
                continue
            if not output.skip_save:
                with _saving(output.folder / "samples"):
                    file = numbered.save(event.image, png_texts(event, resolved, name, run.id))
                event.saved(output.folder / "samples" / file.name, file)
            if event.safety == "flagged":
                notes.append(
                    say(Note("flagged", f"image {event.index} was flagged by the safety checker and is black"))
                )
            samples[event.index] = event
            image_bar.update()
    result = GenerationResult(request=resolved, samples=[samples[i] for i in sorted(samples)], notes=notes)
    columns = output.columns or resolved.batch_size
    size = grid_size(sum(batches), columns, (resolved.width, resolved.height))
    result.grid_path = find_grid(output.folder, run, size) if output.resume else None
    if not output.skip_grid and result.grid_path is None:
        _save_grid(result, output, grids, run, name)
    result.seconds = time.perf_counter() - began
    return result


def _save_grid(result: GenerationResult, output: Output, grids: NumberedFolder, run: Run, name: str) -> None:
    """Make the grid; one that is too large is left out with a note, as the images are there."""
    count = len(result.samples)
    columns = output.columns or result.request.batch_size
    try:
        grid = make_grid((sample.image for sample in result.samples), count, columns)
    except (OSError, ValueError, MemoryError) as error:
        reason = str(error) or "there is not enough memory"
        result.notes.append(say(Note("grid", f"no grid was made: {reason}. All {count} images are there.")))
        return
    with _saving(output.folder):
        texts = grid_texts(result.samples[0], result.request, name, run.id)
        result.grid_path = output.folder / grids.save(grid, texts).name


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
