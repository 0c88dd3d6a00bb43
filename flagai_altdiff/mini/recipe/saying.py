"""What things are called in training: their names and further words, worn, and within what people say around them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from flagai_altdiff.mini.captions import with_an
from flagai_altdiff.mini.recipe.corpus import telling_words
from flagai_altdiff.mini.things.asking import asked_for
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.vocabulary import LANGUAGES, SHAPES

_SHARED = 0.42
"""Share of words for several things, which are few but the everyday ones, among words that are no names."""
_ASKED_FOR, _WORN, _WITH_ARTICLE, _CAPITAL = 0.35, 0.15, 0.15, 0.2
"""Shares of words within what people say around them; worn; with an article; beginning with a capital."""
_LEAST_WORN = 4

Word = tuple[int, str, str]
"""Number of a thing, a language, and what the thing is called there."""


@dataclass
class _Pool:
    """Words of a kind, and the sums of their weights, where these are not all the same."""

    words: list[Word] = field(default_factory=list)
    cumulated: list[float] | None = None

    def draw(self, rng: random.Random) -> Word:
        return rng.choices(self.words, cum_weights=self.cumulated)[0] if self.cumulated else rng.choice(self.words)


class Saying:
    """Ever new words for things, and for drawn shapes, which are counted behind them.

    Args:
        things: With their names and further words.
    """

    def __init__(self, things: Sequence[Thing], *, names: float = 0.4) -> None:
        """Of the words of things, a share of `names` are names."""
        self.things, self._share_of_names = things, names
        places = [(number, language) for number in range(len(things)) for language in LANGUAGES]
        self._taken = {word.casefold() for thing in things for code in LANGUAGES for word in thing.all_words(code)}
        called: dict[str, set[int]] = {}
        for number, language in places:
            called.setdefault(things[number].names[language].casefold(), set()).add(number)
        telling = telling_words(things)
        self._names, self._own, self._shared = _Pool(), _Pool(), _Pool()
        for number, language in places:
            thing = things[number]
            self._names.words.append((number, language, thing.names[language]))
            own = (*thing.words[language], *telling.get((thing.code, language), ()))
            for words, pool in ((own, self._own), (thing.shared_words[language], self._shared)):
                free = (word for word in words if number in called.get(word.casefold(), (number,)))
                pool.words += [(number, language, word) for word in free]
        self._twofold = {name for name, numbers in called.items() if len(numbers) > 1}

    def prefer(self, weigh: Callable[[Sequence[Word]], Sequence[float]]) -> None:
        """Draw some words more often than others of their kind; a name of two things only as often as any.

        Args:
            weigh: Words -> the weight of each, 1 or more.
        """
        for pool in (self._names, self._own, self._shared):
            weights = zip(pool.words, weigh(pool.words), strict=True)
            pool.cumulated = list(
                accumulate(1.0 if word[2].casefold() in self._twofold else weight for word, weight in weights)
            )

    def of_thing(self, rng: random.Random) -> tuple[int, str, str]:
        """Number of a thing, a language, and what it is called there, or asked for with.

        Words that are another thing's name, if in another language, are never among them.
        """
        if rng.random() < self._share_of_names:
            pool = self._names
        else:
            pool = self._shared if rng.random() < _SHARED else self._own
        number, language, word = pool.draw(rng)
        return number, language, self._said(word, language, rng)

    def of_shape(self, rng: random.Random) -> tuple[int, str, str]:
        """The same of a shape."""
        number, language = rng.randrange(len(SHAPES)), rng.choice([*LANGUAGES])
        text = self._said(LANGUAGES[language].shapes[number], language, rng, with_colour=False)
        return len(self.things) + number, language, text

    def _said(self, word: str, language: str, rng: random.Random, *, with_colour: bool = True) -> str:
        """As people say it; never what means something else."""
        kind = rng.random()
        if kind < _ASKED_FOR:
            text = asked_for(word, language, rng, with_colour=with_colour)
        else:
            text = _worn(word, rng) if kind < _ASKED_FOR + _WORN else word
        return word if text.casefold() in self._taken else text


def _worn(word: str, rng: random.Random) -> str:
    """With a letter left out, twice or in another's place, or without its end."""
    if len(word) < _LEAST_WORN:
        return word
    at = rng.randrange(1, len(word) - 1)
    head, letter, tail = word[:at], word[at], word[at + 1 :]
    return rng.choice((head + tail, head + letter + letter + tail, head + tail[0] + letter + tail[1:], word[:-1]))


def typed(word: str, language: str, rng: random.Random) -> str:
    """With an article or a capital at times."""
    articles = LANGUAGES[language].articles
    text = word
    if articles and rng.random() < _WITH_ARTICLE:
        text = with_an(f"{rng.choice(articles.split('/'))} {word}", language)
    return text[0].upper() + text[1:] if rng.random() < _CAPITAL else text
