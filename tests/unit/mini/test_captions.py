"""Captions: grammar by example, and what holds in every language."""

from __future__ import annotations

import random

import pytest

from flagai_altdiff.mini.captions import caption, fill, inflect, random_caption
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES, SHAPES
from flagai_altdiff.mini.world import Scene, all_scenes

STAR = Scene(shape="star", colour="red", background="blue", size="small", position="left")
HOUSE = Scene(shape="house", colour="white", background="green", size="large")
# Language: the small red star on the left, each pattern; then the large white house.
EXPECTED = {
    "ar": (
        "نجمة حمراء صغيرة على اليسار على خلفية زرقاء",
        "على خلفية زرقاء نجمة حمراء صغيرة على اليسار",
        "نجمة حمراء صغيرة، على اليسار، خلفية زرقاء",
        "بيت أبيض كبير على خلفية خضراء",
    ),
    "de": (
        "ein kleiner roter Stern links auf blauem Hintergrund",
        "auf blauem Hintergrund ein kleiner roter Stern links",
        "ein kleiner roter Stern, links, blauer Hintergrund",
        "ein großes weißes Haus auf grünem Hintergrund",
    ),
    "en": (
        "a small red star on the left on a blue background",
        "on a blue background, a small red star on the left",
        "a small red star, on the left, blue background",
        "a large white house on a green background",
    ),
    "hi": (
        "बाईं ओर नीली पृष्ठभूमि पर एक छोटा लाल तारा",
        "नीली पृष्ठभूमि पर बाईं ओर एक छोटा लाल तारा",
        "एक छोटा लाल तारा, बाईं ओर, नीली पृष्ठभूमि",
        "हरी पृष्ठभूमि पर एक बड़ा सफ़ेद घर",
    ),
    "ja": (
        "青い背景の左側の小さな赤い星",
        "青い背景の左側に小さな赤い星",
        "小さな赤い星、左側、青い背景",
        "緑色の背景の大きな白い家",
    ),
    "ko": (
        "파란색 배경 왼쪽에 작은 빨간색 별",
        "작은 빨간색 별, 왼쪽, 파란색 배경",
        "초록색 배경에 큰 흰색 집",
    ),
    "ru": (
        "маленькая красная звезда слева на синем фоне",
        "на синем фоне маленькая красная звезда слева",
        "маленькая красная звезда, слева, синий фон",
        "большой белый дом на зелёном фоне",
    ),
    "th": (
        "ดาวสีแดงขนาดเล็กทางซ้ายบนพื้นหลังสีน้ำเงิน",
        "บนพื้นหลังสีน้ำเงินมีดาวสีแดงขนาดเล็กทางซ้าย",
        "ดาวสีแดงขนาดเล็ก ทางซ้าย พื้นหลังสีน้ำเงิน",
        "บ้านสีขาวขนาดใหญ่บนพื้นหลังสีเขียว",
    ),
    "tr": (
        "mavi arka plan üzerinde solda küçük kırmızı bir yıldız",
        "küçük kırmızı bir yıldız, solda, mavi arka plan",
        "yeşil arka plan üzerinde büyük beyaz bir ev",
    ),
    "zh": (
        "蓝色背景上左侧的红色的小星星",
        "蓝色背景上左侧有一个红色的小星星",
        "红色的小星星，左侧，蓝色背景",
        "绿色背景上的白色的大房子",
    ),
}


@pytest.mark.parametrize("language", EXPECTED)
def test_grammar(language: str) -> None:
    *star, house = EXPECTED[language]
    assert [caption(STAR, language, pattern=i) for i in range(len(LANGUAGES[language].patterns))] == star
    assert caption(HOUSE, language) == house


def test_the_languages_are_those_of_altdiffusion_m18() -> None:
    assert sorted(LANGUAGES) == "ar de en es fr hi it ja ko nl pl pt ru th tr uk vi zh".split()


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_scene_has_its_own_caption(language: str) -> None:
    words = LANGUAGES[language]
    assert (len(words.shapes), len(words.genders), len(words.colours)) == (len(SHAPES), len(SHAPES), len(COLOURS))
    for pattern in range(len(words.patterns)):
        texts = [caption(scene, language, pattern=pattern) for scene in all_scenes()[::5]]
        assert len(set(texts)) == len(texts)
        assert all(text == " ".join(text.split()) and "{" not in text and "[" not in text for text in texts)


def test_the_background_can_stay_unnamed() -> None:
    assert caption(STAR, "en", with_background=False) == "a small red star on the left"
    assert caption(HOUSE, "zh", with_background=False) == "白色的大房子"
    assert (
        caption(Scene(shape="circle", colour="orange", background="blue"), "en", with_background=False)
        == "an orange circle"
    )


def test_patterns_leave_out_what_has_no_words() -> None:
    assert fill("{a}[, {b}][ in {a} {b}]", {"a": "x", "b": ""}) == "x"
    assert fill("{a}[, {b}]", {"a": "x", "b": "y"}) == "x, y"


def test_inflection() -> None:
    assert [inflect("roter/rote/rotes", gender) for gender in "mfn"] == ["roter", "rote", "rotes"]
    assert inflect("verde", "f") == "verde"


def test_random_captions_vary_and_repeat_with_their_seed() -> None:
    texts = [random_caption(STAR, "en", random.Random(seed)) for seed in range(60)]
    assert texts == [random_caption(STAR, "en", random.Random(seed)) for seed in range(60)]
    assert any(text[0] == "A" for text in texts)
    assert any(text.endswith(".") for text in texts)
