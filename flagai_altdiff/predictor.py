"""Predictor: FlagAI's call with FlagAI's argument names -> a request -> files."""

from __future__ import annotations

import errno
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from tqdm import tqdm

from flagai_altdiff.errors import InvalidRequestError, OutputError
from flagai_altdiff.images import make_grid, save_numbered
from flagai_altdiff.metadata import grid_texts, png_texts
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import GenerationResult, prepare, stream
from flagai_altdiff.request import GenerationRequest, parse_prompt_file
from flagai_altdiff.runs import Run, check_resumable, find_run, new_run
from flagai_altdiff.sampling import Step
from flagai_altdiff.sampling.schedule import step_count

logger = logging.getLogger(__name__)

DEFAULT_OUTPATH = "AltDiffusionOutputs"


class Predictor:
    """Draws pictures with a loaded model and files them as FlagAI does.

    Args:
        model: From ``AutoLoader.get_model()`` or ``load_model``.
        tokenizer: FlagAI's second argument; the model brings its own, so it is not needed.
    """

    def __init__(self, model: LatentDiffusion, tokenizer: object = None) -> None:
        if not isinstance(model, LatentDiffusion):
            raise TypeError(f"Predictor draws with a LatentDiffusion model, got {type(model).__name__}.")
        self.model = model
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer

    def predict_generate_images(
        self,
        prompt: str | Sequence[str] | None = None,
        outpath: str | Path = DEFAULT_OUTPATH,
        n_samples: int = 4,
        n_rows: int = 0,
        skip_grid: bool = False,
        skip_save: bool = False,
        ddim_steps: int | None = None,
        n_iter: int = 1,
        plms: bool = False,
        fixed_code: bool = False,
        ddim_eta: float = 0.0,
        H: int | None = None,
        W: int | None = None,
        C: int | None = None,
        f: int | None = None,
        scale: float | None = None,
        from_file: str | Path | None = None,
        seed: int | None = 34234,
        negative_prompt: str = "",
        *,
        sampler: str | None = None,
        seed_mode: str = "batch",
        callback: Callable[[Step], object] | None = None,
        resume: bool = False,
        out_path: str | Path | None = None,
        ddim_step: int | None = None,
    ) -> GenerationResult:
        """Draw pictures and save them as ``samples/00000.png …`` and ``grid-0000.png …``.

        What is left out, the model decides: 512 x 512 pixels, 50 steps and scale 7.5 for the released models.

        Args:
            prompt: A prompt, or several: n_samples pictures of each.
            outpath: Folder for the pictures; ``out_path`` is the same.
            n_samples: Pictures of each prompt, drawn together.
            n_rows: Pictures per row of the grid; 0 means n_samples.
            skip_grid: Make no grid.
            skip_save: Save no single pictures.
            ddim_steps: Sampler steps, 1 to 1000; ``ddim_step`` is the same.
            n_iter: How often to draw everything.
            plms: Use the PLMS sampler.
            fixed_code: Start every batch from the same noise.
            ddim_eta: Share of fresh noise in DDIM, 0 to 1.
            H: Height in pixels.
            W: Width in pixels.
            C: Latent channels; only the model's own number is valid.
            f: Pixels per latent cell; only the model's own number is valid.
            scale: Guidance scale; 1 turns guidance off.
            from_file: Text file with a prompt per line, drawn once each, n_samples at a time; replaces ``prompt``.
            seed: 0 to 2**32 - 1; -1 or None draws one.
            negative_prompt: What the pictures must not show.
            sampler: ``"ddim"``, ``"plms"``, ``"dpmpp_2m"`` or ``"euler_ancestral"``.
            seed_mode: ``"batch"`` for FlagAI's random numbers, ``"per_image"`` for pictures independent of their batch.
            callback: Called with each sampler step.
            resume: Go on with the latest run of this very request in ``outpath``: draw what it lacks.

        Returns:
            The pictures with their paths, seeds and safety verdicts.

        Raises:
            InvalidRequestError: An argument outside its range; nothing was drawn or written.
            UnknownSamplerError: No such sampler.
            InsufficientMemoryError: A batch does not fit into memory; the message has one that does.
            NotFiniteError: Sampling gave no picture.
            OutputError: A picture cannot be saved; those saved before stay.
        """
        outpath = outpath if out_path is None else out_path
        if isinstance(n_rows, bool) or not isinstance(n_rows, int) or n_rows < 0:
            raise InvalidRequestError("n_rows", n_rows, "expected 0 (as many as n_samples) or a whole number above it")
        if resume:
            check_resumable(seed, skip_save)
        if plms and sampler not in (None, "plms"):
            raise InvalidRequestError("plms", True, f"contradicts sampler={sampler!r}; leave one of them out")
        self._check_latents("C", C, self.model.channels)
        self._check_latents("f", f, self.model.config.first_stage.downsampling)
        try:
            request = prepare(
                self.model,
                GenerationRequest(
                    prompts=_prompts(prompt, from_file),
                    negative_prompt=negative_prompt,
                    height=H,
                    width=W,
                    steps=ddim_steps if ddim_step is None else ddim_step,
                    guidance_scale=scale,
                    sampler=sampler or ("plms" if plms else "ddim"),
                    eta=ddim_eta,
                    seed=seed,
                    seed_mode=seed_mode,
                    images_per_prompt=1 if from_file else n_samples,
                    batch_size=n_samples,
                    iterations=n_iter,
                    fixed_code=fixed_code,
                ),
            )
        except InvalidRequestError as error:
            raise _as_typed(error, {} if ddim_step is None else {"steps": "ddim_step"}) from None
        name = self.model.spec.name
        run = find_run(Path(outpath), request, name) if resume else new_run(request, name)
        return self._run(request, run, Path(outpath), n_rows or n_samples, skip_grid, skip_save, callback)

    def _check_latents(self, name: str, value: int | None, own: int) -> None:
        if value is not None and value != own:
            raise InvalidRequestError(name, value, f"this model's is {own}; leave {name} out")

    def _run(
        self,
        request: GenerationRequest,
        run: Run,
        outpath: Path,
        columns: int,
        skip_grid: bool,
        skip_save: bool,
        callback: Callable[[Step], object] | None,
    ) -> GenerationResult:
        start = time.perf_counter()
        batches = [len(prompts) for prompts in request.batches()]
        assert request.steps is not None
        steps = len(batches) * step_count(request.steps, self.model.num_timesteps)
        name = self.model.spec.name
        if not (skip_save and skip_grid):
            _check_folder(outpath)
        pictures = dict(run.finished)
        with (  # one bar for the pictures, one below it for the steps towards them; none unless a person looks on
            tqdm(total=sum(batches), initial=len(pictures), desc="pictures", unit="picture", disable=None) as picture_bar,
            tqdm(total=steps, desc=request.sampler, unit="step", disable=None, leave=False) as step_bar,
        ):
            for event in stream(self.model, request, run.finished.keys()):
                if isinstance(event, Step):
                    step_bar.update()
                    if callback is not None:
                        callback(event)
                    continue
                for picture in event:
                    if picture.index in run.finished:
                        continue
                    if not skip_save:
                        texts = png_texts(picture, request, name, run.id)
                        with _saving(outpath / "samples"):
                            picture.path = save_numbered(picture.image, outpath / "samples", "%05d.png", texts, scratch=outpath)
                    if picture.safety == "flagged":
                        logger.warning("picture %d was flagged by the safety checker and is black", picture.index)
                    pictures[picture.index] = picture
                    picture_bar.update()
        result = GenerationResult(request=request, pictures=[pictures[i] for i in sorted(pictures)], grid_path=run.grid_path)
        if not skip_grid and run.grid_path is None:
            grid = make_grid(result.images, columns)
            with _saving(outpath):
                texts = grid_texts(result.pictures[0], request, name, run.id)
                result.grid_path = save_numbered(grid, outpath, "grid-%04d.png", texts)
        result.seconds = time.perf_counter() - start
        return result


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Say what to do where a disk refuses."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "Make room" if full else "See to it"
        text = f"{folder}: {error.strerror}. What was saved before stays. {advice}, and go on with resume."
        raise OutputError(text, error.errno) from error


def _check_folder(outpath: Path) -> None:
    """Make the folder and a file in it, before hours of drawing."""
    try:
        outpath.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outpath):
            pass
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        text = f"pictures cannot be saved in {outpath}: {reason}. Choose another folder; nothing was drawn."
        raise OutputError(text, error.errno) from error


def _prompts(prompt: str | Sequence[str] | None, from_file: str | Path | None) -> tuple[str, ...]:
    if from_file:
        try:
            return tuple(parse_prompt_file(Path(from_file).read_bytes(), str(from_file)))
        except OSError as error:
            raise InvalidRequestError("from_file", str(from_file), f"cannot be read: {error.strerror}") from error
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, Sequence):
        raise InvalidRequestError("prompt", prompt, "expected a text or a list of texts")
    return tuple(prompt)


def _as_typed(error: InvalidRequestError, typed: Mapping[str, str]) -> InvalidRequestError:
    """The same error under the argument's FlagAI name, or the name that the caller ``typed`` for it."""
    legacy = {f.name: f.metadata["option"].legacy for f in fields(GenerationRequest)}
    return InvalidRequestError({**legacy, **typed}.get(error.field, error.field), error.value, error.expected)
