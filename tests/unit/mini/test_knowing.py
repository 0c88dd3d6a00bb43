"""What the embedded model knows of a prompt, and what it is told to say instead."""

from __future__ import annotations

import pytest

from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.knowing import hint, names_nothing, nearby
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
    [
        ("a unicycle", "bicycle"),
        ("Kaffee", "Heißgetränk"),
        ("the picture of two unicycles", "bicycle"),
        ("no unicycle at all", "bicycle"),
        ("4k unicycle", "bicycle"),
        ("キツネを描いて", "キツネの顔"),
        ("please draw a bycicle", "bicycle"),
        ("🐈 on a red background", "cat"),
        ("florbnax, trending on artstation, 🐈", "cat"),
        ("lemmon", "lemon"),
    ],
)
def test_what_it_never_learnt_is_said_with_names_near_it(prompt: str, name: str) -> None:
    assert names_nothing(prompt)
    assert name in nearby(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red car",
        "un ordinateur",
        "нарисуй ракету на чёрном фоне",
        "a large red heart",
        "红色背景上的猫",
        "two cats",
        "gatos",
        "zwei Hunde",
        "고양이를 그려줘",
        "ارسم لي القطة",
        "बिल्ली की तस्वीर",
        "un e\u0301le\u0301phant",
        "赤いTVの絵",
        "a picture",
    ],
)
def test_further_inflected_and_embedded_words_are_known(prompt: str) -> None:
    assert not names_nothing(prompt)


def test_names_of_the_prompts_language_come_first() -> None:
    assert nearby("please draw a bycicle")[0] == "bicycle"
    assert nearby("dibújame un bycicle")[0] == "bicicleta"
    assert nearby("lemmon, highly detailed, 4k")[0] == "lemon"
    assert nearby("🦄 onwards") == nearby("🦄") == ["unicorn"]
    assert "balon" in nearby("balon")


def test_hints() -> None:
    assert hint("a cat", "mini") == ""
    assert hint("florbnax", "mini") == "mini knows nothing that 'florbnax' names, and draws something all the same."
    assert hint(" ", "mini").startswith("An empty prompt names nothing: mini")
