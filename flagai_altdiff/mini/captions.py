"""Captions of scenes in 18 languages."""

from __future__ import annotations

import random
import re

from flagai_altdiff.mini.vocabulary import COLOURS, LANGUAGES, SHAPES, Language
from flagai_altdiff.mini.world import Scene

GENDERS = "mfn"
OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
SLOT = re.compile(r"\{(\w+)\}")
_ENGLISH_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])(?!eu|one\b|u[ks]|uni)")


def inflect(forms: str, gender: str) -> str:
    """The form of a word for a gender: "rojo/roja", "f" -> "roja"; a word with one form never changes."""
    parts = forms.split("/")
    return parts[GENDERS.index(gender)] if len(parts) > 1 else forms


def fill(pattern: str, fields: dict[str, str]) -> str:
    """Fill a pattern: slots in braces, parts in brackets only where all their slots have words."""

    def keep(match: re.Match[str]) -> str:
        part = match.group(1)
        return part if all(fields[name] for name in SLOT.findall(part)) else ""

    return OPTIONAL.sub(keep, pattern).format(**fields)


def caption(scene: Scene, language: str, *, pattern: int = 0, with_background: bool = True) -> str:
    """Describe a scene in one language.

    Args:
        scene: What to describe; a medium size and a central position are not put into words.
        language: A key of ``LANGUAGES``.
        pattern: Which of the language's patterns; counted modulo their number.
        with_background: Whether the background is named.

    Returns:
        The caption, without capital letter and full stop.
    """
    words = LANGUAGES[language]
    colour_index = COLOURS.index(scene.background)
    bare_colour = inflect(words.colours[colour_index], words.background_gender)
    on_colour = words.on_colours[colour_index] if words.on_colours else bare_colour
    on = words.on.format(c=on_colour) if with_background else ""
    pos = {"left": words.left, "centre": "", "right": words.right}[scene.position]
    text = fill(
        words.patterns[pattern % len(words.patterns)],
        {
            "np": noun_phrase(scene, words),
            "pos": pos,
            "on": on,
            "bare": words.bare.format(c=bare_colour) if with_background else "",
            "where": words.joiner.join(part for part in (on, pos) if part),
        },
    )
    return with_an(text, language)


def with_an(text: str, language: str) -> str:
    """The English article as it is before a vowel: "a owl" -> "an owl"; texts of other languages as they are."""
    return _ENGLISH_ARTICLE.sub(r"\1n ", text) if language == "en" else text


def noun_phrase(scene: Scene, words: Language) -> str:
    """Article, size, colour and shape in the language's order and gender."""
    shape_index = SHAPES.index(scene.shape)
    gender = words.genders[shape_index]
    size = {"small": words.small, "medium": "", "large": words.large}[scene.size]
    return fill(
        words.noun_phrase,
        {
            "article": inflect(words.articles, gender),
            "size": inflect(size, gender),
            "colour": inflect(words.colours[COLOURS.index(scene.colour)], gender),
            "shape": words.shapes[shape_index],
        },
    )


def random_caption(scene: Scene, language: str, rng: random.Random, *, with_background: bool = True) -> str:
    """A caption as people might type it: any pattern, sometimes a capital letter or a full stop."""
    words = LANGUAGES[language]
    text = caption(scene, language, pattern=rng.randrange(len(words.patterns)), with_background=with_background)
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + words.stop if rng.random() < 0.15 else text
