"""Does the model draw what it is asked for? Prompts that training never saw, in every language, seen by the judge."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import torch

from flagai_altdiff.mini.batches import as_batch
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import load_judge, see
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import ATTRIBUTES, Scene, draw_scenes, held_out_scenes
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of images in which the judge sees what the prompt says.

    Attributes:
        language: Code of the prompts' language.
        prompts: Number of prompts, one image each.
        shape: Share with the right shape.
        colour: Share with the right colour of the object.
        background: Share with the right background.
        size: Share with the right size.
        position: Share with the right position.
        triple: Share with shape, colour and background right at once.
    """

    language: str
    prompts: int
    shape: float
    colour: float
    background: float
    size: float
    position: float
    triple: float


def held_out_prompts(language: str, count: int) -> list[tuple[Scene, str]]:
    """Scenes that training never saw, and prompts that name all of each: every triple equally often, every pattern.

    Args:
        language: A key of ``LANGUAGES``.
        count: How many.
    """
    rng = random.Random(f"held out:{language}")
    by_triple: dict[tuple[str, str, str], list[Scene]] = {}
    for scene in held_out_scenes():
        by_triple.setdefault((scene.shape, scene.colour, scene.background), []).append(scene)
    scenes: list[Scene] = []
    while len(scenes) < count:
        variants = [rng.choice(same) for same in by_triple.values()]
        scenes += draw_scenes(variants, min(len(variants), count - len(scenes)), rng)
    return [(scene, caption(scene, language, pattern=i)) for i, scene in enumerate(scenes)]


def measure(
    model: LatentDiffusion,
    language: str,
    *,
    prompts: int = 200,
    batch_size: int = 20,
    guidance_scale: float | None = None,
    seed: int = 0,
) -> Accuracy:
    """Draw held-out prompts of one language with the model's default settings, and judge the images.

    Args:
        model: From ``load_model``.
        language: A key of ``LANGUAGES``.
        prompts: How many; one image each.
        batch_size: Images drawn at once.
        guidance_scale: The model's own unless given.
        seed: Seed of the noise.
    """
    pairs = held_out_prompts(language, prompts)
    result = generate(
        model,
        [prompt for _, prompt in pairs],
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        seed=seed,
        seed_mode="batch",
    )
    seen = see(load_judge(), as_batch(result.images))
    wanted = torch.tensor([scene.labels for scene, _ in pairs])
    right = wanted == torch.tensor([scene.labels for scene in seen])
    shares = dict(zip(ATTRIBUTES, right.float().mean(dim=0).tolist(), strict=True))
    accuracy = Accuracy(
        language=language, prompts=prompts, triple=right[:, :3].all(dim=1).float().mean().item(), **shares
    )
    logger.info("%s", accuracy)
    return accuracy


def as_table(rows: list[Accuracy]) -> str:
    """The measurements as a Markdown table, in per cent."""
    columns = ("background", "colour", "shape", "triple", "size", "position")
    lines = ["| language | prompts | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for row in rows:
        values = (f"{100 * getattr(row, column):.1f}" for column in columns)
        lines.append(
            f"| {LANGUAGES[row.language].name} ({row.language}) | {row.prompts} | " + " | ".join(values) + " |"
        )
    return "\n".join(lines)
