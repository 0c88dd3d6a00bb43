"""A file of prompts as large as may be: looked through once, then read line by line; no line is kept in memory."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.files import open_regular
from flagai_altdiff.prompt_files import INVISIBLE, has_requests, reencoding

_MARK = codecs.BOM_UTF8
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_MAX_LINE_BYTES = 64 << 20
_LINE, _END = re.compile(rb"[^\r\n]+"), re.compile(rb"\r\n|\r|\n")


class PromptLines:
    """The lines of a file that are prompts, or requests where it is JSON Lines: twenty bytes of memory for each.

    Args:
        path: The file; as its name says JSON Lines or text, in the encodings of :mod:`flagai_altdiff.prompt_files`.
        comments: Whether lines that begin with ``#`` are left out.

    Attributes:
        are_requests: Whether they are JSON.
        sha256: Of the file.

    Raises:
        InvalidRequestError: It cannot be read, has another encoding (with the line), or nothing in it.
    """

    def __init__(self, path: str | Path, *, comments: bool = False) -> None:
        self._name, self._comments = str(path), comments
        self.are_requests = has_requests(path)
        self._starts, self._sizes, self._numbers = array("Q"), array("I"), array("Q")
        try:
            self._disk = open_regular(Path(path))
            self._file = self._decoded()
            self._stamp = self._looks()
            self.sha256 = self._look_through()
        except (OSError, ValueError) as error:
            if isinstance(error, InvalidRequestError):
                raise
            reason = getattr(error, "strerror", None) or error
            raise InvalidRequestError("from_file", self._name, f"cannot be read: {reason}") from error
        if not self._starts:
            what = "request" if self.are_requests else "prompt"
            raise InvalidRequestError("from_file", self._name, f"the file has no {what}; expected one on each line")

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, place: int) -> int:
        """The number of a line in the file, from 1, as editors count."""
        return self._numbers[place]

    def __getitem__(self, place: int) -> str:
        """A line; InvalidRequestError where the file is not what it was."""
        if self._looks() != self._stamp:
            raise InvalidRequestError("from_file", self._name, "it was changed meanwhile; start again in a new folder")
        self._file.seek(self._starts[place])
        return self._file.read(self._sizes[place]).decode()

    def wrong(self, place: int, reason: str) -> InvalidRequestError:
        """The error for a line."""
        return InvalidRequestError("from_file", self._name, f"line {self.number(place)}: {reason}")

    def _decoded(self) -> BinaryIO:
        """The file as UTF-8; one in UTF-16 is held in memory."""
        wide = self._disk.read(2) in _WIDE
        self._disk.seek(0)
        if not wide:
            return self._disk
        data = self._disk.read(_MAX_LINE_BYTES + 1)
        if len(data) > _MAX_LINE_BYTES:
            raise ValueError(f"it is UTF-16, and has more than {_MAX_LINE_BYTES >> 20} MiB; save it as UTF-8")
        try:
            return io.BytesIO(data.decode("utf-16").encode())
        except UnicodeError as error:
            raise ValueError(f"it is damaged UTF-16: {error}") from error

    def _looks(self) -> tuple[int, ...]:
        """Size and time of the file: what tells that somebody wrote to it."""
        found = os.fstat(self._disk.fileno())
        return found.st_size, found.st_mtime_ns

    def _look_through(self) -> str:
        digest, start, number = hashlib.sha256(), 0, 0
        while raw := self._file.readline(_MAX_LINE_BYTES + 1):
            if len(raw) > _MAX_LINE_BYTES:
                raise ValueError(f"line {number + 1} has more than {_MAX_LINE_BYTES >> 20} MiB")
            digest.update(raw)
            for own, first, size in self._parts(raw, number):
                self._starts.append(start + first)
                self._sizes.append(size)
                self._numbers.append(own)
            start += len(raw)
            number += len(_END.findall(raw))
        return digest.hexdigest()

    def _parts(self, raw: bytes, number: int) -> Iterator[tuple[int, int, int]]:
        """Line number, place and size of what counts in what ends with a line feed; a return alone ends a line too."""
        for match in _LINE.finditer(raw):
            line, first = match[0], match.start()
            while line.startswith(_MARK):  # of a file, or of one that was joined to others
                line, first = line[len(_MARK) :], first + len(_MARK)
            own = number + 1 + len(_END.findall(raw, 0, match.start()))
            try:
                text = line.decode()
            except UnicodeDecodeError:
                reason = f"line {own} is not UTF-8; {reencoding(raw, self._name)}"
                raise InvalidRequestError("from_file", self._name, reason) from None
            if "\0" in text:
                reason = f"line {own} has NUL characters; {reencoding(raw, self._name)}"
                raise InvalidRequestError("from_file", self._name, reason)
            if text.strip(INVISIBLE) and not (self._comments and text.lstrip().startswith("#")):
                yield own, first, len(line)
