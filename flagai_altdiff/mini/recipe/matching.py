"""The matching models: an English teacher learns from pictures, a student in 18 languages from the teacher.

**Source**: Radford et al. 2021 (CLIP) for the teacher; Chen et al. 2023 (arXiv 2211.06679) for the student.
"""

from __future__ import annotations

import random
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.mini.recipe.corpus import Corpus
from flagai_altdiff.mini.recipe.judge import weathered
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation, trim_padding
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.losses import feature_losses
from flagai_altdiff.training.objectives import Batch, Gather, contrastive_losses

_SCALED, _SHIFTED = 0.08, 0.1
"""How far the teacher's pictures are scaled and shifted at most; 1 is half of their side."""
_MOST_SCALE = 4.6
"""Logarithm of what cosines are multiplied with at most: 100, as CLIP has it."""


def read_outs(text_model: RobertaSeriesModelWithTransformation, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the tower says of texts at their beginning, and behind their end.

    The UNet looks at all 77 states, most of which are those of padding: they must tell everything as well.

    Args:
        text_model: The tower.
        ids: (B, L), one row of padding behind the longest text.

    Returns:
        Twice (B, project_dim).
    """
    hidden, first = text_model.pooled(ids)
    return first, text_model.transformation(text_model.pre_LN(hidden[:, -1]))


def teacher_task(
    model: AltCLIP, tokenize: CaptionTokenizer, corpus: Corpus, settings: StageSettings, *, on_one_ground: bool
) -> Task:
    """Every phrase finds its picture among those of the batch, and the reverse; English only.

    Args:
        model: Both its towers learn.
        tokenize: Its tokenizer.
        corpus: Pictures and phrases.
        settings: Of the stage.
        on_one_ground: Whether every other batch has pictures on one ground only, which the thing alone tells apart.
    """
    count, side = settings.row.batch_size, model.config.vision.image_size
    grounds = [[i for i, shown in enumerate(corpus.shown) if shown.background == colour] for colour in COLOURS]

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        chosen = rng.sample(rng.choice(grounds) if on_one_ground and step % 2 else range(len(corpus)), count)
        texts = [corpus.phrase(i, "en", rng, with_ground=corpus.names_ground(i, rng)) for i in chosen]
        generator = torch.Generator().manual_seed(step)
        moved = _moved(corpus.pictures.batch(chosen), side, generator)
        images = weathered(moved, generator, blur=1)
        return {"ids": trim_padding(tokenize.varied(texts, rng)), "image": images}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        seen = F.normalize(model.get_image_features(model.transform.transform.normalised(batch["image"])), dim=-1)
        scale = model.logit_scale.clamp(max=_MOST_SCALE).exp()
        said = [model.text_projection(state) for state in read_outs(model.text_model, batch["ids"])]
        each = [contrastive_losses(F.normalize(text, dim=-1), seen, scale, gather) for text in said]
        return torch.stack(each).mean(dim=0)

    return Task(model=model, draw=draw, losses=losses)


def _moved(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Pictures a little nearer or farther and a little aside, at another size."""
    small = F.interpolate(images, size=(side, side), mode="area")
    scale = 1 + _SCALED * (2 * torch.rand(len(images), generator=generator) - 1)
    shift = _SHIFTED * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    maps = torch.cat([torch.diag_embed(scale[:, None].expand(-1, 2)), shift[:, :, None]], dim=2)
    grid = F.affine_grid(maps, list(small.shape), align_corners=False)
    return F.grid_sample(small, grid, padding_mode="border", align_corners=False)


def student_task(
    student: AltCLIP, teacher: AltCLIP, tokenize: CaptionTokenizer, corpus: Corpus, settings: StageSettings
) -> Task:
    """What the teacher says of a plain English phrase, the student says of every phrase that means the same."""
    count, languages = settings.row.batch_size, list(LANGUAGES)
    tower = deepcopy(teacher.text_model).eval().requires_grad_(False)

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        texts, plain = [], []
        for i in rng.choices(range(len(corpus)), k=count):
            with_ground = corpus.names_ground(i, rng)
            texts.append(corpus.loose_phrase(i, rng.choice(languages), rng, with_ground=with_ground))
            plain.append(corpus.plain_english(i, with_ground=with_ground))
        for number in range(count):
            if rng.random() < settings.row.text_drop:
                texts[number] = plain[number] = ""
        return {"ids": trim_padding(tokenize.varied(texts, rng)), "plain": trim_padding(tokenize(plain))}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        with torch.no_grad():
            wanted = all_read_outs(tower, batch["plain"])
        pairs = zip(all_read_outs(student.text_model, batch["ids"]), wanted, strict=True)
        return torch.stack([feature_losses(found, target, settings.loss) for found, target in pairs]).mean(dim=0)

    return Task(model=student, draw=draw, losses=losses)


def all_read_outs(text_model: RobertaSeriesModelWithTransformation, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is compared with pictures, and of what the UNet looks at the first state and that of padding."""
    hidden, first = text_model.pooled(ids)
    return first, text_model.transformation(hidden[:, 0]), text_model.transformation(hidden[:, -1])
