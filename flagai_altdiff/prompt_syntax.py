"""Prompts as people write them for A1111: ``(word:1.3)``, ``[word]``, ``BREAK``. No torch."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SYNTAXES = ("plain", "weighted")
"""How a prompt is read: as it stands, up to 77 tokens; or with weights, and as long as it is."""
_STRONGER = 1.1
"""What a pair of round brackets without a number multiplies by; square ones divide."""
_MOST = 10.0
"""Largest weight; what asks for more is no weight but text."""
_OPENING = {"(": "(", "（": "(", "[": "[", "［": "["}
_CLOSING = {")": "(", "）": "(", "]": "[", "］": "["}
_LONGEST_NUMBER = 40
_ESCAPED = frozenset("()[]（）［］\\")
_NUMBER = re.compile(r"[:：]\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
_WEIGHTED = re.compile(r"[(（][^()（）]*[:：]\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*[)）]")
LORA = r"<(?:lora|lyco|hypernet):[^<>]*>"
"""What A1111 reads as a LoRA, a pattern."""
_NOT_HERE = re.compile(LORA + r"|\[[^\[\]:|]*(?::[^\[\]:|]*:[^\[\]:|]*|\|[^\[\]]*)\]|\bAND\b")
"""That, an edit on the way, words in turn, or a composition."""
_BREAK = re.compile(r"\bBREAK\b")
_DEEPEST = 64
"""Brackets of a kind that may be open; of more, the outer ones are text."""


@dataclass(frozen=True)
class Part:
    """A part of a prompt, up to a ``BREAK``.

    Args:
        text: Without marks.
        weights: Of each of its characters.
    """

    text: str
    weights: tuple[float, ...]


@dataclass(slots=True)
class _Letter:
    char: str
    weight: float = 1.0
    is_mark: bool = False


def has_weights(prompt: str) -> bool:
    """Whether a prompt looks as if it were meant to be read with weights."""
    return bool(_WEIGHTED.search(prompt))


def read_as_text(prompt: str) -> list[str]:
    """The parts of a prompt that A1111 reads as something of their own, and that are mere text here."""
    return _NOT_HERE.findall(prompt)


def parse(prompt: str) -> list[Part]:
    """Read a prompt with weights; brackets that have no partner are text.

    Args:
        prompt: As it was written. Full-width brackets and colons count as others; ``\\(`` is a bracket of the text.
    """
    letters: list[_Letter] = []
    opened = {kind: deque[int](maxlen=_DEEPEST) for kind in _OPENING.values()}
    place = 0
    while place < len(prompt):
        char = prompt[place]
        if char == "\\":  # what follows is text; a backslash before anything else says nothing
            if prompt[place + 1 : place + 2] and prompt[place + 1] in _ESCAPED:
                place += 1
                letters.append(_Letter(prompt[place]))
        else:
            if char in _OPENING:
                opened[_OPENING[char]].append(len(letters))
            is_mark = char in _CLOSING and _close(letters, opened[_CLOSING[char]], _CLOSING[char])
            letters.append(_Letter(char, is_mark=is_mark))
        place += 1
    return _parts([letter for letter in letters if not letter.is_mark])


def _close(letters: Sequence[_Letter], opened: deque[int], kind: str) -> bool:
    """Weigh what stands since the last bracket of a kind; whether there is one, and the weight is none beyond sense."""
    if not opened:
        return False
    start = opened.pop()
    inside = [letter for letter in letters[start + 1 :] if not letter.is_mark]
    weight = _STRONGER if kind == "(" else 1 / _STRONGER
    tail = inside[-_LONGEST_NUMBER:]
    if kind == "(" and (found := _NUMBER.search("".join(letter.char for letter in tail))):
        weight = float(found[1])
        if abs(weight) > _MOST:
            return False
        for letter in tail[found.start() :]:
            letter.is_mark = True
    for letter in inside:
        letter.weight *= weight
    letters[start].is_mark = True
    return True


def _parts(letters: Sequence[_Letter]) -> list[Part]:
    text = "".join(letter.char for letter in letters)
    weights = tuple(letter.weight for letter in letters)
    breaks = [found.span() for found in _BREAK.finditer(text)]
    parts = []
    for (_, first), (end, _) in pairwise([(0, 0), *breaks, (len(text), len(text))]):
        said = text[first:end]
        first += len(said) - len(said.lstrip()) if first else 0
        end -= len(said) - len(said.rstrip()) if end < len(text) else 0
        parts.append(Part(text[first:end], weights[first:end]))
    return parts


def mean_weight(part: Part, first: int, end: int) -> float:
    """The weight of a token, from those of its characters; blanks before a word have no say."""
    seen = [part.weights[i] for i in range(first, end) if not part.text[i].isspace()]
    return math.fsum(seen) / len(seen) if seen else 1.0
