"""How people ask for a thing: patterns of every language around its name, some of them kept from training."""

from __future__ import annotations

import random
import re
from string import Formatter

import pytest

from flagai_altdiff.mini.things.asking import ASKING, TAILS, asked_for
from flagai_altdiff.mini.vocabulary import LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_patterns_have_a_place_for_the_thing(language: str) -> None:
    patterns = ASKING[language]
    for some, fields in (
        (patterns.asked, {""}),
        (patterns.unseen, {""}),
        (patterns.described, {""}),
        (patterns.coloured, {"", "c"}),
    ):
        assert some and len(set(some)) == len(some)
        for pattern in some:
            assert {name for _, name, _, _ in Formatter().parse(pattern) if name is not None} == fields
    assert not set(patterns.unseen) & set(patterns.asked)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_thing_is_asked_for_in_many_words_and_never_in_the_held_out_ones(language: str) -> None:
    rng = random.Random(0)
    said = {asked_for("猫", language, rng) for _ in range(1000)}
    assert len(said) > 50 and all("猫" in text for text in said) and "猫" not in said
    unseen = {pattern.format("猫") for pattern in ASKING[language].unseen}
    assert not any(other in text for other in unseen for text in said)


def test_colours_and_marks_come_where_they_belong() -> None:
    rng = random.Random(0)
    english, chinese = ({asked_for("X", code, rng) for _ in range(3000)} for code in ("en", "zh"))
    assert {"red X", "X!", "a picture of a cute X", "two Xs"} <= english
    assert any(text.startswith("red X, ") and text.removeprefix("red X, ") in TAILS for text in english)
    assert {"红色的X", "X！"} <= chinese and "X!" not in chinese
    assert not any("red" in asked_for("X", "en", rng, with_colour=False) for _ in range(1000))


def test_the_english_article_is_spelt_as_it_is_spoken() -> None:
    rng = random.Random(0)
    said = {asked_for("owl", "en", rng) for _ in range(3000)}
    assert {"a photo of an owl", "an image of an orange owl"} <= said
    assert not any(re.search(r"\ba [aeiou]", text) for text in said)
    assert not any("an unicorn" in asked_for("unicorn", "en", rng) for _ in range(1000))
