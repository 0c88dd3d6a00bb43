"""What things are called: the name of each in every language, and further words that mean it, alone or among others."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from flagai_altdiff.errors import DataError
from flagai_altdiff.files import new_file
from flagai_altdiff.mini.things.chosen import THINGS
from flagai_altdiff.mini.things.packages import FURTHER_NAMES, NAMES, Package, members
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.registry import embedded_dir

FILE = "things.json"
_PLACES = {NAMES: "annotations/{}/annotations.json", FURTHER_NAMES: "annotationsDerived/{}/annotations.json"}
_PARTS = re.compile(r"[^,،、，:()（）]+")
_HELD_OUT_ONE_IN = 4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """Something that can be drawn and named.

    Args:
        code: Its code points, as ``1f355``.
        group: As in ``THINGS``.
        names: Language -> what it is called; no other thing is called so in that language.
        words: Language -> further words that mean it and no other thing, and that training may use.
        unseen_words: The same; training never sees these.
        shared_words: Language -> words that mean it and others; each is given to one thing.
    """

    code: str
    group: str
    names: Mapping[str, str]
    words: Mapping[str, tuple[str, ...]]
    unseen_words: Mapping[str, tuple[str, ...]]
    shared_words: Mapping[str, tuple[str, ...]]

    def all_words(self, language: str) -> tuple[str, ...]:
        """Everything that means it."""
        kinds = (self.words, self.shared_words, self.unseen_words)
        return (self.names[language], *(word for kind in kinds for word in kind[language]))

    @property
    def sign(self) -> str:
        """The emoji."""
        return sign_of(self.code)


def sign_of(code: str) -> str:
    """``1f355`` -> the emoji."""
    return "".join(chr(int(part, 16)) for part in code.split("-"))


def make_catalogue(archives: Mapping[Package, Path]) -> tuple[Thing, ...]:
    """All things of ``THINGS``, with the words of Unicode's CLDR.

    Args:
        archives: From ``packages.fetch``.

    Raises:
        DataError: A thing has no name in a language, or shares it with another.
    """
    entries = {language: _entries(archives, language) for language in LANGUAGES}
    codes = {code: group for group, some in THINGS.items() for code in some}
    names = {language: _names(entries[language], codes, language) for language in LANGUAGES}
    having = {language: _having(entries[language], names[language], language) for language in LANGUAGES}
    common = Counter((word, code) for some in having.values() for word, pairs in some.items() for code, _ in pairs)
    keywords = Counter(code for some in having.values() for pairs in some.values() for code, _ in pairs)
    words = {
        language: _further_words(own, names[language], language, common, keywords) for language, own in having.items()
    }
    return tuple(
        Thing(
            code=code,
            group=group,
            names={language: names[language][code] for language in LANGUAGES},
            words={language: words[language].own[code] for language in LANGUAGES},
            unseen_words={language: words[language].unseen[code] for language in LANGUAGES},
            shared_words={language: words[language].shared[code] for language in LANGUAGES},
        )
        for code, group in codes.items()
    )


def write_catalogue(things: tuple[Thing, ...], path: Path) -> None:
    """Write ``things.json``."""
    data = [{**asdict(thing), "sign": thing.sign} for thing in things]
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")


def read_catalogue(path: Path) -> tuple[Thing, ...]:
    """What :func:`write_catalogue` wrote.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Thing(
                code=entry["code"],
                group=entry["group"],
                names=entry["names"],
                **{
                    kind: {language: tuple(words) for language, words in entry[kind].items()}
                    for kind in ("words", "unseen_words", "shared_words")
                },
            )
            for entry in data
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no list of things: {error}.") from error


@cache
def known_things() -> tuple[Thing, ...]:
    """What the embedded model knows."""
    return read_catalogue(embedded_dir() / "AltDiffusion-mini" / FILE)


def _entries(archives: Mapping[Package, Path], language: str) -> dict[str, Any]:
    """Emoji -> its record; what CLDR says itself counts more than what it derives."""
    found: dict[str, Any] = {}
    for package in (FURTHER_NAMES, NAMES):
        place = _PLACES[package].format(language)
        data = members(archives[package], place.__eq__)
        if place not in data:
            raise DataError(f"{archives[package]} has no {place}.")
        (record,) = json.loads(data[place]).values()
        found |= record["annotations"]
    return found


def _names(entries: Mapping[str, Any], codes: Iterable[str], language: str) -> dict[str, str]:
    """Thing -> name. Some of CLDR's names are lists, or say more in brackets: the first part is taken, or the next one
    where several begin alike."""
    parts = {}
    for code in codes:
        try:
            (name,) = entries[sign_of(code)]["tts"]
        except (KeyError, ValueError) as error:
            raise DataError(f"{code} has no name in {language}.") from error
        parts[code] = [plain for part in _PARTS.findall(name) if (plain := _plain(part))]
    first = Counter(own[0].casefold() for own in parts.values())
    found = {
        code: next((p for p in own if first[p.casefold()] <= (p == own[0])), own[0]) for code, own in parts.items()
    }
    if twice := [name for name, count in Counter(name.casefold() for name in found.values()).items() if count > 1]:
        raise DataError(f"several things have the name {twice[0]!r} in {language}.")
    return found


def _plain(text: str) -> str:
    """Words with single blanks, and the apostrophe that keyboards have."""
    return " ".join(text.replace("’", "'").split())


class _Further(NamedTuple):
    """Words beside the names, in one language; thing -> words."""

    own: dict[str, tuple[str, ...]]
    unseen: dict[str, tuple[str, ...]]
    shared: dict[str, tuple[str, ...]]


_Having = dict[str, list[tuple[str, str]]]
"""Keyword in small letters -> the things that have it, and how it is spelled."""


def _having(entries: Mapping[str, Any], names: Mapping[str, str], language: str) -> _Having:
    """Keywords that are no names."""
    taken = {name.casefold() for name in names.values()}
    taken |= {word.casefold() for word in (*LANGUAGES[language].shapes, *LANGUAGES[language].colours)}
    having: _Having = {}
    for code in names:
        for word in sorted({_plain(word) for word in entries[sign_of(code)].get("default", ())}):
            if word.casefold() not in taken:
                having.setdefault(word.casefold(), []).append((code, word))
    return having


def _further_words(
    having: _Having,
    names: Mapping[str, str],
    language: str,
    common: Mapping[tuple[str, str], int],
    keywords: Mapping[str, int],
) -> _Further:
    """Keywords of one thing, to train on or held out, and those of several.

    Of several, the thing gets it that has it in most languages, so that "animal" is the same one in all of them; then
    the plainest, which has the fewest keywords ("book" is a closed book, no notebook with decorative cover); then the
    one with the shortest name.
    """
    found = _Further(own=dict.fromkeys(names, ()), unseen=dict.fromkeys(names, ()), shared=dict.fromkeys(names, ()))
    for folded, pairs in having.items():
        code, word = min(pairs, key=lambda pair: (-common[folded, pair[0]], keywords[pair[0]], len(names[pair[0]])))
        kind = found.shared if len(pairs) > 1 else found.unseen if is_unseen(language, word) else found.own
        kind[code] += (word,)
    return found


def is_unseen(language: str, word: str) -> bool:
    """Whether training never sees a word; a function of the word alone."""
    digest = hashlib.md5(f"{language}:{word}".encode(), usedforsecurity=False).hexdigest()
    return int(digest, 16) % _HELD_OUT_ONE_IN == 0
