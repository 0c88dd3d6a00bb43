"""The judge as a scorer of evaluations: whether an image shows what its prompt describes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product

import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import SEEN, load_judge, looked_at, right_answers, see
from flagai_altdiff.mini.things.catalogue import Thing, known_things
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.phrases import phrase
from flagai_altdiff.mini.things.sprites import STYLES
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES, POSITIONS, SIZES
from flagai_altdiff.mini.world import Scene, all_scenes

Described = tuple[Scene | ThingScene, tuple[str, ...]]
"""What a prompt describes, and which of the judge's answers it asks for: what it does not say may be anything."""
_NAME = "\0"
"""Stands for a thing's name."""


class SceneScorer:
    """Says of each image whether it shows what its prompt names: thing, shape, colours, style.

    Args:
        prompts: Language -> prompts.

    Attributes:
        known: How many of the prompts are phrases of the embedded model's world; of the others nothing can be said.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        self._described: dict[str, Described] = {}
        for language, own in prompts.items():
            if language in LANGUAGES:
                for text in {prompt.text for prompt in own}:
                    if found := _described(_plain(text), language):
                        self._described[text] = found
        self.known = sum(prompt.text in self._described for own in prompts.values() for prompt in own)
        self.key = f"scenes {fingerprint(load_judge())}"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Mapping[str, Tensor]:
        """``accuracy``: 1 for what is right, 0 for what is not, NaN for prompts of another world."""
        seen = see(load_judge(), looked_at(images)).tolist()
        return {"accuracy": torch.tensor([self._is_right(*pair) for pair in zip(seen, prompts, strict=True)])}

    def _is_right(self, seen: Sequence[int], prompt: Prompt) -> float:
        if prompt.text not in self._described:
            return float("nan")
        shown, asked = self._described[prompt.text]
        wanted = right_answers(shown)
        return float(all(seen[i] == wanted[i] for i, name in enumerate(SEEN) if name in asked))


def _described(text: str, language: str) -> Described | None:
    if text in _shapes(language):
        return _shapes(language)[text], ("what", "colour", "background")
    named = (thing for thing in known_things() if thing.names[language].casefold() in text)
    return next((found for thing in named for found in _as_phrase_for(thing, text, language)), None)


@cache
def _shapes(language: str) -> dict[str, Scene]:
    """Every caption of a language -> its scene; no two scenes share one."""
    patterns = range(len(LANGUAGES[language].patterns))
    return {_plain(caption(scene, language, pattern=i)): scene for scene in all_scenes() for i in patterns}


def _as_phrase_for(thing: Thing, text: str, language: str) -> Iterator[Described]:
    """What a text describes if it is a phrase for this thing: wherever its name stands, the rest is looked up."""
    name = thing.names[language].casefold()
    for place in re.finditer(re.escape(name), text):
        rest = text[: place.start()] + _NAME + text[place.end() :]
        if found := _phrases(language).get(rest):
            yield replace(found[0], code=thing.code), found[1]


@cache
def _phrases(language: str) -> dict[str, tuple[ThingScene, tuple[str, ...]]]:
    """Every phrase of a language without the thing's name -> what it describes."""
    patterns = (None, *range(len(LANGUAGES[language].patterns)))
    found: dict[str, tuple[ThingScene, tuple[str, ...]]] = {}
    for ground, size, position, style in product((None, *COLOURS), SIZES, POSITIONS, STYLES):
        scene = ThingScene(code="", background=ground or COLOURS[0], size=size, position=position, style=style)
        asked = ("what", *(("background",) if ground else ()), *(("style",) if style != STYLES[0] else ()))
        for pattern in patterns:
            words = phrase(scene, _NAME, language, pattern=pattern, with_ground=ground is not None)
            found.setdefault(_plain(words), (scene, asked))
    return found


def _plain(text: str) -> str:
    return text.strip().rstrip(".。।").casefold()
