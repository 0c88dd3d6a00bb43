"""What the judge learns from: drawn images, as an autoencoder would give them back."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.mini.batches import draw_batch
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.world import Scene
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.objectives import Batch


def weathered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as an autoencoder gives them back: a little blurred, a little noisy."""
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, share) + noise


def judge_task(judge: Judge, settings: StageSettings, scenes: Sequence[Scene]) -> Task:
    """Cross-entropy of all five attributes."""

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"judge:{step}")
        drawn = rng.choices(scenes, k=settings.row.batch_size)
        images = weathered(draw_batch(drawn, rng), torch.Generator().manual_seed(step))
        return {"image": images, "labels": torch.tensor([scene.labels for scene in drawn])}

    def losses(batch: Batch) -> Tensor:
        logits = judge(batch["image"].contiguous(memory_format=torch.channels_last))
        pairs = zip(logits.values(), batch["labels"].T, strict=True)
        return torch.stack([F.cross_entropy(logit, wanted, reduction="none") for logit, wanted in pairs]).sum(dim=0)

    return Task(model=judge, draw=draw, losses=losses)
