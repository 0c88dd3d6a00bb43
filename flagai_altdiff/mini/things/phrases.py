"""Things on their grounds in words: as lists where a language would ask for a gender or case, else as phrases."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from flagai_altdiff.mini.captions import fill, inflect, with_an
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES

_FURTHER_WORD = 0.25
_CAPITAL, _STOP = 0.3, 0.1


@dataclass(frozen=True, kw_only=True)
class Words:
    """What the drawn scenes' vocabulary has no form for, in one language.

    Attributes:
        small: As an item of a list.
        large: Likewise.
        flat: The style.
        cartoon: The style.
        comma: Between items of a list.
    """

    small: str
    large: str
    flat: str
    cartoon: str
    comma: str = ", "


WORDS: Mapping[str, Words] = {
    "ar": Words(small="صغير", large="كبير", flat="نمط مسطح", cartoon="رسم كرتوني", comma="، "),
    "de": Words(small="klein", large="groß", flat="flacher Stil", cartoon="Zeichentrick"),
    "en": Words(small="small", large="large", flat="flat style", cartoon="cartoon"),
    "es": Words(small="pequeño", large="grande", flat="estilo plano", cartoon="dibujo animado"),
    "fr": Words(small="petit", large="grand", flat="style plat", cartoon="dessin animé"),
    "hi": Words(small="छोटा", large="बड़ा", flat="सपाट शैली", cartoon="कार्टून"),
    "it": Words(small="piccolo", large="grande", flat="stile piatto", cartoon="cartone animato"),
    "ja": Words(small="小さい", large="大きい", flat="フラットデザイン", cartoon="漫画風", comma="、"),
    "ko": Words(small="작은 크기", large="큰 크기", flat="플랫 디자인", cartoon="만화"),
    "nl": Words(small="klein", large="groot", flat="platte stijl", cartoon="tekenfilm"),
    "pl": Words(small="małe", large="duże", flat="płaski styl", cartoon="kreskówka"),
    "pt": Words(small="pequeno", large="grande", flat="estilo plano", cartoon="desenho animado"),
    "ru": Words(small="маленький", large="большой", flat="плоский стиль", cartoon="мультфильм"),
    "th": Words(small="ขนาดเล็ก", large="ขนาดใหญ่", flat="สไตล์แบน", cartoon="การ์ตูน"),
    "tr": Words(small="küçük", large="büyük", flat="düz stil", cartoon="çizgi film"),
    "uk": Words(small="маленький", large="великий", flat="плоский стиль", cartoon="мультфільм"),
    "vi": Words(small="nhỏ", large="lớn", flat="phong cách phẳng", cartoon="hoạt hình"),
    "zh": Words(small="小的", large="大的", flat="扁平风格", cartoon="卡通", comma="，"),
}


def phrase(scene: ThingScene, name: str, language: str, *, pattern: int | None = None, with_ground: bool = True) -> str:
    """Describe a scene.

    Args:
        scene: What to describe; what it leaves unnamed is not put into words.
        name: What the thing is called, or a further word for it.
        language: A key of ``LANGUAGES``.
        pattern: Which of the language's patterns of a sentence; a list unless given.
        with_ground: Whether the ground is named.
    """
    vocabulary, words = LANGUAGES[language], WORDS[language]
    number = COLOURS.index(scene.background)
    bare_colour = inflect(vocabulary.colours[number], vocabulary.background_gender)
    on_colour = vocabulary.on_colours[number] if vocabulary.on_colours else bare_colour
    on = vocabulary.on.format(c=on_colour) if with_ground else ""
    bare = vocabulary.bare.format(c=bare_colour) if with_ground else ""
    place = {"left": vocabulary.left, "centre": "", "right": vocabulary.right}[scene.position]
    size = {"small": words.small, "medium": "", "large": words.large}[scene.size]
    style = {"solid": "", "flat": words.flat, "cartoon": words.cartoon}[scene.style]
    if pattern is None:
        return words.comma.join(part for part in (name, size, place, bare, style) if part)
    where = vocabulary.joiner.join(part for part in (on, place) if part)
    fields = {"np": name, "pos": place, "on": on, "bare": bare, "where": where}
    sentence = fill(vocabulary.patterns[pattern % len(vocabulary.patterns)], fields)
    return with_an(words.comma.join(part for part in (sentence, size, style) if part), language)


def random_phrase(
    scene: ThingScene, thing: Thing, language: str, rng: random.Random, *, with_ground: bool = True
) -> str:
    """A phrase as people might type it, sometimes with another word for the thing, a capital letter or a full stop.

    Args:
        scene: What to describe.
        thing: The one that it shows.
        language: A key of ``LANGUAGES``.
        rng: Source of all choices.
        with_ground: Whether the ground is named.
    """
    further = thing.words[language]
    name = rng.choice(further) if further and rng.random() < _FURTHER_WORD else thing.names[language]
    vocabulary = LANGUAGES[language]
    pattern = rng.choice((None, *range(len(vocabulary.patterns))))
    text = phrase(scene, name, language, pattern=pattern, with_ground=with_ground)
    if rng.random() < _CAPITAL:
        text = text[0].upper() + text[1:]
    return text + vocabulary.stop if rng.random() < _STOP else text
