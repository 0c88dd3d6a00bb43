"""Tables that people bring: prompts, captions, names of classes; a text file for each language, or one table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flagai_altdiff.errors import InvalidRequestError, shown
from flagai_altdiff.files import open_regular
from flagai_altdiff.prompt_files import parse_prompts

Row = Mapping[str, str]

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})*")
"""Languages are names of folders as well."""
_MAX_BYTES = 256 << 20
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(path: Path, field: str, needed: Sequence[str]) -> list[Row]:
    """The rows of a table.

    Args:
        path: A ``.jsonl``, ``.csv`` or ``.tsv`` file whose columns have names; or a text file called after its
            language, ``zh.txt``, or a folder of such, in which each line is a row.
        field: What the table is for, which errors begin with.
        needed: Columns that every row has; the last of them is what a line of a text file holds.

    Returns:
        Column -> text, without empty ones. Rows of text files have ``language``, the last of ``needed``, and ``id``:
        the number of the line, blank ones not counted.

    Raises:
        InvalidRequestError: It cannot be read, is empty, or lacks a column; with the line.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt")
        if not files:
            raise InvalidRequestError(field, str(path), "the folder has no text file; expected en.txt, zh.txt …")
        return [row for file in files for row in _lines(file, field, needed[-1])]
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return list(_lines(path, field, needed[-1]))
    if suffix not in (".jsonl", *_DELIMITERS):
        expected = "a .jsonl, .csv or .tsv file, a text file called after its language (zh.txt), or a folder of these"
        raise InvalidRequestError(field, str(path), f"expected {expected}")
    text = _text(path, field)
    found = _json_lines(text, path, field) if suffix == ".jsonl" else _separated(text, _DELIMITERS[suffix], path, field)
    rows = []
    for number, row in found:
        lacking = [column for column in needed if column not in row]
        if lacking:
            here = f"it has {', '.join(row)}" if row else "it is empty"
            raise InvalidRequestError(field, str(path), f"line {number} has no {lacking[0]!r}; {shown(here, 120)}")
        rows.append({**row, "language": _language(row["language"], path, field)} if "language" in row else row)
    if not rows:
        raise InvalidRequestError(field, str(path), f"the table has no row; expected columns {', '.join(needed)}")
    return rows


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What an image is to show.

    Args:
        id: What the same scene is known by in every language.
        text: The prompt.
        english: The same in English, if that is known.
        image: File of an image that shows it, if there is one.
    """

    id: str
    text: str
    english: str | None = None
    image: Path | None = None


def read_prompts(
    path: Path, languages: Sequence[str] = (), *, limit: int | None = None, pictures: Path | None = None
) -> tuple[dict[str, tuple[Prompt, ...]], list[str]]:
    """Prompts of each language.

    Args:
        path: As for :func:`read_table`, with the columns ``language`` and ``prompt``, and if need be ``english``,
            ``id`` and ``image``.
        languages: Which ones to take, in this order; all if left out.
        limit: Take the first so many of each.
        pictures: Where ``image`` counts from; the table's own folder if left out.

    Returns:
        Language -> its prompts in their order; and what should be said about them. A prompt without ``english`` has the
        English prompt of the same ``id``; those of text files do if the files have as many lines.

    Raises:
        InvalidRequestError: The table is none, or a language that was asked for has no prompt.
    """
    by_language: dict[str, list[Row]] = {}
    for row in read_table(path, "prompts", ("language", "prompt")):
        by_language.setdefault(row["language"], []).append(row)
    check_languages(languages, by_language, path)
    english = {row["id"]: row["prompt"] for row in by_language.get("en", ()) if "id" in row}
    home = pictures or (path if path.is_dir() else path.parent)
    found, notes = {}, []
    for language in languages or sorted(by_language):
        rows = by_language[language]
        known = english
        if path.is_dir() and english and len(rows) != len(english):
            known = {}
            notes.append(
                f"{language}.txt has {len(rows)} prompts and en.txt {len(english)}: not taken for the same ones"
            )
        ids = [row.get("id", str(number)) for number, row in enumerate(rows, 1)]
        twice = [name for name, count in Counter(ids).items() if count > 1]
        if twice:
            raise InvalidRequestError("prompts", str(path), f"id {shown(twice[0])} comes twice in {language}")
        found[language] = tuple(
            Prompt(
                id=name,
                text=row["prompt"],
                english=row.get("english") or (row["prompt"] if language == "en" else known.get(name)),
                image=home / row["image"] if "image" in row else None,
            )
            for name, row in zip(ids[:limit], rows, strict=False)
        )
    return found, notes


def check_languages(asked: Iterable[str], there: Iterable[str], path: Path) -> None:
    """InvalidRequestError where a language is asked for that a table does not have."""
    there = sorted(there)
    for language in asked:
        if language not in there:
            expected = f"{path} has nothing in it; there are {', '.join(there)}"
            raise InvalidRequestError("languages", language, expected)


def _lines(path: Path, field: str, column: str) -> Iterator[Row]:
    language = _language(path.stem, path, field)
    try:
        lines = parse_prompts(_bytes(path, field), str(path))
    except InvalidRequestError as error:
        raise InvalidRequestError(field, error.value, error.expected) from None
    for number, line in enumerate(lines, 1):
        yield {"language": language, column: line, "id": str(number)}


def _language(name: str, path: Path, field: str) -> str:
    code = name.strip().lower().replace("_", "-")
    if not _LANGUAGE.fullmatch(code):
        expected = f"{shown(name)} is no code of a language; expected one as en, zh or pt-br"
        raise InvalidRequestError(field, str(path), expected)
    return code


def _bytes(path: Path, field: str) -> bytes:
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES >> 20} MiB")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequestError(field, str(path), f"cannot be read: {reason}") from error
    return data


def _text(path: Path, field: str) -> str:
    data = _bytes(path, field)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + data[: error.start].count(b"\n")
        raise InvalidRequestError(field, str(path), f"line {line} is not UTF-8; save the table as UTF-8") from error


def _json_lines(text: str, path: Path, field: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(field, str(path), f"line {number} is no JSON: {shown(str(error))}") from None
        if not isinstance(row, dict) or not all(isinstance(v, str | int | None) for v in row.values()):
            raise InvalidRequestError(field, str(path), f"line {number}: expected an object of texts and whole numbers")
        yield number, _filled(row)


def _separated(text: str, delimiter: str, path: Path, field: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                raise InvalidRequestError(
                    field, str(path), f"line {reader.line_num} has more cells than the first line"
                )
            yield reader.line_num, _filled(row)
    except csv.Error as error:
        raise InvalidRequestError(field, str(path), f"line {reader.line_num}: {error}") from None


def _filled(row: Mapping[object, object]) -> Row:
    """What a row really says: names of columns without case, no empty cells."""
    cells = ((str(name).strip().lower(), "" if value is None else str(value).strip()) for name, value in row.items())
    return {name: value for name, value in cells if value}
