"""What was drawn before: the images of the output folder, by their own records."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flagai_altdiff.files import open_regular
from flagai_altdiff.metadata import read_record

_NAME = re.compile(r"([0-9]{5,12})\.png")
_MAX_BYTES = 1 << 28


class History:
    """Saved images by their numbers.

    Args:
        folder: Of the output; ``None`` has none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder.absolute() / "samples" if folder else None

    def page(self, before: int | None, limit: int) -> list[tuple[int, Path, dict[str, Any]]]:
        """The newest images: number, file, record.

        Args:
            before: Only lower numbers.
            limit: So many.
        """
        found = list[tuple[int, Path, dict[str, Any]]]()
        for number in self._numbers():
            if len(found) == limit:
                break
            if (before is None or number < before) and (record := read_record(self._path(number))):
                found.append((number, self._path(number), record))
        return found

    def png(self, number: int) -> bytes | None:
        """The file of an image; ``None`` if there is none."""
        if self._folder is None or number < 0:
            return None
        try:
            with open_regular(self._path(number)) as file:
                return file.read(_MAX_BYTES)
        except (OSError, ValueError):
            return None

    def _numbers(self) -> Sequence[int]:
        try:
            names = os.listdir(self._folder) if self._folder else []
        except OSError:
            return []
        return sorted((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), reverse=True)

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:05d}.png"
