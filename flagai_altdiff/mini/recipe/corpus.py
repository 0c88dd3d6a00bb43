"""What the recipe learns from: the pictures of shards, and ever new phrases that describe them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagai_altdiff.mini.captions import caption, random_caption, with_an
from flagai_altdiff.mini.recipe.pictures import Pictures
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.phrases import phrase, random_phrase
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene

Shown = ThingScene | Scene
"""What a picture shows: a thing, or a shape that the package draws."""
_WITHOUT_GROUND = 0.25
"""Share of the phrases of things that do not name the ground; shapes are bare less often."""
_SHAPE_WITHOUT_GROUND = 0.15
_SHORTENED, _WITH_ARTICLE = 0.1, 0.2
"""Shares of the phrases that a student learns from."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Pictures, and how to say what they show.

    Args:
        pictures: All of them.
        shown: What each shows.
        things: By their codes.
        telling: Code and language -> words of a thing's name that no other thing has; none that are held out.
    """

    pictures: Pictures
    shown: Sequence[Shown]
    things: Mapping[str, Thing]
    telling: Mapping[tuple[str, str], tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.shown)

    def names_ground(self, index: int, rng: random.Random) -> bool:
        """Whether a phrase is to name the ground."""
        return rng.random() >= (_WITHOUT_GROUND if isinstance(self.shown[index], ThingScene) else _SHAPE_WITHOUT_GROUND)

    def phrase(self, index: int, language: str, rng: random.Random, *, with_ground: bool) -> str:
        """Words for a picture as people might type them; other ones each time."""
        scene = self.shown[index]
        if isinstance(scene, ThingScene):
            return random_phrase(scene, self.things[scene.code], language, rng, with_ground=with_ground)
        return random_caption(scene, language, rng, with_background=with_ground)

    def loose_phrase(self, index: int, language: str, rng: random.Random, *, with_ground: bool) -> str:
        """As :meth:`phrase`, but less tidy: with an article of any gender, or with no more than a telling word."""
        scene = self.shown[index]
        if not isinstance(scene, ThingScene):
            return self.phrase(index, language, rng, with_ground=with_ground)
        parts, articles = self.telling.get((scene.code, language)), LANGUAGES[language].articles
        if parts and rng.random() < _SHORTENED:
            pattern = rng.choice((None, *range(len(LANGUAGES[language].patterns))))
            text = phrase(scene, rng.choice(parts), language, pattern=pattern, with_ground=with_ground)
        else:
            text = self.phrase(index, language, rng, with_ground=with_ground)
        if articles and rng.random() < _WITH_ARTICLE:
            return with_an(f"{rng.choice(articles.split('/'))} {text}", language)
        return text

    def plain_english(self, index: int, *, with_ground: bool) -> str:
        """The one phrase of which all that say the same are translations."""
        scene = self.shown[index]
        if isinstance(scene, ThingScene):
            return phrase(scene, self.things[scene.code].names["en"], "en", with_ground=with_ground)
        return caption(scene, "en", with_background=with_ground)


def make_corpus(pictures: Pictures, things: Sequence[Thing]) -> Corpus:
    """The corpus of some pictures."""
    return Corpus(
        pictures=pictures,
        shown=[_shown(facts) for facts in pictures.facts],
        things={thing.code: thing for thing in things},
        telling=telling_words(things),
    )


def telling_words(things: Sequence[Thing]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Words of longer names that tell their thing alone: no other thing has them, and none of them is held out.

    Words that CLDR gives to several things are no other's either, but for the one that they are given to here.
    """
    found = {}
    for language in LANGUAGES:
        having: Counter[str] = Counter()
        held_out = {word.casefold() for thing in things for word in thing.unseen_words[language]}
        for thing in things:
            texts = thing.all_words(language)
            having.update({part for text in texts for part in text.casefold().split()})
        for thing in things:
            words = thing.names[language].split()
            own = tuple(w for w in words if having[w.casefold()] == 1 and w.casefold() not in held_out)
            if own and len(words) > 1:
                found[thing.code, language] = own
    return found


def _shown(facts: Mapping[str, Any]) -> Shown:
    own = {name: value for name, value in facts.items() if name != "captions"}
    return ThingScene(**own) if "code" in own else Scene(**own)
