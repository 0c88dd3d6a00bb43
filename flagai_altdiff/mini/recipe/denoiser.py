"""Training of the UNet on cached latents with the text encoder and the autoencoder frozen."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from flagai_altdiff.mini.batches import draw_batch
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import Judge, see
from flagai_altdiff.mini.recipe.steps import Task, save_whole
from flagai_altdiff.mini.recipe.text_encoder import CaptionTokenizer, draw_caption
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import ATTRIBUTES, Scene, draw_scenes, held_out_scenes, training_scenes
from flagai_altdiff.models.attention import SpatialTransformer
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.latent_diffusion import LatentDiffusion
from flagai_altdiff.models.unet import ResBlock, UNetModel
from flagai_altdiff.sampling.ddim import ddim
from flagai_altdiff.sampling.guidance import guided
from flagai_altdiff.sampling.schedule import Schedule
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.losses import denoising_losses
from flagai_altdiff.training.objectives import Batch
from flagai_altdiff.training.processes import is_first, wait_until

logger = logging.getLogger(__name__)

CACHE_SIZE = 16_000
CACHE_CHUNK = 100
LOOK_PROMPTS, LOOK_STEPS, LOOK_GUIDANCE = 100, 20, 1.5


def cached_scenes() -> list[Scene]:
    """The scene of each cached latent."""
    return draw_scenes(training_scenes(), CACHE_SIZE, random.Random("latent cache"))


@torch.no_grad()
def fill_latent_cache(autoencoder: AutoencoderKL, path: Path) -> dict[str, Tensor]:
    """Draw and encode the training images, or read what an earlier run encoded.

    Args:
        autoencoder: With normalised latents.
        path: The cache.

    Returns:
        ``mean`` and ``std`` of the posteriors, (N, C, h, w) float16.
    """
    if is_first() and not path.exists():
        parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
        scenes = cached_scenes()
        for start in range(0, CACHE_SIZE, CACHE_CHUNK):
            images = draw_batch(scenes[start : start + CACHE_CHUNK], random.Random(f"latent cache:{start}"))
            posterior = autoencoder.encode(images.contiguous(memory_format=torch.channels_last))
            parts["mean"].append(posterior.mean.half().contiguous())
            parts["std"].append(posterior.std.half().contiguous())
            if start % 2000 == 0:
                logger.info("latents: %d of %d", start, CACHE_SIZE)
        save_whole({name: torch.cat(chunks) for name, chunks in parts.items()}, path)
    wait_until(path.exists)
    return load_file(path)


@torch.no_grad()
def zero_init(unet: UNetModel) -> None:
    """Start every residual branch, and the output, at zero, so that the fresh UNet is nearly the identity.

    **Source**: Dhariwal and Nichol 2021; the original starts its UNet in the same way.
    """
    for module in unet.modules():
        if isinstance(module, ResBlock):
            last = module.out_layers[-1]
        elif isinstance(module, SpatialTransformer):
            last = module.proj_out
        else:
            continue
        for parameter in last.parameters():
            parameter.zero_()
    for parameter in unet.out[-1].parameters():
        parameter.zero_()


def denoiser_task(
    model: LatentDiffusion,
    tokenize: CaptionTokenizer,
    latent_cache: dict[str, Tensor],
    scenes: Sequence[Scene],
    settings: StageSettings,
) -> Task:
    """The diffusion loss on cached latents and fresh captions; one timestep from each part of the range in a step.

    Args:
        model: Its UNet learns; the rest is frozen.
        tokenize: The model's tokenizer.
        latent_cache: From :func:`fill_latent_cache`.
        scenes: The scene of each latent.
        settings: Of the stage; one of another name draws other samples.
    """
    count = settings.row.batch_size

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        chosen = rng.choices(range(len(scenes)), k=count)
        dropped = settings.row.text_drop
        captions = ["" if rng.random() < dropped else draw_caption(scenes[i], rng)[0] for i in chosen]
        mean, std = latent_cache["mean"][chosen].float(), latent_cache["std"][chosen].float()
        latents = model.scale_factor * (mean + std * torch.randn(mean.shape, generator=generator))
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        noise = torch.randn(latents.shape, generator=generator)
        return {
            "latents": latents,
            "ids": tokenize(captions),
            "t": (places * model.num_timesteps).long(),
            "noise": noise,
        }

    def losses(batch: Batch) -> Tensor:
        with torch.no_grad():
            cond = model.cond_stage_model(batch["ids"])
        latents = batch["latents"].contiguous(memory_format=torch.channels_last)
        return denoising_losses(model, latents, cond, batch["t"], batch["noise"])

    return Task(model=model, draw=draw, losses=losses)


@torch.no_grad()
def sample(model: LatentDiffusion, input_ids: Tensor, empty_ids: Tensor, generator: torch.Generator) -> Tensor:
    """Images of tokenised prompts, (B, 3, H, W); DDIM with ``LOOK_STEPS`` steps."""
    cond, uncond = model.cond_stage_model(input_ids), model.cond_stage_model(empty_ids).expand(len(input_ids), -1, -1)
    side = model.config.first_stage.resolution // model.config.first_stage.downsampling
    x = torch.randn(len(input_ids), model.channels, side, side, generator=generator)
    eps = guided(model.apply_model, cond, uncond, LOOK_GUIDANCE, model.alphas_cumprod, model.parameterization)
    schedule = Schedule.from_alphas_cumprod(model.alphas_cumprod, LOOK_STEPS)
    for step in ddim(eps, x, schedule, noise=lambda: torch.zeros(())):
        x = step.x
    return model.decode_first_stage(x)


def make_look(model: LatentDiffusion, tokenize: CaptionTokenizer, judge: Judge) -> Callable[[], dict[str, float]]:
    """A measurement during training: held-out prompts in all languages, judged.

    Returns:
        () -> share of images in which an attribute is right.
    """
    rng = random.Random("look")
    scenes = draw_scenes(held_out_scenes(), LOOK_PROMPTS, rng)
    prompts = [caption(scene, rng.choice(list(LANGUAGES))) for scene in scenes]
    ids, empty = tokenize(prompts), tokenize([""])

    def look() -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        chunks = ids.split(20)  # type: ignore[no-untyped-call]
        images = torch.cat([sample(model, chunk, empty, generator) for chunk in chunks])
        labels = torch.tensor([scene.labels for scene in scenes])
        seen = torch.tensor([scene.labels for scene in see(judge, images)])
        right = (labels == seen).float().mean(dim=0).tolist()
        return {f"right_{name}": share for name, share in zip(ATTRIBUTES, right, strict=True)}

    return look
