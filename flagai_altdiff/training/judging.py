"""Training of the judge on drawn pictures."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.scenes.drawing import draw_batch
from flagai_altdiff.scenes.judge import Judge
from flagai_altdiff.scenes.world import Scene
from flagai_altdiff.training.loop import StepLoss
from flagai_altdiff.training.stages import Stage


def weathered(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as an autoencoder gives them back: a little blurred, a little noisy."""
    blurred = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    share = torch.rand(len(pictures), 1, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator) * 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return torch.lerp(pictures, blurred, share) + noise


def judge_loss(judge: Judge, stage: Stage, scenes: list[Scene]) -> StepLoss:
    """Cross-entropy of all five attributes."""

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"judge:{step}")
        drawn = rng.choices(scenes, k=stage.batch)
        pictures = weathered(draw_batch(drawn, rng), torch.Generator().manual_seed(step))
        labels = torch.tensor([scene.labels for scene in drawn]).T
        logits = judge(pictures.contiguous(memory_format=torch.channels_last))
        losses = [F.cross_entropy(logit, wanted) for logit, wanted in zip(logits.values(), labels, strict=True)]
        right = (logits["shape"].argmax(dim=1) == labels[0]).float().mean()
        return torch.stack(losses).sum(), {"shape_right": right.item()}

    return step_loss
