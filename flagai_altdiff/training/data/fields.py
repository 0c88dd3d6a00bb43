"""What stands beside an image: captions, languages, a score, a size. One reading of it for every kind of data."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flagai_altdiff.tokenizer.text import SURROGATE
from flagai_altdiff.training.data.example import Caption

MAX_TEXT_BYTES = 1 << 20
"""A longer text beside an image is no caption."""
LANGUAGE = re.compile("[a-z]{2,3}(-[a-z0-9]{2,8})*")
CAPTION_FIELDS = ("captions", "caption", "text", "texts", "prompt")
LANGUAGE_FIELDS = ("language", "languages", "lang")
SCORE_FIELDS = ("aesthetic", "aesthetic_score", "aesthetics")
FIELDS = {*CAPTION_FIELDS, *LANGUAGE_FIELDS, *SCORE_FIELDS, "width", "height"}
"""Every name that is read, in lower case."""
NO_CAPTION, NOT_TEXT, NOT_JSON = "no caption", "text is not UTF-8", "metadata are not JSON"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image before it is opened.

    Args:
        captions: Those that are there.
        score: The aesthetic one, mostly from 0 to 10.
        width: In px.
        height: In px.
        language: Of a text that stands elsewhere.
    """

    captions: tuple[Caption, ...] = ()
    score: float | None = None
    width: int | None = None
    height: int | None = None
    language: str | None = None


def decode_text(data: bytes) -> str:
    """A text in the encodings that editors write: UTF-8, or UTF-16 with its mark.

    Raises:
        ValueError: Another one, or too long; the message says which.
    """
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"over {MAX_TEXT_BYTES:,} bytes")
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_guess(data)} by the look of it") from error
    if "\0" in text:
        raise ValueError("UTF-16 without its mark, by the look of it")
    return text


def read_lines(data: bytes, language: str | None = None) -> tuple[Caption, ...]:
    """The captions of a text file, one on each line; ValueError as of :func:`decode_text`."""
    return tuple(_captions(re.split(r"\r\n|\r|\n", decode_text(data)), language))


def read_fields(found: Mapping[str, object]) -> Facts:
    """What a record of metadata says, be its names in upper or lower case; what it says in odd ways counts as not said.

    Captions are a text, a list of texts, of records with ``text`` and ``language``, or a mapping from language to text.
    """
    fields = {str(name).lower(): value for name, value in found.items() if value is not None}
    language = _first(fields, LANGUAGE_FIELDS)
    captions = tuple(_captions(_first(fields, CAPTION_FIELDS), language))
    width, height = _number(fields.get("width")), _number(fields.get("height"))
    return Facts(
        captions=captions,
        score=_number(_first(fields, SCORE_FIELDS)),
        width=int(width) if width else None,
        height=int(height) if height else None,
        language=language_code(language),
    )


def language_code(value: object) -> str | None:
    """A language's code as ``de`` or ``zh-tw``; ``None`` of what is none, and of what stands for an unknown one."""
    code = value.strip().lower().replace("_", "-") if isinstance(value, str) else ""
    return code if LANGUAGE.fullmatch(code) and code not in ("und", "unk") else None


def _captions(found: object, language: object) -> Iterator[Caption]:
    if isinstance(found, Mapping) and not isinstance(found.get("text"), str):
        for code, text in found.items():
            yield from _one_language(text, code)
    elif isinstance(found, list | tuple):
        several = language if isinstance(language, list | tuple) and len(language) == len(found) else None
        for i, entry in enumerate(found):
            yield from _one_language([entry], several[i] if several else language)
    else:
        yield from _one_language([found], language)


def _one_language(found: object, language: object) -> Iterator[Caption]:
    """Texts, or records of text and language."""
    for entry in found if isinstance(found, list | tuple) else [found]:
        text, code = (entry.get("text"), entry.get("language")) if isinstance(entry, Mapping) else (entry, None)
        if isinstance(text, str) and len(text) <= MAX_TEXT_BYTES and (line := " ".join(text.split())):
            yield Caption(SURROGATE.sub("\ufffd", line), language_code(code) or language_code(language))


def _first(fields: Mapping[str, object], names: tuple[str, ...]) -> object:
    return next((fields[name] for name in names if name in fields), None)


def _number(value: object) -> float | None:
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _guess(data: bytes) -> str:
    """Letters of Chinese take two bytes each."""
    single = any(len(run) % 2 for run in re.findall(rb"[\x80-\xff]+", data[:10_000]))
    return "ISO-8859-1" if single else "GB18030"
