"""The recipe's numbers: one line for each stage, in the order in which the stages build on each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from flagai_altdiff.config import (
    AltCLIPConfig,
    AutoencoderConfig,
    LatentDiffusionConfig,
    TextEncoderConfig,
    UNetConfig,
    VisionConfig,
)
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.stages import Kind, Stage

IMAGE_SIDE = 128
"""Of the images, in px."""


def _stage(
    name: str,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    optimizer: Literal["adamw", "muon"] = "muon",
    kind: Kind = "part",
    trains: str = "",
    warmup: int = 50,
    final_rate: float = 0.02,
    weight_decay: float = 0.0,
    ema: float = 0.0,
    side: int = IMAGE_SIDE,
    text_drop: float = 0.0,
) -> StageSettings:
    row = Stage(
        name=name,
        help=f"{name.replace('_', ' ')} of AltDiffusion-mini",
        kind=kind,
        trainable=trains,
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        ema_decay=ema,
        text_drop=text_drop,
    )
    return StageSettings(row=row, side=side, optimizer=optimizer, decay="cosine", final_rate=final_rate, beta2=0.99)


_DECODER = r"(decoder|post_quant_conv)\..*"
"""Parameters that the latents do not depend on."""

STAGES = {
    stage.row.name: stage
    for stage in (
        _stage("judge", steps=3000, batch=64, learning_rate=4e-3, weight_decay=0.01),
        _stage("autoencoder_64", steps=6000, batch=8, learning_rate=4e-3, side=64, final_rate=0.3),
        _stage("autoencoder", steps=1600, batch=3, learning_rate=2e-3, ema=0.995),
        _stage("decoder", steps=1600, batch=8, learning_rate=1e-3, trains=_DECODER, side=64, ema=0.995),
        _stage("teacher_first", steps=1000, batch=256, learning_rate=4e-3, warmup=100, weight_decay=0.01),
        _stage("teacher", steps=600, batch=256, learning_rate=3e-3, weight_decay=0.01),
        _stage(
            "unet",
            kind="diffusion",
            trains="unet",
            steps=6000,
            batch=64,
            learning_rate=4e-3,
            warmup=100,
            final_rate=0.1,
            ema=0.998,
            text_drop=0.1,
        ),
        _stage(
            "student",
            trains="text_tower",
            steps=4000,
            batch=256,
            learning_rate=4e-3,
            warmup=100,
            weight_decay=0.01,
            text_drop=0.02,
        ),
        _stage(
            "alignment",
            kind="diffusion",
            trains="cross_attention_kv",
            steps=600,
            batch=64,
            learning_rate=1e-3,
            final_rate=0.1,
            ema=0.99,
        ),
        _stage(
            "quality",
            kind="diffusion",
            trains="unet",
            steps=6000,
            batch=64,
            learning_rate=3e-3,
            warmup=200,
            final_rate=0.1,
            ema=0.998,
        ),
        _stage(
            "guidance",
            kind="diffusion",
            trains="unet",
            steps=3000,
            batch=64,
            learning_rate=1e-3,
            final_rate=0.02,
            ema=0.998,
            text_drop=0.1,
        ),
        _stage("words", trains="text_tower", steps=5000, batch=512, learning_rate=3e-3, warmup=100, weight_decay=0.01),
        _stage(
            "polish",
            trains="text_tower",
            steps=3000,
            batch=512,
            learning_rate=1.5e-3,
            final_rate=0.0,
            weight_decay=0.01,
        ),
    )
}
"""Every stage by its name, in their order."""

NOISY = {"unet": 0.7, "alignment": 0.7, "quality": 0.45, "guidance": 0.4}
"""Share of a stage's timesteps in the noisier half: first the words are learnt, then the details."""

AUTOENCODER = AutoencoderConfig(
    resolution=IMAGE_SIDE, ch=16, num_res_blocks=1, norm_groups=4, z_channels=8, embed_dim=8
)
TEXT_ENCODER = TextEncoderConfig(
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=512,
    vocab_size=4,
    max_position_embeddings=80,
    project_dim=128,
    has_pooler=False,
)
VISION = VisionConfig(
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    intermediate_size=768,
    image_size=64,
    patch_size=16,
)
UNET = UNetConfig(
    in_channels=AUTOENCODER.embed_dim,
    out_channels=AUTOENCODER.embed_dim,
    model_channels=32,
    attention_resolutions=(2, 4),
    num_res_blocks=1,
    channel_mult=(1, 2, 4),
    num_heads=4,
    context_dim=TEXT_ENCODER.project_dim,
    norm_groups=16,
)


def matching_config(vocab_size: int) -> AltCLIPConfig:
    """The matching model, AltCLIP-mini; the teacher is one too.

    Args:
        vocab_size: Number of token ids.
    """
    return AltCLIPConfig(
        text=replace(TEXT_ENCODER, vocab_size=vocab_size), vision=VISION, projection_dim=TEXT_ENCODER.project_dim
    )


def mini_config(vocab_size: int) -> LatentDiffusionConfig:
    """The model that draws.

    The noise schedule ends far below the released models' (1 % of the signal's amplitude left instead of 6.8 %).
    Otherwise the UNet learns to read the background from what is left of the image, which in sampling is noise.

    Args:
        vocab_size: Number of token ids.
    """
    return LatentDiffusionConfig(
        unet=UNET,
        first_stage=AUTOENCODER,
        cond_stage=replace(TEXT_ENCODER, vocab_size=vocab_size),
        linear_end=0.022,
        image_size=IMAGE_SIDE // AUTOENCODER.downsampling,
        parameterization="v",
        scale_factor=1.0,
    )
