"""Prompts as people write them for A1111: ``(word:1.3)``, ``[word]``, ``BREAK``. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

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
_WEIGHTED = re.compile(r"[(（][^()（）]*[:：]\s*[+-]?\d*\.?\d+\s*[)）]")
_NOT_HERE = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>|\[[^\[\]:|]*(?::[^\[\]:|]*:[^\[\]:|]*|\|[^\[\]]*)\]|\bAND\b")
"""What A1111 reads as a LoRA, an edit on the way, words in turn or a composition."""
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Part:
    """A part of a prompt, up to a ``BREAK``.

    Args:
        text: Without marks.
        weights: Of each of its characters.
    """

    text: str
    weights: tuple[float, ...]


@dataclass
class _Letter:
    char: str
    weight: float = 1.0
    opens: str = ""


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
    place = 0
    while place < len(prompt):
        char = prompt[place]
        if char == "\\":  # what follows is text; a backslash before anything else says nothing
            if prompt[place + 1 : place + 2] and prompt[place + 1] in _ESCAPED:
                place += 1
                letters.append(_Letter(prompt[place]))
        elif char in _OPENING:
            letters.append(_Letter(char, opens=_OPENING[char]))
        elif char in _CLOSING:
            _close(letters, char)
        else:
            letters.append(_Letter(char))
        place += 1
    return _parts(letters)


def _close(letters: list[_Letter], char: str) -> None:
    """Weigh what stands since the last bracket of this kind; without one, the bracket is text."""
    kind = _CLOSING[char]
    start = next((i for i in reversed(range(len(letters))) if letters[i].opens == kind), None)
    if start is None:
        letters.append(_Letter(char))
        return
    inside = letters[start + 1 :]
    weight = _STRONGER if kind == "(" else 1 / _STRONGER
    tail = max(len(inside) - _LONGEST_NUMBER, 0)
    if kind == "(" and (found := _NUMBER.search("".join(letter.char for letter in inside[tail:]))):
        if abs(float(found[1])) > _MOST:
            letters.append(_Letter(char))
            letters[start].opens = ""
            return
        weight = float(found[1])
        del inside[tail + found.start() :]
    for letter in inside:
        letter.weight *= weight
    letters[start:] = inside


def _parts(letters: Sequence[_Letter]) -> list[Part]:
    text = "".join(letter.char for letter in letters)
    weights = [letter.weight for letter in letters]
    parts, first = [], 0
    for found in _BREAK.finditer(text):
        parts.append(Part(text[first : found.start()], tuple(weights[first : found.start()])))
        first = found.end()
    return [*parts, Part(text[first:], tuple(weights[first:]))]


def mean_weight(part: Part, first: int, end: int) -> float:
    """The weight of a token, from those of its characters; blanks before a word have no say."""
    seen = [part.weights[i] for i in range(first, end) if not part.text[i].isspace()]
    return math.fsum(seen) / len(seen) if seen else 1.0
