"""What the recipe learns from: the pictures of shards, and ever new phrases that describe them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagai_altdiff.mini.captions import caption, random_caption
from flagai_altdiff.mini.recipe.pictures import Pictures
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.phrases import phrase, random_phrase
from flagai_altdiff.mini.world import Scene

Shown = ThingScene | Scene
"""What a picture shows: a thing, or a shape that the package draws."""
_WITHOUT_GROUND = 0.25
"""Share of the phrases of things that do not name the ground; shapes are bare less often."""
_SHAPE_WITHOUT_GROUND = 0.15


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Pictures, and how to say what they show.

    Args:
        pictures: All of them.
        shown: What each shows.
        things: By their codes.
    """

    pictures: Pictures
    shown: Sequence[Shown]
    things: Mapping[str, Thing]

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

    def plain_english(self, index: int, *, with_ground: bool) -> str:
        """The one phrase of which all that say the same are translations."""
        scene = self.shown[index]
        if isinstance(scene, ThingScene):
            return phrase(scene, self.things[scene.code].names["en"], "en", with_ground=with_ground)
        return caption(scene, "en", with_background=with_ground)


def make_corpus(pictures: Pictures, things: Sequence[Thing]) -> Corpus:
    """The corpus of some pictures."""
    return Corpus(
        pictures=pictures, shown=[_shown(facts) for facts in pictures.facts], things={t.code: t for t in things}
    )


def _shown(facts: Mapping[str, Any]) -> Shown:
    own = {name: value for name, value in facts.items() if name != "captions"}
    return ThingScene(**own) if "code" in own else Scene(**own)
