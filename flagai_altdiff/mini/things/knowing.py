"""Whether a prompt names anything that the embedded model knows, and what it could say instead."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import NamedTuple

from flagai_altdiff.errors import shown
from flagai_altdiff.mini.things.asking import ASKING, TAILS
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.things.phrases import WORDS
from flagai_altdiff.mini.vocabulary import LANGUAGES

_WITHOUT_BLANKS = ("ja", "th", "zh")
_ENDING, _SHORTEST_STEM = 2, 4
"""So many letters at the end of a word may be others, unless it is short: languages inflect."""
_HINTS = 3
_SHORTEST_WORD, _WORDS_LOOKED_AT = 3, 8
"""Of a prompt that names nothing; each is compared with thousands of names."""
_ALIKE = 0.7
"""From which share of equal letters words are spelt alike."""
_SHORT_GRAMMAR = ("all", "at", "but", "it", "no", "non", "not", "or", "son", "up")
"""Words that stand in any sentence of one language, and are things in another."""
_AS_EMOJI = "\ufe0f"
"""Says of a sign that it is meant as an emoji; people type it or do not."""
_LETTER = r"[\w\u0900-\u097f\u0e00-\u0e7f]"
"""Signs of vowels and tones in Hindi and Thai are no letters to ``re``."""


class _Name(NamedTuple):
    text: str
    language: str


def names_nothing(prompt: str) -> bool:
    """Whether no thing or shape that the embedded model has learnt is in a prompt, in any language.

    What people say around names counts only where a prompt is nothing else: some of it is a thing in another language.
    """
    text = _folded(prompt)
    terms = _terms()
    found = (match[0] for term in terms if term in text for match in re.finditer(terms[term], text))
    return not (any(map(_content, found)) if _content(text) else any(found))


def nearby(prompt: str) -> list[str]:
    """Names of things that a prompt shows as emoji, or that share a word with it or are spelt like it; a few at most,
    those of its language first."""
    text = _folded(prompt)
    words = [word for word in _content(text) if len(word) >= _SHORTEST_WORD][:_WORDS_LOOKED_AT]
    spoken = _spoken(text)
    kinds = (_shown(prompt, spoken), _meant(text), _sharing(words), _alike(words))
    ranked = (name.text for some in kinds for name in sorted(some, key=lambda name: name.language not in spoken))
    return list(dict.fromkeys(ranked))[:_HINTS]


def hint(prompt: str, model: str) -> str:
    """What to say of a prompt that names nothing the model knows; nothing of others.

    Args:
        prompt: As it was typed.
        model: What the embedded model is called.
    """
    if not names_nothing(prompt):
        return ""
    if not prompt.strip():
        return f"An empty prompt names nothing: {model} draws what it likes."
    others = "; ".join(nearby(prompt))
    near = f" Names near it: {others}." if others else ""
    return f"{model} knows nothing that {shown(prompt, 60)} names, and draws something all the same.{near}"


def _folded(text: str) -> str:
    """Small letters, composed; Turkish ones with and without a dot become one, as capitals do not tell which it was."""
    return unicodedata.normalize("NFKC", text).casefold().replace("i\u0307", "i").replace("ı", "i")


def _content(text: str) -> list[str]:
    """The words of a text but for those that people say around names, in any language."""
    return re.findall(f"{_LETTER}+", _around().sub(" ", text))


def _shown(prompt: str, spoken: set[str]) -> Iterator[_Name]:
    """Names of things whose emoji are in a prompt, English ones if it has no words."""
    plain = prompt.replace(_AS_EMOJI, "")
    seen = (thing for thing in known_things() if thing.sign.replace(_AS_EMOJI, "") in plain)
    languages = spoken if len(spoken) < len(LANGUAGES) else ("en",)
    return (_Name(thing.names[language], language) for thing in seen for language in languages)


def _meant(text: str) -> Iterator[_Name]:
    """Names of things that a text calls by a word that the model has not learnt."""
    for thing in known_things():
        for language, words in thing.unseen_words.items():
            folded = (_folded(word) for word in words)
            if any(word in text and re.search(_alone(word, language), text) for word in folded):
                yield _Name(thing.names[language], language)


def _sharing(words: list[str]) -> Iterator[_Name]:
    return (name for name in _names() if not set(words).isdisjoint(_folded(name.text).split()))


def _alike(words: list[str]) -> Iterator[_Name]:
    """Names spelt like one of some words, the likest first; accents do not matter."""
    names: dict[str, list[_Name]] = {}
    for name in _names():
        names.setdefault(_without_accents(name.text), []).append(name)
    for word in words:
        for spelling in difflib.get_close_matches(_without_accents(word), names, 2 * _HINTS, _ALIKE):
            yield from names[spelling]


def _without_accents(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", _folded(text)) if not unicodedata.combining(c))


def _spoken(text: str) -> set[str]:
    """Languages that have most of a text's words around names; all, if none has any."""
    counted = {language: len(re.findall(_any_of(_said_around(language)), text)) for language in LANGUAGES}
    return {language for language, count in counted.items() if count == max(counted.values())}


@cache
def _names() -> tuple[_Name, ...]:
    return tuple(_Name(text, language) for thing in known_things() for language, text in thing.names.items())


@cache
def _around() -> re.Pattern[str]:
    return re.compile(_any_of({pattern for language in LANGUAGES for pattern in _said_around(language)}))


@cache
def _said_around(language: str) -> frozenset[str]:
    """Patterns of what is said around names in a language: asking, praise, grounds, sizes, places, styles, tails."""
    asking, words, spoken = ASKING[language], WORDS[language], LANGUAGES[language]
    sayings = (
        *asking.asked, *asking.unseen, *asking.described, *asking.coloured,
        *spoken.colours, *spoken.on_colours, spoken.small, spoken.large, spoken.left, spoken.right, spoken.on,
        spoken.bare, spoken.articles, words.small, words.large, words.flat, words.cartoon,
    )  # fmt: skip
    said, tails = (
        re.findall(f"{_LETTER}+", _folded(re.sub(r"\{\w*\}", " ", " ".join(some)))) for some in (sayings, TAILS)
    )
    after = (_alone(word, language) for word in tails)
    return frozenset((*after, *(said if language in _WITHOUT_BLANKS else map(_as_word, [*said, *_SHORT_GRAMMAR]))))


def _alone(word: str, language: str) -> str:
    """A pattern of a word where it is no part of another; where there are no blanks that cannot be told."""
    if language not in _WITHOUT_BLANKS:
        return _as_word(re.escape(word))
    return f"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])" if word.isascii() else re.escape(word)


def _as_word(pattern: str) -> str:
    return f"(?<!{_LETTER}){pattern}(?!{_LETTER})"


def _any_of(patterns: Iterable[str]) -> str:
    """A pattern of all, the longest first."""
    return "|".join(sorted(patterns, key=len, reverse=True))


@cache
def _terms() -> Mapping[str, str]:
    """What has been learnt, or how it begins -> a pattern of it as a word."""
    patterns: dict[str, set[str]] = {}
    for language, vocabulary in LANGUAGES.items():
        learnt = {
            _folded(term)
            for thing in known_things()
            for term in (thing.names[language], *thing.words[language], *thing.shared_words[language])
        }
        for term in learnt.union(_folded(shape) for shape in vocabulary.shapes):
            blankless = language in _WITHOUT_BLANKS
            stem, pattern = (term, _alone(term, language)) if blankless else _inflected(term, language)
            patterns.setdefault(stem, set()).add(pattern)
    return {stem: _any_of(some) for stem, some in patterns.items()}


def _inflected(term: str, language: str) -> tuple[str, str]:
    """How all forms of a term begin, and a pattern of them."""
    before, after = _attached(language)
    stem = term[: max(_SHORTEST_STEM, len(term) - _ENDING)]
    rest = term[len(stem) :]
    ends = {re.escape(rest), *(re.escape(rest) + end for end in after)}
    if len(term) >= _SHORTEST_STEM:
        ends.add(f"{_LETTER}{{{max(0, len(rest) - 1)},{len(rest) + 1}}}")
    return stem, _as_word(f"(?:{'|'.join(before)})?{re.escape(stem)}(?:{_any_of(ends)})")


@cache
def _attached(language: str) -> tuple[set[str], set[str]]:
    """What is said right before a name, and right after it, without a blank: ``ال{}``, ``{}s``."""
    patterns = " ".join((*ASKING[language].asked, *ASKING[language].described))
    return set(re.findall(r"(\w+)\{\}", patterns)), set(re.findall(r"\{\}(\w+)", patterns))
