"""The recipe of AltDiffusion-mini as data: sizes of its parts and one line for each training stage."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig

IMAGE_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One run of gradient descent over some of the parameters.

    Attributes:
        trains: Regular expression, matched from the start of a parameter's name; all others stay as they are.
        steps: Number of optimiser steps.
        batch: Samples in a shard.
        shards: Parts of a step that are computed side by side; their gradients are averaged.
        learning_rate: Peak of the schedule: linear warm-up, then a half cosine down to ``final_rate`` of it.
        warmup: Steps of the warm-up.
        final_rate: What is left of the learning rate at the last step, as a fraction.
        weight_decay: AdamW's decoupled weight decay.
        ema: Decay of the running average of the weights, which is the result; 0 for none.
        side: Height and width of the images that the stage sees, in px.
        text_drop: Fraction of captions replaced by the empty text, for classifier-free guidance.
    """

    trains: str
    steps: int
    batch: int
    shards: int = 1
    learning_rate: float
    warmup: int = 50
    final_rate: float = 0.02
    weight_decay: float = 0.0
    ema: float = 0.0
    side: int = IMAGE_SIDE
    text_drop: float = 0.0


UNET_STAGE = Stage(
    trains=r"model\.diffusion_model\.",
    steps=13300,
    batch=12,
    shards=2,
    learning_rate=2e-3,
    warmup=100,
    ema=0.999,
    text_drop=0.1,
)

STAGES: dict[str, Stage] = {
    "judge": Stage(trains="", steps=900, batch=48, learning_rate=2e-3, weight_decay=0.01),
    "autoencoder_32": Stage(trains="", steps=1600, batch=8, learning_rate=2e-3, side=32, final_rate=0.3),
    "autoencoder_64": Stage(trains="", steps=1200, batch=4, learning_rate=1.5e-3, side=64, final_rate=0.3),
    "autoencoder": Stage(trains="", steps=1400, batch=2, learning_rate=1e-3, ema=0.99),
    "text_encoder": Stage(
        trains=r"(?!encoder\.pre_LN)", steps=2200, batch=96, learning_rate=1.5e-3, warmup=100, weight_decay=0.05
    ),
    "unet": UNET_STAGE,
    "alignment": Stage(
        trains=r"(?!pre_LN)",
        steps=4000,
        batch=96,
        learning_rate=8e-4,
        warmup=50,
        weight_decay=0.0,
        ema=0.995,
        text_drop=0.05,
    ),
    "refinement": replace(UNET_STAGE, steps=7000, learning_rate=1e-3, warmup=200),
}

AUTOENCODER = AutoencoderConfig(resolution=IMAGE_SIDE, ch=16, num_res_blocks=1, norm_groups=4)
TEXT_ENCODER = TextEncoderConfig(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    vocab_size=4,
    max_position_embeddings=80,
    project_dim=64,
    has_pooler=False,
)
UNET = UNetConfig(
    model_channels=32,
    attention_resolutions=(2, 4),
    num_res_blocks=1,
    channel_mult=(1, 2, 4),
    num_heads=4,
    context_dim=TEXT_ENCODER.project_dim,
    norm_groups=16,
)


def mini_config(vocab_size: int) -> LatentDiffusionConfig:
    """The whole model.

    The noise schedule ends far below the released models' (0.26 % of the signal left instead of 6.8 %). Otherwise the
    UNet learns to read the background from what is left of the image, which in sampling is noise.

    Args:
        vocab_size: Number of token ids.
    """
    return LatentDiffusionConfig(
        unet=UNET,
        first_stage=AUTOENCODER,
        cond_stage=replace(TEXT_ENCODER, vocab_size=vocab_size),
        linear_end=0.03,
        image_size=IMAGE_SIDE // AUTOENCODER.downsampling,
        parameterization="v",
        scale_factor=1.0,
    )
