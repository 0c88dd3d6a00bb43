"""The models that are timed: the embedded one, and AltDiffusion-m18 at full size with random weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from flagai_altdiff import load_model
from flagai_altdiff.config import LatentDiffusionConfig, TextEncoderConfig
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.sampling.schedule import make_betas, schedule_buffers
from tests.full.test_full_size import CONFIGS

M18 = CONFIGS["AltDiffusion-m18"]
_SMALL_TEXT = TextEncoderConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, vocab_size=100, project_dim=1024
)


def mini() -> LatentDiffusion:
    """The embedded model."""
    return load_model("AltDiffusion-mini", safety_checker=False)


def full_size() -> LatentDiffusion:
    """UNet and autoencoder of m18; the text encoder is a stub, as its states are given."""
    return random_model(replace(M18, cond_stage=_SMALL_TEXT))


def half_width() -> LatentDiffusion:
    """The same with half as many channels, a quarter of the weights."""
    return random_model(replace(M18, unet=replace(M18.unet, model_channels=160), cond_stage=_SMALL_TEXT))


def random_model(config: LatentDiffusionConfig) -> LatentDiffusion:
    """A model of random weights."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    fill(model)
    return model


def fill(model: LatentDiffusion, seed: int = 0) -> None:
    """Random weights with which every layer gives numbers of order one.

    Scaled by the number of inputs; layers that training starts at zero are no exception, or all outputs would be alike.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)
            elif name.endswith("weight"):
                weight.fill_(1.0)
            else:
                weight.normal_(0, 0.02)
        config = model.config
        betas = make_betas(config.beta_schedule, config.timesteps, config.linear_start, config.linear_end)
        for name, values in schedule_buffers(betas).items():
            model.get_buffer(name).copy_(values)
