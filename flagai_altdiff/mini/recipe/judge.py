"""Training of the judge on drawn images."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.mini.batches import draw_batch
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe.loop import StepLoss
from flagai_altdiff.mini.recipe.stages import Stage
from flagai_altdiff.mini.world import Scene


def weathered(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images as an autoencoder gives them back: a little blurred, a little noisy."""
    blurred = F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, share) + noise


def judge_loss(judge: Judge, stage: Stage, scenes: Sequence[Scene]) -> StepLoss:
    """Cross-entropy of all five attributes."""

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"judge:{step}")
        drawn = rng.choices(scenes, k=stage.batch)
        images = weathered(draw_batch(drawn, rng), torch.Generator().manual_seed(step))
        labels = torch.tensor([scene.labels for scene in drawn]).T
        logits = judge(images.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(logit, wanted) for logit, wanted in zip(logits.values(), labels, strict=True)]
        right = (logits["shape"].argmax(dim=1) == labels[0]).float().mean()
        return torch.stack(losses).sum(), {"shape_right": right.item()}

    return step_loss
