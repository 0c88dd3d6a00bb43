"""Whole pictures, from prompt to pixels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flagai_altdiff import generate
from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.models import LatentDiffusion
from tests.benchmarks.frame import Row, Work, compare
from tests.benchmarks.sides import DIFFUSERS, ENGINES, Diffusers

PROMPT = "a red heart"
_WARM_UP_STEPS = 2


def pictures(
    model: LatentDiffusion, name: str, rounds: int, side_px: int = 256, count: int = 4, steps: int = 20
) -> Row:
    """Some pictures of a prompt with guidance by DDIM, from prompt to pixels.

    diffusers gets the prompt's states, as its pipeline has no tokenizer for AltDiffusion; their making is timed too.
    All begin with the same noise.

    Args:
        model: What draws.
        name: Key of the row.
        rounds: That count.
        side_px: Height and width.
        count: Pictures at once.
        steps: Of the sampler.
    """
    options: dict[str, Any] = {"height": side_px, "width": side_px, "seed": 1, "sampler": "ddim"}
    options |= {"images_per_prompt": count, "guidance_scale": 5.0}
    diffusers = Diffusers(model)

    def works(steps: int) -> dict[str, Work]:
        asked = {**options, "steps": steps}
        ours: dict[str, Work] = {side: partial(_ours, model, {**asked, "engine": side}) for side in ENGINES}
        return ours | {DIFFUSERS: partial(_theirs, diffusers, model, asked)}

    what = f"{count} pictures, {steps} steps, {side_px} px"
    return compare(name, what, works(steps), rounds=rounds, warm_up=works(_WARM_UP_STEPS))


def _ours(model: LatentDiffusion, options: dict[str, Any]) -> Tensor:
    images = generate(model, PROMPT, **options).images
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def _theirs(diffusers: Diffusers, model: LatentDiffusion, options: dict[str, Any]) -> Tensor:
    size, count, pipeline = options["height"], options["images_per_prompt"], diffusers.pipeline
    cond, uncond = (model.get_learned_conditioning([text]) for text in (PROMPT, ""))
    shape = EagerEngine(model).latent_shape(size, size)
    seeds = [torch.Generator().manual_seed(options["seed"] + row) for row in range(count)]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in seeds])
    found = pipeline(
        prompt_embeds=cond.expand(count, -1, -1),
        negative_prompt_embeds=uncond.expand(count, -1, -1),
        latents=noise,
        height=size,
        width=size,
        num_inference_steps=options["steps"],
        guidance_scale=options["guidance_scale"],
        output_type="np",
    )
    return torch.from_numpy(found.images).mul(255).floor()  # as FlagAI does it
