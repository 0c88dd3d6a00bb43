"""Whether a prompt names anything that the embedded model knows, and what it could say instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import cache

from flagai_altdiff.errors import shown
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.vocabulary import LANGUAGES

_WITHOUT_BLANKS = ("ja", "th", "zh")
_ENDING, _SHORTEST_STEM = 2, 4
"""So many letters at the end of a word may be others, unless it is short: languages inflect."""
_HINTS = 3
_SHORTEST_WORD, _WORDS_LOOKED_AT = 3, 8
"""Of a prompt that names nothing; each is compared with thousands of names."""


def names_nothing(prompt: str) -> bool:
    """Whether no thing or shape that the embedded model has learnt is in a prompt, in any language."""
    text = prompt.casefold()
    terms = _terms()
    return not any(term in text and re.search(terms[term], text) for term in terms)


def nearby(prompt: str) -> list[str]:
    """Names of things that share a word with a prompt or are spelt like it, a few at most."""
    names = dict.fromkeys(name for thing in known_things() for name in thing.names.values())
    spoken = [word for word in re.findall(r"\w+", prompt.casefold()) if len(word) >= _SHORTEST_WORD]
    words = [word for word in spoken if word not in _describing()][:_WORDS_LOOKED_AT]
    sharing = [name for name in names if set(name.casefold().split()) & set(words)]
    alike = [name for word in words for name in difflib.get_close_matches(word, names, _HINTS, 0.75)]
    return list(dict.fromkeys([*_meant(prompt), *sharing, *alike]))[:_HINTS]


def hint(prompt: str, model: str) -> str:
    """What to say of a prompt that names nothing the model knows; nothing of others.

    Args:
        prompt: As it was typed.
        model: What the embedded model is called.
    """
    if not prompt.strip() or not names_nothing(prompt):
        return ""
    others = "; ".join(nearby(prompt))
    near = f" Names near it: {others}." if others else ""
    return f"{model} knows nothing that {shown(prompt, 60)} names.{near}"


def _meant(prompt: str) -> list[str]:
    """Names of things that a prompt calls by a word that the model has not learnt."""
    text = prompt.casefold()
    return [
        thing.names[language]
        for thing in known_things()
        for language, words in thing.unseen_words.items()
        if any(
            re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", text) for word in words if word.casefold() in text
        )
    ]


@cache
def _describing() -> set[str]:
    """Words for colours and sizes, which name nothing."""
    return {
        form
        for spoken in LANGUAGES.values()
        for words in (*spoken.colours, *spoken.on_colours, spoken.small, spoken.large)
        for form in re.findall(r"\w+", words.casefold())
    }


@cache
def _terms() -> Mapping[str, str]:
    """What has been learnt, or how it begins -> a pattern of it as a word."""
    anywhere: set[str] = set()
    endings: dict[str, int] = {}
    for language, vocabulary in LANGUAGES.items():
        known = {
            term
            for thing in known_things()
            for term in (thing.names[language], *thing.words[language], *thing.shared_words[language])
        }
        for term in (text.casefold() for text in (*known, *vocabulary.shapes)):
            if language in _WITHOUT_BLANKS:
                anywhere.add(term)
            else:
                stem = term[: max(_SHORTEST_STEM, len(term) - _ENDING)]
                longest = len(term) - len(stem) + 1 if len(term) > _SHORTEST_STEM else 0
                endings[stem] = max(longest, endings.get(stem, 0))
    words = {stem: rf"(?<!\w){re.escape(stem)}\w{{0,{longest}}}(?!\w)" for stem, longest in endings.items()}
    return words | {term: re.escape(term) for term in anywhere}
