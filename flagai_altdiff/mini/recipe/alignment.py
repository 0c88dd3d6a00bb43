"""Brings the text states of a scene together: one state per scene, in whatever language and words.

The UNet is trained before this and stays as it is. It follows the mean of a scene's states better than most single
ones, so the text encoder is taught to give that mean, which costs minutes.

**Source**: the teacher learning of Chen et al. 2023 (arXiv 2211.06679), with the encoder's own mean as teacher.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.text_encoder import CaptionTokenizer, draw_caption
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation, trim_padding
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.objectives import Batch


@torch.no_grad()
def mean_states(
    encoder: RobertaSeriesModelWithTransformation, tokenize: CaptionTokenizer, scenes: Sequence[Scene]
) -> dict[Scene, Tensor]:
    """The mean over all languages of each scene's padding state, (D,): most of what the UNet attends to is padding."""
    means = {}
    for i, scene in enumerate(scenes):
        captions = [caption(scene, code, pattern=i) for code in LANGUAGES]
        means[scene] = encoder(trim_padding(tokenize(captions)))[:, -1].mean(dim=0)
    return means


def alignment_task(
    encoder: RobertaSeriesModelWithTransformation,
    tokenize: CaptionTokenizer,
    settings: StageSettings,
    scenes: Sequence[Scene],
) -> Task:
    """Distance of every state of a caption from its scene's mean.

    Captions that leave the background open, and the empty one, keep the states that they had.
    """
    teacher = deepcopy(encoder).eval().requires_grad_(False)
    means = mean_states(teacher, tokenize, scenes)

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"alignment:{step}")
        drawn = rng.choices(scenes, k=settings.row.batch_size)
        dropped = settings.row.text_drop
        captions = [("", False) if rng.random() < dropped else draw_caption(scene, rng) for scene in drawn]
        return {
            "ids": trim_padding(tokenize([text for text, _ in captions])),
            "named": torch.tensor([named for _, named in captions]),
            "mean": torch.stack([means[scene] for scene in drawn]),
        }

    def losses(batch: Batch) -> Tensor:
        ids = batch["ids"]
        with torch.no_grad():
            target = torch.where(batch["named"][:, None, None], batch["mean"][:, None], teacher(ids))
        return F.mse_loss(encoder(ids), target, reduction="none").mean(dim=(1, 2))

    return Task(model=encoder, draw=draw, losses=losses)
