"""A folder of images: with a text file beside each, or with ``metadata.jsonl`` or ``.csv``, as Hugging Face has it."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flagai_altdiff.decoding import OTHER_IMAGES, SUFFIXES, reading
from flagai_altdiff.errors import BrokenExampleError, DataError, shown
from flagai_altdiff.files import open_regular
from flagai_altdiff.training.data.example import Tally
from flagai_altdiff.training.data.fields import (
    LANGUAGE,
    MAX_TEXT_BYTES,
    NO_CAPTION,
    NOT_JSON,
    NOT_TEXT,
    Facts,
    decode_text,
    read_fields,
    read_lines,
)
from flagai_altdiff.training.data.source import Choose, Rows

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_FIELDS = ("file_name", "image", "path")
OTHER_KIND = "image of a kind that is not read; convert it to JPEG or PNG"
NO_FILE, OUTSIDE, NOT_CSV = "metadata name no image", "file outside the folder", "metadata are not CSV"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_LINE_BYTES = 2 * MAX_TEXT_BYTES


class WholeSource(ABC):
    """A source of one part, which is in memory."""

    lanes = 1
    has_images = True

    def __init__(self, left_out: Tally) -> None:
        self.left_out = left_out

    @abstractmethod
    def __len__(self) -> int:
        """How many examples it has."""

    @property
    def sizes(self) -> Sequence[int]:
        """Of its one part."""
        return (len(self),)

    def remembered(self, number: int, wanted: str, choose: Choose) -> tuple[Rows, Tally]:
        """Chosen anew at each opening: files in a folder change."""
        return choose()


class TextsBeside(WholeSource):
    """Images in a folder and below it, each with text files of its own name: ``cat.jpg``, ``cat.txt``, ``cat.de.txt``.

    A text file has one caption on each line; the letters between the name and ``.txt`` are their language. Hidden files
    are passed over.

    Args:
        folder: Where they are.
        need_texts: Whether images without a text file are left out.
    """

    def __init__(self, folder: Path, *, need_texts: bool) -> None:
        super().__init__(Tally())
        self._folder = folder
        self._rows: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        for place, names in _walk(folder):
            texts = _texts_by_stem(names)
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in OTHER_IMAGES:
                    self.left_out.add(OTHER_KIND, place + name)
                if suffix.lower() not in SUFFIXES:
                    continue
                beside = tuple((place + text, language) for text, language in texts.get(stem, ()))
                if beside or not need_texts:
                    self._rows.append((place + name, beside))
                else:
                    self.left_out.add(NO_CAPTION, place + name)

    def __len__(self) -> int:
        return len(self._rows)

    def part(self, number: int) -> TextsBeside:
        """All of it."""
        return self

    def key(self, row: int) -> str:
        """The image's name, from the folder on."""
        return self._rows[row][0]

    def facts(self, row: int) -> Facts:
        """The captions."""
        name, beside = self._rows[row]
        try:
            lines = [read_lines(_read(self._folder / text, name), language) for text, language in beside]
        except ValueError as error:
            raise BrokenExampleError(name, NOT_TEXT, str(error)) from error
        return Facts(tuple(caption for captions in lines for caption in captions))

    def open(self, row: int) -> BinaryIO:
        """The image."""
        return open_regular(self._folder / self._rows[row][0])


class Listed(WholeSource):
    """Images in a folder and below it that its ``metadata.jsonl`` or ``metadata.csv`` names.

    Args:
        folder: Where they are.
        metadata: The file in it: a record for each image with its ``file_name`` and what :func:`read_fields` reads.
        need_texts: Whether images without a caption are left out.
    """

    def __init__(self, folder: Path, metadata: Path, *, need_texts: bool) -> None:
        super().__init__(Tally())
        self._folder = folder
        self._rows: list[tuple[str, str, Facts]] = []
        seen = set[str]()
        for line, record in _records(metadata, self.left_out):
            where = f"{metadata.name}, line {line}"
            name = file_of(record)
            facts = read_fields(record)
            if name is None:
                self.left_out.add(NO_FILE, where)
            elif not is_inside(name):
                self.left_out.add(OUTSIDE, f"{where}: {name}")
            elif need_texts and not facts.captions:
                self.left_out.add(NO_CAPTION, name)
            else:
                self._rows.append((name if name not in seen else f"{name}#{line}", name, facts))
                seen.add(name)

    def __len__(self) -> int:
        return len(self._rows)

    def part(self, number: int) -> Listed:
        """All of it."""
        return self

    def key(self, row: int) -> str:
        """The image's name, from the folder on; the line's number is added where another line has the same."""
        return self._rows[row][0]

    def facts(self, row: int) -> Facts:
        """What its record says."""
        return self._rows[row][2]

    def open(self, row: int) -> BinaryIO:
        """The image."""
        return open_regular(self._folder / self._rows[row][1])


def is_inside(name: str) -> bool:
    """Whether a name from metadata stays in the folder."""
    path = PurePosixPath(name)
    return not (path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name)


def file_of(record: Mapping[str, object]) -> str | None:
    """The image's file that a record names."""
    fields = {str(name).lower(): value for name, value in record.items()}
    return next((name for field in FILE_FIELDS if isinstance(name := fields.get(field), str) and name), None)


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders below, in order, each as what its files' names begin with, and its files; links may lead to folders."""
    seen = set[tuple[int, int]]()

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be listed: {error.strerror}.") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:  # links that lead around in a circle
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(place).relative_to(folder).as_posix()
        yield "" if below == "." else f"{below}/", sorted(name for name in names if not name.startswith("."))


def _texts_by_stem(names: Iterable[str]) -> dict[str, list[tuple[str, str | None]]]:
    """Name of an image without its ending -> its text files, each with its language."""
    found: dict[str, list[tuple[str, str | None]]] = {}
    images = {stem for stem, suffix in map(os.path.splitext, names) if suffix.lower() in SUFFIXES}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() != ".txt":
            continue
        shorter, _, language = stem.rpartition(".")
        if stem not in images and LANGUAGE.fullmatch(language.lower()):
            found.setdefault(shorter, []).append((name, language.lower()))
        else:
            found.setdefault(stem, []).append((name, None))
    return found


def _read(path: Path, key: str) -> bytes:
    with reading(key), open_regular(path) as file:
        return file.read(MAX_TEXT_BYTES + 1)


def _records(path: Path, left_out: Tally) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The records of a metadata file with the numbers of their lines; lines that are none are counted."""
    try:
        with open_regular(path) as file:
            yield from (_csv_records if path.suffix == ".csv" else _json_records)(path, file, left_out)
    except OSError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _json_records(path: Path, file: BinaryIO, left_out: Tally) -> Iterator[tuple[int, Mapping[str, object]]]:
    if file.read(2) in _UTF16:
        file = io.BytesIO(_all_text(path, file).encode())
    file.seek(0)
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES), b""), 1):
        if not line.strip(b" \t\r\n\xef\xbb\xbf"):
            continue
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(decode_text(line))
        except (json.JSONDecodeError, RecursionError):
            left_out.add(NOT_JSON, where)
        except ValueError as error:
            left_out.add(NOT_TEXT, f"{where}: {error}")
        else:
            if isinstance(record, dict):
                yield number, record
            else:
                left_out.add(NOT_JSON, f"{where}: {shown(record, 40)}")


def _csv_records(path: Path, file: BinaryIO, left_out: Tally) -> Iterator[tuple[int, Mapping[str, object]]]:
    rows = csv.DictReader(io.StringIO(_all_text(path, file), newline=""))
    try:
        yield from ((rows.line_num, {name: value for name, value in row.items() if name and value}) for row in rows)
    except csv.Error as error:
        left_out.add(NOT_CSV, f"{path.name}, from line {rows.line_num} on: {error}")


def _all_text(path: Path, file: BinaryIO) -> str:
    file.seek(0)
    data = file.read()
    try:
        return data.decode("utf-16" if data[:2] in _UTF16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start:,}); save it as UTF-8.") from error
