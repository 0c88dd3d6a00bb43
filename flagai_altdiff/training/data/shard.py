"""One shard: a tar archive with an image, a text and a ``.json`` for each example, as img2dataset makes it.

It is looked through once; what lies where is noted, so that any example can be read at any time. Nothing of it is
unpacked to a disk, run, or unpickled.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flagai_altdiff.decoding import PILLOWS_MAX_PIXELS, SUFFIXES, UNREADABLE
from flagai_altdiff.errors import BrokenExampleError, DataError, printable
from flagai_altdiff.files import open_regular
from flagai_altdiff.tar import BrokenTarError, Member, members
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
from flagai_altdiff.training.data.notes import Note, Stamp, read_note, write_note

logger = logging.getLogger(__name__)

DAMAGED_SHARD, EMPTY_SHARD = "damaged shard", "shard without examples"
NO_IMAGE, TWICE, FEWER = "no image", "file twice in a shard", "not in its shard, which has fewer than its stats say"
_IMAGE, _JSON, _TEXT = 0, 1, 2
"""Kinds of files; a text in the n-th language of the shard is ``_TEXT + n``."""
_MAX_IMAGE_BYTES = 8 * PILLOWS_MAX_PIXELS
_NAME = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<ending>[^/]+)", re.DOTALL)
_MARKED = re.compile(r"(^|/)__[^/]*__($|/)")
"""What webdataset keeps for itself."""


class ShardPart:
    """The examples of a shard.

    Args:
        path: The shard.
        label: What the names of its examples begin with.
        stamp: Its content that was looked through.
        index: What was found.
        counted: How many examples it is said to have; what it has more has no number.
    """

    def __init__(self, path: Path, label: str, stamp: Stamp, index: Note, *, counted: int | None = None) -> None:
        self.path, self.stamp = path, stamp
        self._label, self._index = label, index
        self._languages = [str(code) or None for code in index.about["languages"]]
        self._counted = len(index.names) if counted is None else counted
        self._handle: int | None = None

    def __len__(self) -> int:
        return self._counted

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    @property
    def surplus(self) -> int:
        """How many it has that were not counted."""
        return max(len(self._index.names) - self._counted, 0)

    @property
    def left_out(self) -> Tally:
        """What in the shard was no example."""
        return Tally.from_json(self._index.about["left_out"])

    def key(self, row: int) -> str:
        """The shard's label and the example's own name."""
        own = self._index.names[row] if row < len(self._index.names) else f"number {row}"
        return f"{self._label}/{own}"

    def facts(self, row: int) -> Facts:
        """What its ``.json`` says; where that has no caption, those of its texts, one on each line."""
        files, key = self._files(row), self.key(row)
        try:
            record = json.loads(decode_text(self._read(key, files[_JSON], MAX_TEXT_BYTES))) if _JSON in files else {}
            facts = read_fields(record if isinstance(record, dict) else {})
            if facts.captions:
                return facts
            captions = [
                read_lines(self._read(key, place, MAX_TEXT_BYTES), self._languages[kind - _TEXT] or facts.language)
                for kind, place in files.items()
                if kind >= _TEXT
            ]
        except (json.JSONDecodeError, RecursionError) as error:
            raise BrokenExampleError(key, NOT_JSON) from error
        except ValueError as error:
            raise BrokenExampleError(key, NOT_TEXT, str(error)) from error
        return replace(facts, captions=tuple(caption for several in captions for caption in several))

    def open(self, row: int) -> BinaryIO:
        """The image."""
        key = self.key(row)
        return io.BytesIO(self._read(key, self._files(row)[_IMAGE], _MAX_IMAGE_BYTES))

    def _files(self, row: int) -> dict[int, tuple[int, int]]:
        """Kind -> place and size of an example's files."""
        if row >= len(self._index.names):
            raise BrokenExampleError(self.key(row), FEWER)
        numbers = self._index.numbers
        here = slice(numbers["first"][row], numbers["first"][row + 1])
        places = zip(numbers["place"][here].tolist(), numbers["size"][here].tolist(), strict=True)
        return dict(zip(numbers["kind"][here].tolist(), places, strict=True))

    def _read(self, key: str, place: tuple[int, int], most: int) -> bytes:
        """A file's content, or so much of it that it is seen to be too long."""
        start, size = place
        size = min(size, most + 1)
        try:
            data = os.pread(self._opened(), size, start) if hasattr(os, "pread") else self._sought(start, size)
        except OSError as error:
            raise DataError(f"{printable(str(self.path), 300)} cannot be read: {error.strerror or error}.") from error
        if len(data) < size:
            raise BrokenExampleError(key, UNREADABLE, "the shard became shorter")
        return data

    def _opened(self) -> int:
        """The shard; reading it moves no position, so that processes may share it."""
        if self._handle is None:
            with open_regular(self.path) as file:
                if Stamp.of(os.fstat(file.fileno())) != self.stamp:
                    raise changed(self.path)
                self._handle = os.dup(file.fileno())
        return self._handle

    def _sought(self, start: int, size: int) -> bytes:
        with open_regular(self.path) as file:
            file.seek(start)
            return file.read(size)


def changed(path: Path) -> DataError:
    """The error for a shard that is not the one that was looked through."""
    return DataError(f"shard {printable(str(path), 300)} was changed; start again to look it through.")


def look_through(path: Path, label: str, *, need_texts: bool, cache: Path, counted: int | None = None) -> ShardPart:
    """A shard, by the note of an earlier time if there is one.

    Args:
        path: The shard.
        label: As in :class:`ShardPart`.
        need_texts: Whether an image without a text and a ``.json`` is of no use.
        cache: Where notes are if its folder is not writable.
        counted: As in :class:`ShardPart`.

    Raises:
        OSError: It cannot be opened or read.
    """
    kind = "altdiff-index" if need_texts else "altdiff-index-of-all"
    with open_regular(path) as file:
        stamp = Stamp.of(os.fstat(file.fileno()))
        note = read_note(path, kind, stamp, cache)
        if note is None or not _is_index(note, stamp.size_bytes):
            note = _index_of(file, path.name, stamp.size_bytes, need_texts=need_texts)
            write_note(note, path, kind, stamp, cache)
    return ShardPart(path, label, stamp, note, counted=counted)


def _index_of(file: BinaryIO, name: str, size: int, *, need_texts: bool) -> Note:
    tally, languages = Tally(), {"": 0}
    samples: dict[str, dict[int, Member]] = {}
    try:
        for member in members(file, size):
            match = _NAME.fullmatch(member.name)
            if match is None or _MARKED.search(member.name):
                continue
            files = samples.setdefault(match["key"], {})
            kind = _kind(match["ending"].lower(), languages)
            if kind is None:
                continue
            if kind in files:
                tally.add(TWICE, f"{name}: {member.name}")  # as in any archive, the later one is meant
            files[kind] = member
    except BrokenTarError as error:
        tally.add(DAMAGED_SHARD, f"{name}: {error}")
    for key, files in [*samples.items()]:
        if _IMAGE not in files or (need_texts and len(files) == 1):
            tally.add(NO_CAPTION if _IMAGE in files else NO_IMAGE, f"{name}: {key}")
            del samples[key]
    if not samples:
        tally.add(EMPTY_SHARD, name)
    rows = [[(kind, member.offset, member.size) for kind, member in files.items()] for files in samples.values()]
    flat = np.asarray([entry for row in rows for entry in row], dtype=np.int64).reshape(-1, 3)
    first = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    numbers = {"first": first, "kind": flat[:, 0], "place": flat[:, 1], "size": flat[:, 2]}
    return Note(about={"left_out": tally.as_json(), "languages": list(languages)}, numbers=numbers, names=list(samples))


def _kind(ending: str, languages: dict[str, int]) -> int | None:
    if f".{ending}" in SUFFIXES:
        return _IMAGE
    if ending == "json":
        return _JSON
    code, _, last = ending.rpartition(".")
    if last != "txt" or (code and not LANGUAGE.fullmatch(code)):
        return None
    return _TEXT + languages.setdefault(code, len(languages))


def _is_index(note: Note, size: int) -> bool:
    """Whether a note can be the index of a shard of this size."""
    try:
        first, kind, place, length = (note.numbers[name] for name in ("first", "kind", "place", "size"))
        Tally.from_json(note.about["left_out"])
        languages = note.about["languages"]
        return bool(
            len(first) == len(note.names) + 1
            and first[0] == 0
            and np.all(np.diff(first) > 0)
            and first[-1] == len(kind) == len(place) == len(length)
            and np.all(np.add.reduceat(kind == _IMAGE, first[:-1]) if len(kind) else True)
            and np.all((kind >= 0) & (kind < _TEXT + len(languages)))
            and np.all((place >= 0) & (length >= 0) & (place <= size) & (length <= size - place))
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return False
