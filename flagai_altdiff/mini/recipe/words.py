"""Further words: what a text tower says of a thing's name, it learns to say of every other word for that thing, and of
what people say around it.

The states of names and phrases stay as they are, so that a UNet which knows them needs no training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from flagai_altdiff.mini.captions import caption, random_caption
from flagai_altdiff.mini.recipe.matching import all_read_outs
from flagai_altdiff.mini.recipe.saying import Saying, Word, typed
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import random_scene
from flagai_altdiff.mini.things.phrases import phrase
from flagai_altdiff.mini.vocabulary import LANGUAGES, SHAPES
from flagai_altdiff.mini.world import Scene, training_scenes
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation, text_lengths, trim_padding
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.losses import feature_losses
from flagai_altdiff.training.objectives import Batch, Gather

_PHRASES_EVERY, _FEWER = 5, 4
"""Which steps are of phrases, and by how much their batches are smaller, as phrases are longer."""
_POLISHING_PHRASES_EVERY, _POLISHING_NAMES = 2, 0.55
"""Which steps are of phrases and which share of words are names in polishing, which mends what these lost."""
_FAR_OFF = 20
"""Up to so many times as often a word is drawn that is farther off than half of its kind, in polishing."""
_AT_ONCE = 512
_POOL = 4
"""Batches of words that are drawn at once, to take one of words about equally long."""
_BARE_SHAPES = 0.04
"""Share of the words alone that are drawn shapes without a colour."""
_SHAPES, _WITHOUT_GROUND = 0.15, 0.25
"""Shares of the phrases that are of drawn shapes, and that name no ground."""
_LIKE = 0.15
"""Up to this share of the differences between things, two languages say the same of one."""
_SMALLER = 0.08
_USUAL = dict(zip(SHAPES, "red blue green yellow red blue yellow yellow purple orange".split(), strict=True))
"""The colour of a shape of which only the shape is said."""


def words_task(
    model: AltCLIP,
    things: Sequence[Thing],
    tokenize: CaptionTokenizer,
    settings: StageSettings,
    before: RobertaSeriesModelWithTransformation | None = None,
) -> Task:
    """Words alone and within phrases mean what the name meant to a tower before any of this.

    Args:
        model: Its text tower learns.
        things: With their names and further words.
        tokenize: Its tokenizer.
        settings: Of the stage.
        before: That tower, where the model's has learnt these words already: it is polished, and sees most of what is
            farthest off. The model's as it is now unless given.
    """
    tower = deepcopy(before or model.text_model).eval().requires_grad_(False)
    if before is None:
        _let_embeddings_learn(model.text_model)
    phrases_every = _PHRASES_EVERY if before is None else _POLISHING_PHRASES_EVERY
    languages, shapes, count = list(LANGUAGES), training_scenes(), settings.row.batch_size
    meant, alike = majority(_said(tower, tokenize, [[t.names[code] for t in things] for code in languages]))
    scenes = [Scene(shape=shape, colour=colour, background="white") for shape, colour in _USUAL.items()]
    shown, _ = majority(
        _said(tower, tokenize, [[caption(s, code, with_background=False) for s in scenes] for code in languages])
    )
    wanted = torch.cat([meant, shown])
    sure = [[language for language, does in zip(languages, row, strict=True) if does] for row in alike.T.tolist()]
    saying = Saying(things) if before is None else Saying(things, names=_POLISHING_NAMES)
    if before is not None:
        saying.prefer(lambda some: _weights(_distances(model.text_model, tokenize, some, meant)))

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        return draw_words(rng) if (step + 1) % phrases_every else draw_phrases(rng)

    def draw_words(rng: random.Random) -> dict[str, Tensor]:
        chosen = [
            saying.of_shape(rng) if rng.random() < _BARE_SHAPES else saying.of_thing(rng) for _ in range(_POOL * count)
        ]
        texts = [typed(text, language, rng) for _, language, text in chosen]
        ids = tokenize.varied(texts, rng)
        first = rng.randrange(len(texts) - count + 1)
        some = text_lengths(ids).argsort()[first : first + count]
        numbers = torch.tensor([number for number, _, _ in chosen])
        return {"ids": trim_padding(ids[some]), "wanted": wanted[numbers[some]]}

    def draw_phrases(rng: random.Random) -> dict[str, Tensor]:
        texts, plain = [], []
        for _ in range(max(1, count // _FEWER)):
            with_ground = rng.random() >= _WITHOUT_GROUND
            if rng.random() < _SHAPES:
                language = rng.choice(languages)
                texts.append(random_caption(rng.choice(shapes), language, rng, with_background=with_ground))
                plain.append(texts[-1])
                continue
            number, language, found = saying.of_thing(rng)
            scene, patterns = random_scene(things[number].code, rng), LANGUAGES[language].patterns
            pattern = rng.choice((None, *range(len(patterns))))
            texts.append(phrase(scene, found, language, pattern=pattern, with_ground=with_ground))
            if language not in sure[number]:
                language = rng.choice(sure[number] or [language])
            name = things[number].names[language]
            plain.append(phrase(scene, name, language, pattern=pattern, with_ground=with_ground))
        same = torch.tensor([text == other for text, other in zip(texts, plain, strict=True)])
        ids = trim_padding(torch.cat([tokenize(plain), tokenize(texts)]))
        return {"ids": ids[len(plain) :], "plain": ids[: len(plain)], "same": same}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        found = all_read_outs(model.text_model, batch["ids"])
        if "wanted" in batch:
            targets = batch["wanted"].unbind(dim=1)
        else:
            with torch.no_grad():
                targets = all_read_outs(tower, batch["plain"])
        pairs = zip(found, targets, strict=True)
        each = torch.stack([feature_losses(own, target, settings.loss) for own, target in pairs]).mean(dim=0)
        return each if "wanted" in batch else each + batch["same"] * changes(batch["ids"])

    def changes(ids: Tensor) -> Tensor:
        """How far all states of texts are from what they were, (B,)."""
        hidden, _ = model.text_model.pooled(ids)
        with torch.no_grad():
            before, _ = tower.pooled(ids)
        states = (model.text_model.transformation(hidden), tower.transformation(before))
        return feature_losses(states[0].flatten(1), states[1].flatten(1), settings.loss)

    return Task(model=model, draw=draw, losses=losses)


@torch.no_grad()
def _said(
    tower: RobertaSeriesModelWithTransformation, tokenize: CaptionTokenizer, texts: Sequence[Sequence[str]]
) -> Tensor:
    """What the tower says of texts, of as many in each language, (languages, texts, 3, D)."""
    return torch.stack([torch.stack(all_read_outs(tower, trim_padding(tokenize(own))), dim=1) for own in texts])


@torch.no_grad()
def _distances(
    tower: RobertaSeriesModelWithTransformation, tokenize: CaptionTokenizer, words: Sequence[Word], meant: Tensor
) -> Tensor:
    """How far what a tower says of words is from what their things mean, (words,)."""
    parts = torch.split(tokenize([word for _, _, word in words]), _AT_ONCE)
    found = [torch.stack(all_read_outs(tower, trim_padding(ids)), dim=1) for ids in parts]
    return (torch.cat(found) - meant[torch.tensor([number for number, _, _ in words])]).square().mean(dim=(1, 2))


def _weights(distances: Tensor) -> list[float]:
    return list((1 + (distances / distances.median()).clamp(max=_FAR_OFF)).tolist())


def majority(said: Tensor) -> tuple[Tensor, Tensor]:
    """What most languages say of each text, and which of them do.

    In a language where a name is also a word for something else, the tower may have taken it for that.

    Args:
        said: (languages, texts, 3, D).

    Returns:
        (texts, 3, D) and (languages, texts), boolean.
    """
    meant = said.median(dim=0).values
    spread = (meant - meant.mean(dim=0)).square().mean()
    return meant, (said - meant).square().mean(dim=(2, 3)) < _LIKE * spread


@torch.no_grad()
def _let_embeddings_learn(tower: RobertaSeriesModelWithTransformation) -> None:
    """Make the embeddings of pieces, which begin as noise with a deviation of 1, small beside the steps of training.

    A normalisation follows them, so that the tower says the same as before.
    """
    for name, table in tower.roberta.embeddings.named_parameters():
        if name.endswith("embeddings.weight"):
            table.mul_(_SMALLER)
