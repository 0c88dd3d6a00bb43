"""Training of the UNet on cached latents with the text encoder and the autoencoder frozen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from flagai_altdiff.mini.recipe.corpus import Corpus
from flagai_altdiff.mini.recipe.pictures import Pictures
from flagai_altdiff.mini.recipe.steps import Task, save_whole
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.models.attention import SpatialTransformer
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.latent_diffusion import LatentDiffusion
from flagai_altdiff.models.unet import ResBlock, UNetModel
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.losses import denoising_losses
from flagai_altdiff.training.objectives import Batch, Gather
from flagai_altdiff.training.processes import is_first, wait_until

_CHUNK = 100


@torch.no_grad()
def fill_latent_cache(autoencoder: AutoencoderKL, pictures: Pictures, path: Path, side: int) -> dict[str, Tensor]:
    """Encode the training images, or read what an earlier run encoded.

    Args:
        autoencoder: With normalised latents.
        pictures: What is encoded.
        path: The cache.
        side: Of the images, in px.

    Returns:
        ``mean`` and ``std`` of the posteriors, (N, C, h, w) float16.
    """
    if is_first() and not path.exists():
        parts: dict[str, list[Tensor]] = {"mean": [], "std": []}
        for start in range(0, len(pictures), _CHUNK):
            images = pictures.batch(list(range(start, min(start + _CHUNK, len(pictures)))))
            images = F.interpolate(images, size=(side, side), mode="area")
            posterior = autoencoder.encode(images.contiguous(memory_format=torch.channels_last))
            parts["mean"].append(posterior.mean.half().contiguous())
            parts["std"].append(posterior.std.half().contiguous())
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
    corpus: Corpus,
    settings: StageSettings,
    languages: Sequence[str],
    noisy: float = 0.5,
) -> Task:
    """The diffusion loss on cached latents and fresh captions; timesteps spread over the whole range in each step.

    Args:
        model: Its UNet learns; the rest is frozen.
        tokenize: The model's tokenizer.
        latent_cache: From :func:`fill_latent_cache`.
        corpus: What the latents show.
        settings: Of the stage; one of another name draws other samples.
        languages: Of the captions.
        noisy: Share of the timesteps in the noisier half. There hardly anything is seen of the picture, and what is
            learnt is what the words look like; in the other half, how a picture looks in its details.
    """
    count = settings.row.batch_size

    def say(index: int, rng: random.Random) -> str:
        if rng.random() < settings.row.text_drop:
            return ""
        return corpus.phrase(index, rng.choice(languages), rng, with_ground=corpus.names_ground(index, rng))

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        chosen = rng.choices(range(len(corpus)), k=count)
        mean, std = latent_cache["mean"][chosen].float(), latent_cache["std"][chosen].float()
        latents = model.scale_factor * (mean + std * torch.randn(mean.shape, generator=generator))
        places = spread((torch.arange(count) + torch.rand(count, generator=generator)) / count, noisy)
        noise = torch.randn(latents.shape, generator=generator)
        return {
            "latents": latents,
            "ids": tokenize.varied([say(i, rng) for i in chosen], rng),
            "t": (places * model.num_timesteps).long(),
            "noise": noise,
        }

    def losses(batch: Batch, gather: Gather) -> Tensor:
        with torch.no_grad():
            cond = model.cond_stage_model(batch["ids"])
        latents = batch["latents"].contiguous(memory_format=torch.channels_last)
        return denoising_losses(model, latents, cond, batch["t"], batch["noise"])

    return Task(model=model, draw=draw, losses=losses)


def spread(places: Tensor, noisy: float) -> Tensor:
    """Even places in [0, 1) -> places in [0, 1) of which the share ``noisy``, within (0, 1), lies in the upper half."""
    lower = 1 - noisy
    return torch.where(places < lower, places * 0.5 / lower, 1 - (1 - places) * 0.5 / noisy).clamp(max=1 - 1e-6)
