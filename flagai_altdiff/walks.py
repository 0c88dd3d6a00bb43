"""The way of a batch of latents: from noise or a picture to the end, in windows, once more at a larger size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.canvas import Canvas, encoded
from flagai_altdiff.conditioning import encode_prompts, same_length
from flagai_altdiff.engine import Engine
from flagai_altdiff.engine.tiles import decode_in_tiles
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.layout import windows_of, wraps_of
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.shortcuts import InnerMaps, Shortcuts
from flagai_altdiff.noise import Draw
from flagai_altdiff.request import Batch, ResolvedRequest
from flagai_altdiff.sampling import SAMPLERS, EpsFunction, Step
from flagai_altdiff.sampling.guidance import Guidance
from flagai_altdiff.sampling.schedule import Schedule, add_noise, timestep_grid
from flagai_altdiff.sampling.windows import Window, joined

BORDER = "|"
"""Between the stretches of a prompt."""
Predict = Callable[[Sequence[int]], EpsFunction]
"""Shape of a batch of latents, (B, C, h, w) -> the noise prediction for them, whose prompts it knows."""


def step_counts(request: ResolvedRequest, timesteps: int) -> tuple[int, int]:
    """Sampler steps of a batch, and of its refinement at a larger size.

    Args:
        request: What is drawn; FlagAI's grid may have more steps than it asks for.
        timesteps: Of the model.
    """
    whole = len(timestep_grid(request.steps, timesteps)) if request.grid == "flagai" else request.steps
    if request.hires is not None:
        return whole, steps_left(whole, request.hires_strength)
    if request.init_image is None or request.strength is None:
        return whole, 0
    return (request.steps if request.full_steps else steps_left(whole, request.strength)), 0


def steps_left(whole: int, strength: float) -> int:
    """The steps of a walk that a picture still has to go."""
    return min(int(whole * strength), whole)


def walk_latents(
    engine: Engine, request: ResolvedRequest, canvas: Canvas | None, x: Tensor, fresh: Draw, predict: Predict | None
) -> Iterator[Step]:
    """Walk a batch from noise to latents.

    Args:
        engine: Knows the schedule; encodes and decodes between two sizes.
        request: What is drawn.
        canvas: The picture that it begins with, if it does.
        x: (B, C, h, w), noise.
        fresh: Draws more.
        predict: The noise prediction; without one, nothing is computed but the random numbers are drawn.

    Yields:
        A Step after each step, counted over all of them.
    """
    timesteps = len(engine.alphas_cumprod)
    counts = step_counts(request, timesteps)
    schedule = _schedule(engine, request, counts[0])
    if canvas is not None:
        x = canvas.begin(x, schedule.alphas[0], anew=request.strength == 1)
    for step in _walk(request, canvas, x, schedule, fresh, predict):
        x = step.x
        yield replace(step, total=sum(counts))
    if request.hires is None or not counts[1]:
        return
    x = _enlarged(engine, request, x) if predict else x.new_zeros(len(x), *_final_shape(engine, request))
    schedule = engine.schedule(request.steps, request.grid).tail(counts[1])
    x = add_noise(x, fresh(x.shape[1:]), schedule.alphas[0])
    for step in _walk(request, None, x, schedule, fresh, predict):
        yield replace(step, index=step.index + counts[0], total=sum(counts))


def _schedule(engine: Engine, request: ResolvedRequest, count: int) -> Schedule:
    """The walk of a batch: all of it, or its end."""
    if request.full_steps and request.strength:
        most = len(engine.alphas_cumprod)
        return engine.schedule(min(math.ceil(request.steps / request.strength), most), request.grid).tail(count)
    return engine.schedule(request.steps, request.grid).tail(count)


def _walk(
    request: ResolvedRequest,
    canvas: Canvas | None,
    x: Tensor,
    schedule: Schedule,
    fresh: Draw,
    predict: Predict | None,
) -> Iterator[Step]:
    eps: EpsFunction = predict(x.shape) if predict else lambda x, t: torch.zeros_like(x)
    if canvas is not None:
        eps = canvas.guide(eps, schedule.levels)
    shape = x.shape[1:]
    yield from SAMPLERS[request.sampler].walk(eps, x, schedule, noise=lambda: fresh(shape), eta=request.eta)


def condition(
    model: LatentDiffusion,
    engine: Engine,
    request: ResolvedRequest,
    batch: Batch,
    negative: Callable[[str], Tensor],
    dropped: Set[int] = frozenset(),
) -> Predict:
    """The noise prediction for the prompts of a batch.

    Args:
        model: Has the tokenizer.
        engine: Computes.
        request: What is drawn.
        batch: Whose prompts.
        negative: A negative prompt -> its states, (L, D).
        dropped: Indices of images that nobody wants any more, looked at in every step: their noise is said to be 0.
    """
    texts = [stretches_of(prompt, request) for prompt in batch.prompts]
    states = iter(encode_prompts(model, engine, [part for parts in texts for part in parts], request.prompt_syntax))
    rows = [[next(states) for _ in parts] for parts in texts]
    scales = [request.scale_of(index) for index in batch.indices]
    is_guided = any(scale != 1.0 for scale in scales)
    without = [negative(request.negative_of(index)) for index in batch.indices] if is_guided else None
    empty = cache(lambda: encode_prompts(model, engine, [""])[0])

    @cache
    def guidance_of(chosen: tuple[int, ...], wanted: tuple[int, ...]) -> list[tuple[int, list[int], Guidance]]:
        """For one stretch of each prompt, the rows whose states have one length, their guidance, and the length.

        Those of other lengths are denoised apart: none depends on its neighbours.
        """
        pairs = {row: _pair(rows[row][chosen[row]], row) for row in wanted}
        by_length: dict[int, list[int]] = {}
        for row, (cond, _) in pairs.items():
            by_length.setdefault(len(cond), []).append(row)
        return [(length, own, _guidance(own, [pairs[row] for row in own])) for length, own in by_length.items()]

    def at(chosen: tuple[int, ...]) -> EpsFunction:
        """For one place of one walk."""
        maps = InnerMaps(request.cache_interval)

        def of(length: int, own: list[int], guidance: Guidance) -> EpsFunction:
            shortcuts = Shortcuts(request.token_merging, maps.of(length, own))
            return partial(guidance.eps, partial(engine.denoise, shortcuts=shortcuts))

        def eps(x: Tensor, t: float) -> Tensor:
            maps.turn_to(t)
            wanted = tuple(row for row, index in enumerate(batch.indices) if index not in dropped)
            parts = [(own, of(length, own, guidance)) for length, own, guidance in guidance_of(chosen, wanted)]
            return _joined(parts, x, t)

        return eps

    def _pair(cond: Tensor, row: int) -> tuple[Tensor, Tensor]:
        uncond = without[row] if without else cond
        return (cond, uncond) if len(cond) == len(uncond) else same_length(cond, uncond, empty())

    def _guidance(own: Sequence[int], pairs: Sequence[tuple[Tensor, Tensor]]) -> Guidance:
        cond, uncond = (torch.stack(side) for side in zip(*pairs, strict=True))
        scale: float | Tensor = scales[own[0]]
        if len({scales[row] for row in own}) > 1:
            scale = torch.tensor([scales[row] for row in own], device=engine.device)[:, None, None, None]
        table, kind = engine.alphas_cumprod, engine.parameterization
        return Guidance(cond, uncond if without else None, scale, table, kind, request.guided_part)

    def predict(shape: Sequence[int]) -> EpsFunction:
        windows = windows_of(request, engine.cell, shape[2:])
        if windows is None:
            return at((0,) * len(rows))
        return joined(lambda window: at(tuple(_stretch(window, shape[3], len(own)) for own in rows)), windows)

    return predict


def _joined(parts: Sequence[tuple[list[int], EpsFunction]], x: Tensor, t: float) -> Tensor:
    """The prediction for a batch from those for some of its rows; 0 for the others."""
    if [rows for rows, _ in parts] == [list(range(len(x)))]:
        return parts[0][1](x, t)
    found = torch.zeros_like(x)
    for rows, part in parts:
        found[rows] = part(x[rows], t)
    return found


def stretches_of(prompt: str, request: ResolvedRequest) -> list[str]:
    """The parts of a prompt, from left to right."""
    return [part.strip() for part in prompt.split(BORDER)] if request.stretches else [prompt]


def check_stretches(request: ResolvedRequest, cell: int) -> None:
    """InvalidRequestError where a stretch of a prompt lies in no window."""
    width, height = (side // cell for side in (request.width, request.height))
    windows = windows_of(request, cell, (height, width)) if request.stretches else None
    for prompt in request.prompts if windows else ():
        count = len(stretches_of(prompt, request))
        if {_stretch(window, width, count) for window in windows or ()} != set(range(count)):
            expected = f"{count} stretches need more or smaller windows than {len(windows or ())}, or a wider image"
            raise InvalidRequestError("stretches", prompt, expected)


def _stretch(window: Window, width: int, count: int) -> int:
    """The number of the stretch, of so many, that the middle of a window lies in."""
    return min(int((window.left + window.width / 2) / width % 1.0 * count), count - 1)


def decoded(engine: Engine, request: ResolvedRequest, latents: Tensor) -> Tensor:
    """Images of latents, in tiles where they were drawn in windows: (B, C, h, w) -> (B, 3, H, W)."""
    tile, wraps = (request.window or 0) // engine.cell, wraps_of(request)
    if not tile or (tile >= max(latents.shape[2:]) and not any(wraps.values())):
        return engine.decode(latents)
    return decode_in_tiles(
        engine.decode,
        latents,
        tile=tile,
        overlap=max(tile // 4, 1),
        factor=engine.cell,
        **wraps,
    )


def _final_shape(engine: Engine, request: ResolvedRequest) -> tuple[int, int, int]:
    width, height = request.final_size
    return engine.latent_shape(height, width)


def _enlarged(engine: Engine, request: ResolvedRequest, x: Tensor) -> Tensor:
    """Finished latents at the final size: enlarged themselves, or as the picture that they stand for."""
    width, height = request.final_size
    if request.hires_upscaler == "latent":
        return F.interpolate(x, _final_shape(engine, request)[1:], mode="bicubic", antialias=True)
    larger = F.interpolate(decoded(engine, request, x), (height, width), mode="bicubic", antialias=True)
    return encoded(engine, request, larger.clamp(-1, 1))
