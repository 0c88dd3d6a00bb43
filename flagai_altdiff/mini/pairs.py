"""Two things side by side, which training never shows: how often does the model draw both?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagai_altdiff.mini.judge import SEEN, Judge, load_judge, looked_at
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.phrases import WORDS
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate


@dataclass(frozen=True, kw_only=True)
class PairQuestion:
    """A prompt that names two things.

    Attributes:
        prompt: Both names, as a list.
        codes: Of the things.
    """

    prompt: str
    codes: tuple[str, str]


def pair_questions(things: Sequence[Thing], language: str, count: int) -> list[PairQuestion]:
    """Pairs by chance, always the same ones.

    Args:
        things: What the model knows.
        language: A key of ``LANGUAGES``.
        count: How many.
    """
    rng = random.Random(f"pairs:{language}")
    pairs = [rng.sample(list(things), 2) for _ in range(count)]
    return [
        PairQuestion(prompt=WORDS[language].comma.join((a.names[language], b.names[language])), codes=(a.code, b.code))
        for a, b in pairs
    ]


@torch.no_grad()
def measure_pairs(
    model: LatentDiffusion, asked: Sequence[PairQuestion], *, judge: Judge | None = None, seed: int = 0
) -> Tensor:
    """Draw an image for each question with the model's default settings.

    Args:
        model: From ``load_model``.
        asked: From :func:`pair_questions`.
        judge: The package's own unless given.
        seed: Seed of the noise.

    Returns:
        (questions, 2): for each thing whether it is one of the two that the judge finds likeliest.
    """
    prompts = [question.prompt for question in asked]
    images = generate(model, prompts, batch_size=20, seed=seed, seed_mode="batch").images
    eye = judge or load_judge()
    parts = torch.split(looked_at(images), 100)  # type: ignore[no-untyped-call]
    likeliest = torch.cat([eye(part)["what"].topk(2).indices for part in parts])
    wanted = torch.tensor([[SEEN["what"].index(code) for code in question.codes] for question in asked])
    return (wanted[:, :, None] == likeliest[:, None, :]).any(dim=2)
