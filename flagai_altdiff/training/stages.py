"""The papers' stages, each a row: what learns, from what, at which resolution, how fast.

**Source**: Chen et al. 2023 (arXiv 2211.06679) for the first two; Ye et al. 2024 (arXiv 2308.09991) for the others.
Steps and batch sizes are the papers' where they tell them; a config says its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["teacher", "contrastive", "diffusion", "part"]

TRAINABLE = {
    "unet": r"model\.diffusion_model\.",
    "cross_attention": r"model\.diffusion_model\..*\.attn2\.",
    "cross_attention_kv": r"model\.diffusion_model\..*\.attn2\.to_[kv]\.",
    "text_encoder": r"cond_stage_model\.",
    "text_tower": r"text_model\.",
    "lora": r".*\.parametrizations\.weight\.0\.(up|down)$",
}
"""Names for the parts of a model that can learn -> pattern of their parameters' names, from the beginning."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Defaults of a stage; every field of ``StageConfig`` with the same name can change one.

    Args:
        name: How configs call it.
        help: One sentence.
        kind: What is learnt: a teacher's features, to match images, to denoise them, or a part of another recipe.
        trainable: A key of ``TRAINABLE``, or a pattern.
        steps: Optimizer steps.
        batch_size: Samples of a step, over all processes.
        side: Share of the model's resolution.
        text_drop: Share of the texts that are replaced by the empty one.
        learning_rate: AdamW's, after the warm-up.
        warmup_steps: Steps in which it rises from 1e-9.
        weight_decay: AdamW's.
        ema_decay: Upper limit of the averaged weights' decay; 0 keeps none.
        rank: Of a LoRA, which then is all that learns; 0 for the weights themselves.
    """

    name: str
    help: str
    kind: Kind
    trainable: str
    steps: int
    batch_size: int
    side: float = 1.0
    text_drop: float = 0.0
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    weight_decay: float = 1e-2
    ema_decay: float = 0.9999
    rank: int = 0


STAGES = {
    stage.name: stage
    for stage in (
        Stage(
            name="teacher",
            help="a multilingual text encoder learns a CLIP text tower's features from parallel texts",
            kind="teacher",
            trainable="text_tower",
            steps=258_420,
            batch_size=1024,
        ),
        Stage(
            name="contrastive",
            help="the text tower learns to find the image of each text; the image tower is frozen",
            kind="contrastive",
            trainable="text_tower",
            steps=20_000,
            batch_size=1024,
            learning_rate=2e-5,
            warmup_steps=500,
        ),
        Stage(
            name="alignment",
            help="concept alignment: the UNet's cross-attention learns the new text states, at low resolution",
            kind="diffusion",
            trainable="cross_attention_kv",
            steps=330_000,
            batch_size=3072,
            side=0.5,
        ),
        Stage(
            name="quality",
            help="quality improvement: the whole UNet, at full resolution",
            kind="diffusion",
            trainable="unet",
            steps=270_000,
            batch_size=3840,
        ),
        Stage(
            name="guidance",
            help="the whole UNet with a tenth of the texts dropped, for guidance",
            kind="diffusion",
            trainable="unet",
            steps=150_000,
            batch_size=3840,
            text_drop=0.1,
        ),
        Stage(
            name="dreambooth",
            help="a model learns one thing from a few images",
            kind="diffusion",
            trainable="unet",
            steps=400,
            batch_size=2,
            text_drop=0.1,  # or what it draws for the empty text drifts, and guidance doubles that
            learning_rate=5e-6,
            warmup_steps=0,
            ema_decay=0.0,
        ),
        Stage(
            name="lora",
            help="the same as a small addition to the UNet's transformers, in a file of its own",
            kind="diffusion",
            trainable="lora",
            steps=400,
            batch_size=2,
            text_drop=0.1,
            learning_rate=1e-4,
            warmup_steps=0,
            ema_decay=0.0,
            rank=8,
        ),
    )
}
"""Every stage by its name."""
