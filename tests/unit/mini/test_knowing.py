"""What the embedded model knows of a prompt, and what it is told to say instead."""

from __future__ import annotations

import pytest

from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.knowing import names_nothing, nearby
from flagai_altdiff.mini.things.phrases import phrase
from flagai_altdiff.mini.vocabulary import LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_it_learnt_is_known_in_every_language(language: str) -> None:
    for thing in known_things()[::10]:
        scene = ThingScene(code=thing.code, background="red")
        for pattern in (None, 0, 1):
            assert not names_nothing(phrase(scene, thing.names[language], language, pattern=pattern))
            assert not names_nothing(phrase(scene, thing.names[language], language, pattern=pattern).upper())


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("a unicycle", "bicycle"), ("Kaffee", "Heißgetränk"), ("cats", "cat"), ("taxis", "taxi")],
)
def test_what_it_never_learnt_is_said_with_names_near_it(prompt: str, name: str) -> None:
    assert names_nothing(prompt)
    assert name in nearby(prompt)


@pytest.mark.parametrize(
    "prompt",
    ["a red car", "un ordinateur", "нарисуй ракету на чёрном фоне", "a large red heart", "红色背景上的猫", "two dogs"],
)
def test_further_inflected_and_embedded_words_are_known(prompt: str) -> None:
    assert not names_nothing(prompt)
