"""Prompt -> latents -> pictures: the one algorithm behind every door. No files, no prints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import seed_everything
from torch import Tensor

from flagai_altdiff.errors import NotFiniteError
from flagai_altdiff.images import to_pil
from flagai_altdiff.memory import check_memory, memory_advice
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.latent_diffusion import MAX_TOKENS
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.sampling import SAMPLERS, NoiseFunction, Step
from flagai_altdiff.sampling.guidance import guided
from flagai_altdiff.sampling.schedule import Schedule
from flagai_altdiff.tokenizer import lost_text

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Picture:
    """One finished picture.

    Args:
        image: The picture; black where it was flagged.
        prompt: Its prompt.
        index: Its number within the request, from 0.
        seed: Its own seed where seeds are per image, else the seed of the request.
        safety: ``"safe"``, ``"flagged"``, or ``"unchecked"`` where the model has no checker.
        path: Where it was saved, if it was.
    """

    image: Image.Image
    prompt: str
    index: int
    seed: int
    safety: str
    path: Path | None = None


@dataclass(kw_only=True)
class GenerationResult:
    """Everything that a generation gave.

    Args:
        request: The request, with the model's defaults and the seed filled in.
        pictures: In the order of the request.
        grid_path: Where the grid was saved, if it was.
        seconds: Wall time.
    """

    request: GenerationRequest
    pictures: list[Picture] = field(default_factory=list)
    grid_path: Path | None = None
    seconds: float = 0.0

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return [p.image for p in self.pictures]

    @property
    def paths(self) -> list[Path]:
        """Files of the saved pictures."""
        return [p.path for p in self.pictures if p.path is not None]

    @property
    def seeds(self) -> list[int]:
        """Seed of each picture; with ``seed_mode="batch"`` all have the request's."""
        return [p.seed for p in self.pictures]

    @property
    def safety(self) -> list[str]:
        """Verdict on each picture."""
        return [p.safety for p in self.pictures]


def prepare(model: LatentDiffusion, request: GenerationRequest) -> GenerationRequest:
    """The request as this model will carry it out: defaults, seed and size filled in, checked before any work.

    Args:
        model: The model.
        request: The request.

    Raises:
        InvalidRequestError: The model cannot draw this size.
        InsufficientMemoryError: A batch of this size cannot fit into memory.
    """
    spec, config = model.spec, model.config
    full = request.with_defaults(
        height=spec.height, width=spec.width, steps=spec.steps, guidance_scale=spec.guidance_scale
    ).fitted(config.first_stage.downsampling, len(config.unet.channel_mult) - 1)
    if (request.height or full.height, request.width or full.width) != (full.height, full.width):
        logger.warning(
            "%sx%s is not a whole number of latent cells: drawing %dx%d (width x height)",
            request.width or full.width,
            request.height or full.height,
            full.width,
            full.height,
        )
    check_memory(full, config, model.device)
    return full


def generate(
    model: LatentDiffusion, request: GenerationRequest, *, callback: Callable[[Step], object] | None = None
) -> GenerationResult:
    """Draw what a request asks for.

    Args:
        model: From ``load_model``.
        request: What to draw.
        callback: Called after every sampler step.

    Returns:
        Pictures with prompts, seeds and safety verdicts.

    Raises:
        InvalidRequestError: The model cannot draw this size.
        InsufficientMemoryError: A batch does not fit into memory.
        NotFiniteError: Sampling gave no picture.
    """
    start = time.perf_counter()
    result = GenerationResult(request=prepare(model, request))
    for event in stream(model, result.request):
        if isinstance(event, Step):
            if callback is not None:
                callback(event)
        else:
            result.pictures.extend(event)
    result.seconds = time.perf_counter() - start
    return result


@torch.no_grad()
def stream(model: LatentDiffusion, request: GenerationRequest, done: Set[int] = frozenset()) -> Iterator[Step | list[Picture]]:
    """Draw a prepared request bit by bit; stop iterating to cancel.

    Args:
        model: The model.
        request: From :func:`prepare`.
        done: Indices of pictures that are not needed again. A batch is left out if it has no others; all others are what
            they would be without this.

    Yields:
        A Step after each sampler step, and the list of its pictures after each batch.

    Raises:
        InsufficientMemoryError: A batch does not fit into memory.
        NotFiniteError: Sampling gave no picture.
    """
    assert request.seed is not None and request.height is not None and request.width is not None
    assert request.steps is not None and request.guidance_scale is not None
    _report_lost_text(model, request)
    seed_everything(request.seed, verbose=False)
    f = model.config.first_stage.downsampling
    latent_shape = (model.channels, request.height // f, request.width // f)
    schedule = Schedule.from_alphas_cumprod(model.alphas_cumprod, request.steps)
    if len(schedule) != request.steps:
        _warn_once(f"{request.steps} steps asked for: FlagAI's timestep grid makes them {len(schedule)}")
    fixed = torch.randn(request.pictures_at_once, *latent_shape, device=model.device) if request.fixed_code else None
    uncond: Tensor | None = None
    count = 0
    for prompts in request.batches():
        first, count = count, count + len(prompts)
        noise = _noise(request, first, (len(prompts), *latent_shape), model.device)
        walk = partial(SAMPLERS[request.sampler], schedule=schedule, noise=noise, eta=request.eta)
        start = noise if fixed is None else partial(fixed.__getitem__, slice(len(prompts)))
        if done >= set(range(first, count)):
            if request.seed_mode == "batch":  # later pictures depend on how often was drawn before them
                for _ in walk(lambda x, t: torch.zeros_like(x), start()):
                    pass
            continue
        with memory_advice(request):
            if uncond is None and request.guidance_scale != 1.0:
                uncond = model.get_learned_conditioning([request.negative_prompt])
            eps = guided(
                partial(_denoise, model),
                model.get_learned_conditioning(prompts),
                None if uncond is None else uncond.expand(len(prompts), -1, -1),
                request.guidance_scale,
                model.alphas_cumprod,
                model.parameterization,
            )
            x = start()
            for step in walk(eps, x):
                x = step.x
                yield step
            pictures = to_pil(_decode(model, x))
            flags = model.safety_checker.check(pictures, model.device) if model.safety_checker else None
        yield [
            _picture(request, first + i, prompt, image, None if flags is None else flags[i])
            for i, (image, prompt) in enumerate(zip(pictures, prompts, strict=True))
        ]


def _picture(request: GenerationRequest, index: int, prompt: str, image: Image.Image, flagged: bool | None) -> Picture:
    return Picture(
        image=Image.new("RGB", image.size) if flagged else image,
        prompt=prompt,
        index=index,
        seed=_picture_seed(request, index),
        safety="unchecked" if flagged is None else "flagged" if flagged else "safe",
    )


def _decode(model: LatentDiffusion, x: Tensor) -> Tensor:
    """Decoded latents, (B, 3, H, W); in full precision where half precision overflows."""
    if not x.isfinite().all():
        raise NotFiniteError(
            "sampling gave values that are no numbers. Try a lower guidance scale, another sampler, or full precision."
        )
    with _autocast(model):
        images = model.decode_first_stage(x)
    if not images.isfinite().all():
        logger.warning("half precision overflowed in decoding: decoding again in float32")
        with torch.autocast(model.device.type, enabled=False):
            images = model.decode_first_stage(x.float())
    if not images.isfinite().all():
        raise NotFiniteError("decoding gave values that are no numbers. Are the autoencoder's weights whole?")
    return images


def _picture_seed(request: GenerationRequest, index: int) -> int:
    assert request.seed is not None
    return (request.seed + index) % 2**32 if request.seed_mode == "per_image" else request.seed


def _noise(request: GenerationRequest, first: int, shape: Sequence[int], device: torch.device) -> NoiseFunction:
    """Draws of a batch: from the global generator as FlagAI does, or from a generator of each picture's own."""
    if request.seed_mode == "batch":
        return lambda: torch.randn(*shape, device=device)
    # On the CPU, so that a picture's noise depends on its seed alone.
    generators = [torch.Generator().manual_seed(_picture_seed(request, first + i)) for i in range(shape[0])]
    return lambda: torch.stack([torch.randn(*shape[1:], generator=g) for g in generators]).to(device)


def _denoise(model: LatentDiffusion, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    with _autocast(model):
        return model.apply_model(x, t, cond).float()


def _autocast(model: LatentDiffusion) -> AbstractContextManager[object]:
    if model.autocast_dtype is None:
        return nullcontext()
    if model.device.type != "cuda":
        _warn_once(f"half precision has no effect on {model.device.type}: drawing in float32")
        return nullcontext()
    return torch.autocast("cuda", model.autocast_dtype)


def _report_lost_text(model: LatentDiffusion, request: GenerationRequest) -> None:
    assert model.tokenizer is not None
    for prompt in dict.fromkeys((*request.prompts, request.negative_prompt)):
        lost = lost_text(model.tokenizer, prompt, MAX_TOKENS)
        if lost:
            shown = repr(lost) if len(lost) <= 500 else f"{lost[:200]!r} … {lost[-200:]!r}"
            logger.warning(
                "the prompt is cut at %d tokens; its last %d characters have no effect: %s", MAX_TOKENS, len(lost), shown
            )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
