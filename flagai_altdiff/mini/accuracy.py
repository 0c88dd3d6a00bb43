"""Does the model draw what it is asked for? Prompts in every language, many of them unseen in training, and a judge."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagai_altdiff.evaluation.intervals import Estimate, estimate
from flagai_altdiff.mini.captions import caption, with_an
from flagai_altdiff.mini.judge import SEEN, Judge, load_judge, looked_at, right_answers, see
from flagai_altdiff.mini.things.asking import ASKING, asked_for
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.phrases import phrase
from flagai_altdiff.mini.things.sprites import STYLES
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES
from flagai_altdiff.mini.world import Scene, held_out_scenes
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate

logger = logging.getLogger(__name__)

_REPLICATES = 1000


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt, and what is to be seen in its image.

    Attributes:
        prompt: The words.
        shown: What they describe.
        asked: Keys of ``SEEN`` that the prompt names.
    """

    prompt: str
    shown: Scene | ThingScene
    asked: tuple[str, ...]


def _names(things: Sequence[Thing], language: str, rng: random.Random) -> Iterable[Question]:
    """Nothing but what Unicode's CLDR calls a thing."""
    for thing in things:
        scene = ThingScene(code=thing.code, background=rng.choice(COLOURS))
        yield Question(prompt=thing.names[language], shown=scene, asked=("what",))


def _grounds(things: Sequence[Thing], language: str, rng: random.Random, *, seen: bool) -> Iterable[Question]:
    """A thing on a ground, pairs that training saw, or others."""
    for number, thing in enumerate(things):
        scenes = [ThingScene(code=thing.code, background=colour) for colour in COLOURS]
        if fitting := [scene for scene in scenes if scene.ground_is_held_out != seen]:
            scene = rng.choice(fitting)
            yield Question(prompt=_phrase(scene, thing, language, number), shown=scene, asked=("what", "background"))


def _places(things: Sequence[Thing], language: str, rng: random.Random) -> Iterable[Question]:
    """A thing in a size and a place."""
    for number, thing in enumerate(things):
        size, position = rng.choice((("small", "left"), ("small", "right"), ("large", "centre"), ("small", "centre")))
        scene = ThingScene(code=thing.code, background=rng.choice(COLOURS), size=size, position=position)
        yield Question(prompt=_phrase(scene, thing, language, number), shown=scene, asked=("what", "size", "position"))


def _asked(things: Sequence[Thing], language: str, rng: random.Random, *, seen: bool) -> Iterable[Question]:
    """A thing's name within what people say around it, in patterns that training saw, or others."""
    for thing in things:
        name, scene = thing.names[language], ThingScene(code=thing.code, background=rng.choice(COLOURS))
        held_out = with_an(rng.choice(ASKING[language].unseen).format(name), language)
        prompt = asked_for(name, language, rng) if seen else held_out
        yield Question(prompt=prompt, shown=scene, asked=("what",))


def _words(
    of: Callable[[Thing], Mapping[str, Sequence[str]]],
) -> Callable[[Sequence[Thing], str, random.Random], Iterable[Question]]:
    """A word alone that is no name."""

    def found(things: Sequence[Thing], language: str, rng: random.Random) -> Iterable[Question]:
        for thing in things:
            for word in of(thing)[language]:
                scene = ThingScene(code=thing.code, background=rng.choice(COLOURS))
                yield Question(prompt=word, shown=scene, asked=("what",))

    return found


def _styles(things: Sequence[Thing], language: str, rng: random.Random, *, seen: bool) -> Iterable[Question]:
    """A thing in a style, pairs that training saw, or others."""
    for number, thing in enumerate(things):
        scenes = [ThingScene(code=thing.code, background=c, style=s) for c in COLOURS for s in STYLES[1:]]
        if fitting := [scene for scene in scenes if scene.style_is_held_out != seen]:
            scene = rng.choice(fitting)
            yield Question(prompt=_phrase(scene, thing, language, number), shown=scene, asked=("what", "style"))


def _shapes(things: Sequence[Thing], language: str, rng: random.Random) -> Iterable[Question]:
    """Drawn shapes in combinations of shape, colour and ground that training never saw, with a size and a place."""
    by_triple: dict[tuple[str, str, str], list[Scene]] = {}
    for scene in held_out_scenes():
        by_triple.setdefault((scene.shape, scene.colour, scene.background), []).append(scene)
    for number, scenes in enumerate(by_triple.values()):
        scene = rng.choice(scenes)
        asked = tuple(name for name in SEEN if name != "style")
        yield Question(prompt=caption(scene, language, pattern=number), shown=scene, asked=asked)


def _phrase(scene: ThingScene, thing: Thing, language: str, number: int) -> str:
    """Lists and sentences in turn."""
    pattern = number % (len(LANGUAGES[language].patterns) + 1)
    return phrase(scene, thing.names[language], language, pattern=pattern or None)


KINDS: Mapping[str, Callable[[Sequence[Thing], str, random.Random], Iterable[Question]]] = {
    "name": _names,
    "ground": lambda things, language, rng: _grounds(things, language, rng, seen=True),
    "unseen ground": lambda things, language, rng: _grounds(things, language, rng, seen=False),
    "size and place": _places,
    "style": lambda things, language, rng: _styles(things, language, rng, seen=True),
    "unseen style": lambda things, language, rng: _styles(things, language, rng, seen=False),
    "asked": lambda things, language, rng: _asked(things, language, rng, seen=True),
    "unseen asking": lambda things, language, rng: _asked(things, language, rng, seen=False),
    "further word": _words(lambda thing: thing.words),
    "shared word": _words(lambda thing: thing.shared_words),
    "unseen word": _words(lambda thing: thing.unseen_words),
    "shape": _shapes,
}
"""Kinds of questions -> all of them in a language, in an order of their own."""


def questions(kind: str, things: Sequence[Thing], language: str, count: int) -> list[Question]:
    """Some of the questions of a kind, always the same ones.

    Args:
        kind: A key of ``KINDS``.
        things: What the model knows.
        language: A key of ``LANGUAGES``.
        count: How many at most.
    """
    rng = random.Random(f"questions:{kind}:{language}")
    found = list(KINDS[kind](things, language, rng))
    return rng.sample(found, min(count, len(found)))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How often the judge saw what was asked for.

    Attributes:
        kind: A key of ``KINDS``.
        language: Of the prompts.
        right: Key of ``SEEN`` -> of each image, whether it was right.
    """

    kind: str
    language: str
    right: Mapping[str, Tensor]

    def shares(self) -> dict[str, Estimate]:
        """Of each that was asked, the share that was right, with its interval."""
        key = f"{self.kind}:{self.language}"
        return {name: _share(values, f"{key}:{name}") for name, values in self.right.items()}


def measure(
    model: LatentDiffusion,
    asked: Sequence[Question],
    *,
    judge: Judge | None = None,
    batch_size: int = 20,
    guidance_scale: float | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw an image for each question with the model's default settings, and judge it.

    Args:
        model: From ``load_model``.
        asked: Of one kind.
        judge: The package's own unless given.
        batch_size: Images drawn at once.
        guidance_scale: The model's own unless given.
        steps: The model's own unless given.
        seed: Seed of the noise.

    Returns:
        Key of ``SEEN`` -> of each question that asks for it, whether the image is right.
    """
    result = generate(
        model,
        [question.prompt for question in asked],
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        steps=steps,
        seed=seed,
        seed_mode="batch",
    )
    right = see(judge or load_judge(), looked_at(result.images)) == torch.tensor(
        [right_answers(question.shown) for question in asked]
    )
    return {name: right[:, list(SEEN).index(name)] for name in asked[0].asked}


def _share(right: Tensor, key: str) -> Estimate:
    values = right.float()
    return estimate(lambda rows: values[rows].mean().item(), len(values), _REPLICATES, 0, key)


def as_table(answers: Sequence[Answers]) -> str:
    """One line for each language, one column for each kind and what it asks, in per cent; and the mean of languages."""
    kinds = list(dict.fromkeys(one.kind for one in answers))
    columns = [(kind, name) for kind in kinds for name in next(a.right for a in answers if a.kind == kind)]
    by_place = {(one.kind, one.language): one.right for one in answers}
    languages = list(dict.fromkeys(one.language for one in answers))
    lines = [
        "| language | " + " | ".join(kind if name == "what" else f"{kind}: {name}" for kind, name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for language in languages:
        cells = [_cell([by_place[kind, language][name]]) for kind, name in columns]
        lines.append(f"| {LANGUAGES[language].name} ({language}) | " + " | ".join(cells) + " |")
    cells = [_cell([by_place[kind, language][name] for language in languages], name) for kind, name in columns]
    lines.append("| **all** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(parts: Sequence[Tensor], key: str = "") -> str:
    """A share in per cent; of all languages with half the width of its interval."""
    whole = torch.cat(list(parts))
    if not key:
        return f"{100 * whole.float().mean():.0f}"
    found = _share(whole, key)
    half = 0.0 if found.low is None or found.high is None else (found.high - found.low) / 2
    return f"{100 * found.value:.1f} ± {100 * half:.1f}"
