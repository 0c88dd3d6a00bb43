"""Texts without images, in several languages each: parallel text for a text encoder. Lines of JSON, or of a table."""

from __future__ import annotations

import io
import json
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from flagai_altdiff.decoding import reading
from flagai_altdiff.errors import BrokenExampleError, DataError, printable
from flagai_altdiff.files import open_regular
from flagai_altdiff.training.data.example import Tally
from flagai_altdiff.training.data.fields import (
    CAPTION_FIELDS,
    MAX_TEXT_BYTES,
    NOT_JSON,
    NOT_TEXT,
    Facts,
    decode_text,
    language_code,
    read_fields,
)
from flagai_altdiff.training.data.folder import WholeSource

ENDINGS = (".jsonl", ".tsv")


class TextLines(WholeSource):
    """The lines of a UTF-8 file, read when they are asked for; eight bytes of memory each.

    Args:
        path: ``.jsonl`` with a record on each line: texts by language, or what :func:`read_fields` reads. Or ``.tsv``:
            the first line has the languages of the columns.
    """

    has_images = False

    def __init__(self, path: Path) -> None:
        super().__init__(Tally())
        self._path, self._places, self._columns = path, array("q"), list[str]()
        with reading(str(path)), open_regular(path) as file:
            if path.suffix == ".tsv":
                self._columns = _columns(path, file.readline(MAX_TEXT_BYTES))
            place = file.tell()
            for line in iter(lambda: file.readline(MAX_TEXT_BYTES + 1), b""):
                if not line.isspace():
                    self._places.append(place)
                place += len(line)

    def __len__(self) -> int:
        return len(self._places)

    def part(self, number: int) -> TextLines:
        """All of it."""
        return self

    def key(self, row: int) -> str:
        """The file's name, and where in it the line begins."""
        return f"{self._path.name}/{self._places[row]}"

    def facts(self, row: int) -> Facts:
        """The texts of a line."""
        key = self.key(row)
        with reading(key), open_regular(self._path) as file:
            file.seek(self._places[row])
            line = file.readline(MAX_TEXT_BYTES + 1)
        try:
            text = decode_text(line)
            record = dict(zip(self._columns, text.split("\t"), strict=False)) if self._columns else json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BrokenExampleError(key, NOT_JSON) from error
        except ValueError as error:
            raise BrokenExampleError(key, NOT_TEXT, str(error)) from error
        if not isinstance(record, Mapping):
            raise BrokenExampleError(key, NOT_JSON)
        if any(str(name).lower() in CAPTION_FIELDS for name in record):
            return read_fields(record)
        return read_fields({"captions": {name: text for name, text in record.items() if language_code(name)}})

    def open(self, row: int) -> BinaryIO:
        """There is no image."""
        return io.BytesIO()


def _columns(path: Path, line: bytes) -> list[str]:
    names = line.decode("utf-8-sig", "replace").strip("\r\n").split("\t")
    if wrong := [name for name in names if language_code(name) is None]:
        raise DataError(
            f"{path}: {printable(wrong[0], 40)!r} in its first line is no language; expected codes with tabs between."
        )
    return names
