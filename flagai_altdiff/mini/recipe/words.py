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
from flagai_altdiff.mini.recipe.corpus import telling_words
from flagai_altdiff.mini.recipe.matching import all_read_outs
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.things.asking import asked_for
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
_POOL = 4
"""Batches of words that are drawn at once, to take one of words about equally long."""
_SHARED, _OWN = 0.3, 0.45
"""Shares of words for several things, which are few but the everyday ones, and of further words for one; the rest are
names."""
_ASKED_FOR, _WORN, _WITH_ARTICLE, _CAPITAL = 0.35, 0.15, 0.15, 0.2
"""Shares of words within what people say around them; worn; with an article; beginning with a capital."""
_BARE_SHAPES = 0.04
"""Share of the words alone that are drawn shapes without a colour."""
_SHAPES, _WITHOUT_GROUND = 0.15, 0.25
"""Shares of the phrases that are of drawn shapes, and that name no ground."""
_LEAST_WORN = 4
_SMALLER = 0.08
_USUAL = dict(zip(SHAPES, "red blue green yellow red blue yellow yellow purple orange".split(), strict=True))
"""The colour of a shape of which only the shape is said."""


def words_task(model: AltCLIP, things: Sequence[Thing], tokenize: CaptionTokenizer, settings: StageSettings) -> Task:
    """Words alone and within phrases mean what the name means to the tower as it is now.

    Args:
        model: Its text tower learns.
        things: With their names and further words.
        tokenize: Its tokenizer.
        settings: Of the stage.
    """
    tower = deepcopy(model.text_model).eval().requires_grad_(False)
    _let_embeddings_learn(model.text_model)
    languages, shapes, count = list(LANGUAGES), training_scenes(), settings.row.batch_size
    names = {
        language: torch.cat([_of_names(tower, things, tokenize, language), _of_shapes(tower, tokenize, language)])
        for language in languages
    }
    telling = telling_words(things)
    taken = {language: _all_words(things, language) for language in languages}
    places = [(number, language) for number in range(len(things)) for language in languages]
    shared = [(n, code, word) for n, code in places for word in things[n].shared_words[code]]
    own = [
        (n, code, word)
        for n, code in places
        for word in (*things[n].words[code], *telling.get((things[n].code, code), ()))
    ]

    def word(rng: random.Random) -> tuple[int, str, str]:
        """Number of the thing, language, and what it is called, or asked for with."""
        kind = rng.random()
        if kind < _SHARED + _OWN:
            number, language, found = rng.choice(shared if kind < _SHARED else own)
        else:
            number, language = rng.choice(places)
            found = things[number].names[language]
        return number, language, said(found, language, rng)

    def said(word: str, language: str, rng: random.Random, *, with_colour: bool = True) -> str:
        """As people say it; never what means something else."""
        kind = rng.random()
        if kind < _ASKED_FOR:
            text = asked_for(word, language, rng, with_colour=with_colour)
        else:
            text = _worn(word, rng) if kind < _ASKED_FOR + _WORN else word
        return word if text.casefold() in taken[language] else text

    def shape(rng: random.Random) -> tuple[int, str, str]:
        """As for a thing; shapes are counted behind those."""
        number, language = rng.randrange(len(SHAPES)), rng.choice(languages)
        text = said(LANGUAGES[language].shapes[number], language, rng, with_colour=False)
        return len(things) + number, language, text

    def draw(step: int) -> dict[str, Tensor]:
        rng = random.Random(f"{settings.row.name}:{step}")
        return draw_words(rng) if (step + 1) % _PHRASES_EVERY else draw_phrases(rng)

    def draw_words(rng: random.Random) -> dict[str, Tensor]:
        chosen = [shape(rng) if rng.random() < _BARE_SHAPES else word(rng) for _ in range(_POOL * count)]
        texts = [_typed(text, language, rng) for _, language, text in chosen]
        ids = tokenize.varied(texts, rng)
        first = rng.randrange(len(texts) - count + 1)
        some = text_lengths(ids).argsort()[first : first + count]
        wanted = torch.stack([names[language][number] for number, language, _ in (chosen[i] for i in some.tolist())])
        return {"ids": trim_padding(ids[some]), "wanted": wanted}

    def draw_phrases(rng: random.Random) -> dict[str, Tensor]:
        texts, plain = [], []
        for _ in range(max(1, count // _FEWER)):
            with_ground = rng.random() >= _WITHOUT_GROUND
            if rng.random() < _SHAPES:
                language = rng.choice(languages)
                texts.append(random_caption(rng.choice(shapes), language, rng, with_background=with_ground))
                plain.append(texts[-1])
                continue
            number, language, found = word(rng)
            scene, patterns = random_scene(things[number].code, rng), LANGUAGES[language].patterns
            pattern = rng.choice((None, *range(len(patterns))))
            for name, some in ((things[number].names[language], plain), (found, texts)):
                some.append(phrase(scene, name, language, pattern=pattern, with_ground=with_ground))
        same = torch.tensor([text == other for text, other in zip(texts, plain, strict=True)])
        ids = trim_padding(torch.cat([tokenize(plain), tokenize(texts)]))
        return {"ids": ids[len(plain) :], "plain": ids[: len(plain)], "same": same}

    def losses(batch: Batch, gather: Gather) -> Tensor:
        found = all_read_outs(model.text_model, batch["ids"])
        if "wanted" in batch:
            wanted = batch["wanted"].unbind(dim=1)
        else:
            with torch.no_grad():
                wanted = all_read_outs(tower, batch["plain"])
        pairs = zip(found, wanted, strict=True)
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
def _of_names(
    tower: RobertaSeriesModelWithTransformation, things: Sequence[Thing], tokenize: CaptionTokenizer, language: str
) -> Tensor:
    """What the tower says of each name, (things, 3, D)."""
    return torch.stack(all_read_outs(tower, trim_padding(tokenize([t.names[language] for t in things]))), dim=1)


@torch.no_grad()
def _of_shapes(tower: RobertaSeriesModelWithTransformation, tokenize: CaptionTokenizer, language: str) -> Tensor:
    """What the tower says of each drawn shape in its usual colour, (shapes, 3, D)."""
    scenes = [Scene(shape=shape, colour=colour, background="white") for shape, colour in _USUAL.items()]
    texts = [caption(scene, language, with_background=False) for scene in scenes]
    return torch.stack(all_read_outs(tower, trim_padding(tokenize(texts))), dim=1)


def _all_words(things: Sequence[Thing], language: str) -> set[str]:
    """Everything that means a thing, held out or not."""
    words = (
        (t.names[language], *t.words[language], *t.shared_words[language], *t.unseen_words[language]) for t in things
    )
    return {word.casefold() for some in words for word in some}


@torch.no_grad()
def _let_embeddings_learn(tower: RobertaSeriesModelWithTransformation) -> None:
    """Make the embeddings of pieces, which begin as noise with a deviation of 1, small beside the steps of training.

    A normalisation follows them, so that the tower says the same as before.
    """
    for name, table in tower.roberta.embeddings.named_parameters():
        if name.endswith("embeddings.weight"):
            table.mul_(_SMALLER)


def _worn(word: str, rng: random.Random) -> str:
    """With a letter left out, twice or in another's place, or without its end."""
    if len(word) < _LEAST_WORN:
        return word
    at = rng.randrange(1, len(word) - 1)
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    return rng.choice((head + tail, head + letter + letter + tail, head + tail[0] + letter + tail[1:], word[:-1]))


def _typed(word: str, language: str, rng: random.Random) -> str:
    articles = LANGUAGES[language].articles
    text = f"{rng.choice(articles.split('/'))} {word}" if articles and rng.random() < _WITH_ARTICLE else word
    return text[0].upper() + text[1:] if rng.random() < _CAPITAL else text
