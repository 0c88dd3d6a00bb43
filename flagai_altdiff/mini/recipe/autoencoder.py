"""Training of the autoencoder, and the scaling of its latents to mean 0 and variance 1."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn

from flagai_altdiff.mini.recipe.pictures import Pictures
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.objectives import Batch, Gather

KL_WEIGHT = 3e-4
START_LOGVAR = -5.0
LATENT_NOISE = 0.4
"""Most noise in the latents that the decoder learns from, in their own deviation: about what a denoiser leaves."""


def quiet_posterior(autoencoder: AutoencoderKL) -> None:
    """Start with nearly noiseless latents: the log-variance is the constant ``START_LOGVAR`` at first.

    At the default start the noise is as large as the signal and a small autoencoder needs long to climb out of it.
    """
    conv = autoencoder.quant_conv
    half = conv.out_channels // 2
    with torch.no_grad():
        conv.weight[half:].zero_()
        assert conv.bias is not None
        conv.bias[half:].fill_(START_LOGVAR)


def crops(images: Tensor, side: int, rng: random.Random) -> Tensor:
    """One random square of each image; (B, 3, H, W) -> (B, 3, side, side)."""
    room = images.shape[-1] - side
    corners = [(rng.randint(0, room), rng.randint(0, room)) for _ in images]
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(images, corners, strict=True)])


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbouring pixels, down and to the right."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def reconstruction_losses(output: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error of each image, and the absolute error of its edges, (B,)."""
    whole = ((output - target).abs() + (output - target).square()).mean(dim=(1, 2, 3))
    pairs = zip(edges(output), edges(target), strict=True)
    return whole + 0.5 * torch.stack([(a - b).abs().mean(dim=(1, 2, 3)) for a, b in pairs]).sum(dim=0)


def autoencoder_task(
    autoencoder: AutoencoderKL, settings: StageSettings, pictures: Pictures, latent_noise: float = 0.0
) -> Task:
    """To give pictures back, or squares of them.

    Args:
        autoencoder: All of it learns, or what the settings name.
        settings: Of the stage.
        pictures: What is to be given back.
        latent_noise: Most noise that is added to normalised latents; of each picture, another amount.
    """
    config, count = autoencoder.config, settings.row.batch_size
    latent = (config.embed_dim, *[settings.side // config.downsampling] * 2)

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        images = pictures.batch(rng.choices(range(len(pictures)), k=count))
        generator = torch.Generator().manual_seed(step)
        noise, more = torch.randn(2, count, *latent, generator=generator)
        more *= latent_noise * torch.rand(count, 1, 1, 1, generator=generator)
        return {"image": crops(images, settings.side, rng), "noise": noise, "more": more}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        posterior = autoencoder.encode(images)
        output = autoencoder.decode(posterior.mean + posterior.std * batch["noise"] + batch["more"])
        return reconstruction_losses(output, images) + KL_WEIGHT * posterior.kl() / posterior.mean[0].numel()

    return Task(model=autoencoder, draw=draw, losses=losses)


@torch.no_grad()
def normalise_latents(autoencoder: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1, by folding an affine map into the 1x1 convolutions.

    The images that the autoencoder gives stay the same.

    Args:
        autoencoder: Changed in place.
        images: (B, 3, H, W), what the statistics are taken over.
    """
    means = torch.cat([autoencoder.encode(chunk).mode() for chunk in images.split(16)])  # type: ignore[no-untyped-call]
    mean, std = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    before, after = autoencoder.quant_conv, autoencoder.post_quant_conv
    channels = len(mean)
    assert before.bias is not None
    assert after.bias is not None
    before.weight[:channels] /= std[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / std
    before.bias[channels:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]


def use_channels_last(module: nn.Module) -> None:
    """Keep convolution weights in the memory layout that is fastest on CPUs."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
