"""Prompts -> states -> latents -> images: the one algorithm behind every door. No files, no prints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flagai_altdiff.added import PRECISION, Added, AddedPart
from flagai_altdiff.canvas import Canvas, make_canvas, make_frame
from flagai_altdiff.conditioning import cut_prompts, encode_prompts
from flagai_altdiff.engine import Engine, check_engine, make_engine, precision_of
from flagai_altdiff.engine.openvino import has_half_precision
from flagai_altdiff.engine.plan import planning_of
from flagai_altdiff.errors import InvalidRequestError, NotFiniteError, shown
from flagai_altdiff.images import load_image, to_pil
from flagai_altdiff.layout import circular_axes
from flagai_altdiff.memory import check_memory, memory_advice
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.noise import CallNoise
from flagai_altdiff.placement import weights_at_home_afterwards
from flagai_altdiff.prompt_syntax import has_weights, read_as_text
from flagai_altdiff.request import Batch, GenerationRequest, Note, ResolvedRequest
from flagai_altdiff.sampling import Step
from flagai_altdiff.sampling.schedule import timestep_grid
from flagai_altdiff.walks import (
    check_stretches,
    condition,
    decoded,
    step_counts,
    stretches_of,
    walk_latents,
)

logger = logging.getLogger(__name__)

Prompts = str | Sequence[str]

VERDICTS = ("safe", "flagged", "unchecked")
"""What the safety checker says of an image, or that there is none."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well an image fits its prompt.

    Args:
        judge: Name of the matching model that says so.
        similarity: Cosine similarity, -1 to 1.
        rank: 1 for the best of the prompt's images.
        of: How many there were.
    """

    judge: str
    similarity: float
    rank: int
    of: int


@dataclass(kw_only=True)
class Sample:
    """One finished image with what is known of it.

    Args:
        prompt: Its prompt.
        index: Its number within the request, from 0.
        seed: Its own seed where seeds are per image, else the seed of the request.
        safety: One of ``VERDICTS``.
        fit: How well it fits its prompt, where that was judged.
        path: Where it is saved, if it is.
    """

    prompt: str
    index: int
    seed: int
    safety: str
    fit: Fit | None = None
    path: Path | None = None
    _image: Image.Image | None = field(default=None, repr=False)
    _file: Path | None = field(default=None, repr=False)

    @property
    def image(self) -> Image.Image:
        """The image; black where it was flagged. One that is saved is read from its file, and not kept in memory."""
        if self._image is not None:
            return self._image
        file = self._file or self.path
        assert file is not None
        return load_image(file)

    def saved(self, path: Path, file: Path) -> None:
        """Remember where the image is, as the user says it and absolutely, and let go of the pixels."""
        self.path, self._file, self._image = path, file, None


@dataclass(kw_only=True)
class GenerationResult:
    """Everything that a generation gave.

    Args:
        request: The request, with the model's defaults and the seed filled in.
        samples: In the order of the request.
        notes: What the user should know, for example what a prompt lost.
        grid_path: Where the grid is saved, if it is.
        seconds: Wall time.
    """

    request: ResolvedRequest
    samples: list[Sample] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    grid_path: Path | None = None
    seconds: float = 0.0

    @property
    def images(self) -> list[Image.Image]:
        """The images, all of them in memory now."""
        return [sample.image for sample in self.samples]

    @property
    def paths(self) -> list[Path]:
        """Files of the saved images."""
        return [sample.path for sample in self.samples if sample.path is not None]

    @property
    def seeds(self) -> list[int]:
        """Seed of each image; with ``seed_mode="batch"`` all have the request's."""
        return [sample.seed for sample in self.samples]

    @property
    def safety(self) -> list[str]:
        """Verdict on each image."""
        return [sample.safety for sample in self.samples]


def generate(
    model: LatentDiffusion,
    request: GenerationRequest | Prompts,
    *,
    callback: Callable[[Step], object] | None = None,
    **options: Any,
) -> GenerationResult:
    """Draw what a request asks for: ``generate(model, "a cat", steps=20)``.

    Any number of threads may draw with one model at once. Nothing of the process is changed, not its random numbers.

    Args:
        model: From ``load_model``.
        request: What to draw: a prompt, several, or a request.
        callback: Called after every sampler step.
        options: Options of ``GenerationRequest``, where ``request`` is only prompts.

    Returns:
        Images with prompts, seeds and safety verdicts, and notes.

    Raises:
        InvalidRequestError: An option is wrong, or the model cannot draw this size.
        InsufficientMemoryError: A batch does not fit into memory.
        NotFiniteError: Sampling gave no image.
    """
    began = time.perf_counter()
    resolved, notes = prepare(model, request, **options)
    result = GenerationResult(request=resolved, notes=notes)
    for event in draw(model, resolved):
        if isinstance(event, Sample):
            result.samples.append(event)
        elif callback is not None:
            callback(event)
    result.seconds = time.perf_counter() - began
    return result


def prepare(
    model: LatentDiffusion, request: GenerationRequest | Prompts, **options: Any
) -> tuple[ResolvedRequest, list[Note]]:
    """The request as a model will carry it out, checked before any work, and what its user should know.

    Args:
        model: The model.
        request: As for :func:`generate`.
        options: As for :func:`generate`.

    Raises:
        InvalidRequestError: An option is wrong, or the model cannot draw this size.
        InsufficientMemoryError: A batch of this size cannot fit into memory.
    """
    resolved, notes = examine(model, as_request(request, options))
    return resolved, [say(note) for note in notes]


def examine(model: LatentDiffusion, request: GenerationRequest) -> tuple[ResolvedRequest, list[Note]]:
    """What :func:`prepare` gives, without a word to the log."""
    model = unwrapped(model)
    resolved = _resolved(model, request)
    if resolved.steps > model.num_timesteps:
        raise InvalidRequestError(
            "steps", resolved.steps, f"this model has {model.num_timesteps} timesteps; ask for fewer"
        )
    _check_strengths(resolved, model.num_timesteps)
    check_stretches(resolved, model.config.first_stage.downsampling)
    make_frame(resolved)
    check_engine(model, resolved, circular_axes(resolved))
    check_memory(resolved, planning_of(model), model.device)
    notes = list(_changes(model, request, resolved))
    if resolved.prompt_syntax == "plain":
        texts = [part for prompt in resolved.prompts for part in stretches_of(prompt, resolved)]
        notes += cut_prompts(model, (*texts, resolved.negative_prompt))
    notes += _syntax(resolved)
    return resolved, notes


def _syntax(request: ResolvedRequest) -> Iterator[Note]:
    """Where a prompt looks as if it were to be read in another way."""
    texts = (*request.prompts, request.negative_prompt)
    if request.prompt_syntax == "plain":
        for prompt in [*filter(has_weights, texts)][:1]:
            text = (
                f"{shown(prompt, 60)} seems to have weights: it is read as it stands, unless prompt_syntax='weighted'"
            )
            yield Note("prompt syntax", text)
    elif parts := [shown(part, 60) for text in texts for part in read_as_text(text)]:
        yield Note("prompt syntax", f"read as mere text: {', '.join(parts[:3])}")


def _check_strengths(request: ResolvedRequest, timesteps: int) -> None:
    """InvalidRequestError where a strength leaves no step, or more than there are."""
    least = math.ceil(100 / request.steps) / 100
    few = f"it leaves none of {request.steps} steps; expected at least {least:g}, or more steps"
    first, second = step_counts(request, timesteps)
    if request.init_image is not None and (not first or not request.strength):
        raise InvalidRequestError("strength", request.strength, few)
    if request.hires is not None and not second:
        raise InvalidRequestError("hires_strength", request.hires_strength, few)
    if request.full_steps and request.strength and request.steps / request.strength > timesteps:
        most = int(timesteps * request.strength)
        raise InvalidRequestError("full_steps", True, f"at this strength the model has {most} steps; ask for fewer")


def say(note: Note) -> Note:
    """Log a note; where nobody can listen, a closed stream for one, drawing goes on."""
    with suppress(OSError, ValueError):
        logger.warning("%s", note.text)
    return note


def stream(model: LatentDiffusion, request: GenerationRequest | Prompts, **options: Any) -> Iterator[Step | Sample]:
    """Draw bit by bit; stop iterating to cancel. Arguments and errors as of :func:`generate`.

    Yields:
        A Step after each sampler step, and after those of a batch its Samples.
    """
    yield from draw(model, prepare(model, request, **options)[0])


def added_to(model: LatentDiffusion, request: ResolvedRequest) -> tuple[Added, ...]:
    """What records say beside a request and a model's name: what was added to the model, and how it is computed."""
    dtype = precision_of(model, request)
    name = str(dtype).removeprefix("torch.")
    half = () if dtype == torch.float32 else (AddedPart(kind=PRECISION, name=name, sha256=""),)
    return (*model.loras, *model.parts, *half)


def as_request(request: GenerationRequest | Prompts, options: Mapping[str, Any]) -> GenerationRequest:
    """A request from prompts and options; InvalidRequestError where options come beside a request."""
    if not isinstance(request, GenerationRequest):
        return GenerationRequest(prompts=request, **options)  # type: ignore[arg-type]  # one text is taken as well
    for name, value in options.items():
        raise InvalidRequestError(name, value, "options go into the GenerationRequest where one is given")
    return request


@torch.no_grad()
def draw(
    model: LatentDiffusion,
    request: ResolvedRequest,
    skip: Set[int] = frozenset(),
    dropped: Set[int] = frozenset(),
) -> Iterator[Step | Sample]:
    """What :func:`stream` gives for a prepared request.

    Args:
        model: The model.
        request: From :func:`prepare`.
        skip: Indices of images that are not needed. A batch is left out if it has no others; the images that are drawn
            are what they would be without this.
        dropped: Indices of images that nobody wants any more, which may grow meanwhile: from the next step on nothing
            is computed for them. The others are what they would be in a smaller batch; a batch without others ends.
    """
    model = unwrapped(model)
    planning = planning_of(model)
    with weights_at_home_afterwards(model):
        engine = make_engine(model, request, circular_axes(request))
        with memory_advice(request, planning):
            canvas = make_canvas(engine, request)
        noise = CallNoise(request, engine.latent_shape(request.height, request.width), engine.device)
        negative = cache(lambda text: encode_prompts(model, engine, [text], request.prompt_syntax)[0])
        for batch in request.batches():
            x, fresh = noise.start(batch)
            walk = partial(walk_latents, engine, request, canvas, x, fresh)
            if skip >= set(batch.indices):
                if request.seed_mode == "batch":  # later batches depend on how often was drawn before them
                    for _ in walk(None):
                        pass
                continue
            with memory_advice(request, planning):
                for step in walk(condition(model, engine, request, batch, negative, dropped)):
                    x = step.x
                    yield step
                    if request.seed_mode == "per_image" and dropped >= set(batch.indices):
                        break
                samples = _finish(model, engine, request, batch, canvas, x, dropped)
            yield from (finished for finished in samples if finished.index not in skip)


def _finish(
    model: LatentDiffusion,
    engine: Engine,
    request: ResolvedRequest,
    batch: Batch,
    canvas: Canvas | None,
    x: Tensor,
    dropped: Set[int],
) -> list[Sample]:
    """Decode the latents of a batch, put them where they belong, and judge the images; not those that are dropped."""
    rows = [row for row, index in enumerate(batch.indices) if index not in dropped]
    if not rows:
        return []
    x = x[rows]
    if not x.isfinite().all():
        raise NotFiniteError(
            "sampling gave NaN or infinite values. Try a lower guidance scale, another sampler, or full precision."
        )
    images = to_pil(decoded(engine, request, x))
    if canvas is not None:
        images = [canvas.finish(image) for image in images]
    flags = model.safety_checker.check(images, engine.device) if model.safety_checker else [None] * len(images)
    return [
        Sample(
            _image=Image.new("RGB", image.size) if flagged else image,
            prompt=batch.prompts[row],
            index=batch.indices[row],
            seed=request.seed_of(batch.indices[row]),
            safety="unchecked" if flagged is None else "flagged" if flagged else "safe",
        )
        for image, row, flagged in zip(images, rows, flags, strict=True)
    ]


def unwrapped(model: LatentDiffusion) -> LatentDiffusion:
    """The model itself, be it given inside ``torch.compile`` or a parallel wrapper.

    Raises:
        TypeError: There is no LatentDiffusion in it.
    """
    inner: object = model
    while isinstance(inner, nn.Module) and not isinstance(inner, LatentDiffusion):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if not isinstance(inner, LatentDiffusion):
        raise TypeError(f"expected a LatentDiffusion model, from load_model or AutoLoader, got {type(model).__name__}")
    return inner


def _resolved(model: LatentDiffusion, request: GenerationRequest) -> ResolvedRequest:
    spec, config = model.spec, model.config
    return request.resolve(
        height=spec.height,
        width=spec.width,
        steps=spec.steps,
        guidance_scale=spec.guidance_scale,
        downsampling=config.first_stage.downsampling,
        halvings=len(config.unet.channel_mult) - 1,
    )


def _changes(model: LatentDiffusion, asked: GenerationRequest, resolved: ResolvedRequest) -> Iterator[Note]:
    """Where a model does something else than it was asked for."""
    yield from resolved.other_sizes(asked)
    steps = len(timestep_grid(resolved.steps, model.num_timesteps))
    if steps != resolved.steps and resolved.grid == "flagai" and not resolved.full_steps:
        yield Note("changed steps", f"{resolved.steps} steps asked for: FlagAI's timestep grid makes them {steps}")
    if (
        model.autocast_dtype is not None
        and model.device.type != "cuda"
        and not (resolved.engine == "openvino" and has_half_precision())
    ):
        text = f"half precision has no effect on {model.device.type}: drawing in the precision of the weights"
        yield Note("precision", text)
