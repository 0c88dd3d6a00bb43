"""A text as it is typed, and as SentencePiece takes it."""

from __future__ import annotations

import functools
import re
import unicodedata

_MAX_MARKS = 30
"""Marks of one letter that are put in order (Unicode's stream-safe format): the time of that is quadratic."""
_INVISIBLE_CODES = (
    "0-20 7f-a0 1680 2000-200a 2028 2029 202f 205f 3000 2800 "  # controls and blanks
    "ad 34f 61c 115f 1160 17b4 17b5 180b-180f 200b-200f 202a-202e 2060-206f 3164 fe00-fe0f feff ffa0 fff0-fffb "
    "1bca0-1bca3 1d173-1d17a e0000-e0fff"  # Unicode's default ignorable: joiners, marks of direction, selectors, tags
)
_INVISIBLE = "".join(
    chr(code)
    for first, _, last in (codes.partition("-") for codes in _INVISIBLE_CODES.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)
SIMPLE_SIGNS = "\0-\u02ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U0001f000-\U0001faff"
SIMPLE = re.compile(f"[{SIMPLE_SIGNS}]+(?![^{SIMPLE_SIGNS}])")
"""Latin letters, Han, Hangul and emoji are what NFC makes of them, and none changes the one before it."""
_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0020-\U000e01ef]*")
SURROGATE = re.compile("[\ud800-\udfff]")


def trimmed(text: str) -> str:
    """A text without what is invisible at its ends: blanks, joiners, marks of direction, byte order marks."""
    start, end = visible(text)
    return text[start:end]


def visible(text: str) -> tuple[int, int]:
    """Start and end of a text without what is invisible at its ends."""
    start, end = len(text) - len(text.lstrip(_INVISIBLE)), len(text.rstrip(_INVISIBLE))
    if start >= end:
        return 0, 0
    if unicodedata.category(text[end - 1]) == "So" and (selector := _SELECTOR.match(text, end)):
        end = selector.end()  # part of the sign before it: a red heart, a flag
    return start, end


def composed(text: str) -> tuple[str, list[int]]:
    """NFC of a text, and where in the text each of its characters begins; then the text's end.

    SentencePiece's table composes most decomposed letters itself, but not every order of their marks.
    """
    nfc = functools.partial(unicodedata.normalize, "NFC")
    parts: list[str] = []
    origins: list[int] = []
    start = i = 0
    while i < len(text):
        if i == start and (simple := SIMPLE.match(text, i)):
            parts.append(simple[0])
            origins += range(i, simple.end())
            start = i = simple.end()
            continue
        i += 1
        letter, following = nfc(text[start:i]), text[i : i + 1]
        if following and i - start <= _MAX_MARKS and joins(letter, following):
            continue
        parts.append(letter)
        origins += [start] * len(letter)
        start = i
    return "".join(parts), [*origins, len(text)]


def joins(letter: str, following: str) -> bool:
    """Whether what follows a letter changes it, or is a mark of it."""
    nfc, nfd = (functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))
    return unicodedata.combining(nfd(following)[0]) != 0 or nfc(letter + following) != letter + nfc(following)
