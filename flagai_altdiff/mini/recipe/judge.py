"""What the judge learns from: fresh pictures of everything, as an autoencoder would give them back."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flagai_altdiff.mini.batches import as_batch
from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.judge import CODES, UNTOLD, Judge, right_answers, see
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.things.composing import ThingScene, compose, random_scene
from flagai_altdiff.mini.world import Scene, all_scenes
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.objectives import Batch, Gather

Sprites = Mapping[tuple[str, str], Image.Image]
_SHAPES = 0.1
"""Share of the drawn shapes."""
FRESH, _CHUNK = 4000, 200
"""Pictures on which the judge is judged, and how many at once."""


def weathered(images: Tensor, generator: torch.Generator, blur: int = 2) -> Tensor:
    """Images as an autoencoder gives them back: a little blurred, over ``blur`` px at most, a little noisy."""
    blurred = F.avg_pool2d(F.pad(images, [blur] * 4, mode="replicate"), 2 * blur + 1, stride=1)
    share = torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * 0.1 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, share) + noise


def fresh_pictures(sprites: Sprites, count: int, rng: random.Random) -> tuple[Tensor, list[Scene | ThingScene]]:
    """Pictures that may show what training never sees, (B, 3, 128, 128) in [-1, 1], and what they show."""
    shown: list[Scene | ThingScene] = []
    for _ in range(count):
        is_shape = rng.random() < _SHAPES
        shown.append(rng.choice(all_scenes()) if is_shape else random_scene(rng.choice(CODES), rng, held_out=True))
    pixels = [
        draw(scene, rng) if isinstance(scene, Scene) else compose(sprites[scene.code, scene.style], scene, rng)
        for scene in shown
    ]
    return as_batch(pixels), shown


def judge_task(judge: Judge, settings: StageSettings, sprites: Sprites) -> Task:
    """Cross-entropy of all answers."""

    def draw_samples(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"judge:{step}")
        images, shown = fresh_pictures(sprites, settings.row.batch_size, rng)
        images = weathered(images, torch.Generator().manual_seed(step))
        return {"image": images, "answers": torch.tensor([right_answers(scene) for scene in shown])}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        found = judge(batch["image"].contiguous(memory_format=torch.channels_last))
        pairs = zip(found.values(), batch["answers"].T, strict=True)
        each = [F.cross_entropy(logits, want, reduction="none", ignore_index=UNTOLD) for logits, want in pairs]
        return torch.stack(each).sum(dim=0)

    return Task(model=judge, draw=draw_samples, losses=losses)


def share_right(judge: Judge, sprites: Sprites) -> Tensor:
    """Share of right answers on fresh pictures, (questions,)."""
    found, wanted = [], []
    for first in range(0, FRESH, _CHUNK):
        images, shown = fresh_pictures(sprites, min(_CHUNK, FRESH - first), random.Random(f"fresh:{first}"))
        found.append(see(judge, images))
        wanted.append(torch.tensor([right_answers(scene) for scene in shown]))
    answers, seen = torch.cat(wanted), torch.cat(found)
    return ((answers == seen) & (answers != UNTOLD)).sum(dim=0) / (answers != UNTOLD).sum(dim=0)
