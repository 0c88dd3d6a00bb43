"""Whose the files in a model's folder are: ours, which may come again, or the user's, which are never replaced."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.disk import Digests, size_of
from flagai_altdiff.hub.manifest import LOCAL, FileRecord
from flagai_altdiff.model_files import is_fetched

logger = logging.getLogger(__name__)

Standing = Literal["nothing", "same", "ours", "alike", "other"]
"""What stands at a file's name in the folder: nothing; the very content that the source has; what we brought and nobody
changed since; a file of the user's that may be the source's, as far as size tells; the user's, and another one."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """The files of a model's folder.

    Args:
        folder: The folder.
        records: What we brought there, by name.
        digests: SHA-256 of its files.
    """

    folder: Path
    records: Mapping[str, FileRecord]
    digests: Digests

    def standing(self, name: str, size_bytes: int | None, sha256: str | None) -> Standing:
        """What stands where a file of a source would go.

        Args:
            name: Path inside the folder, checked.
            size_bytes: Size of the source's file, if that is known.
            sha256: Its hex digest, if that is known.

        Raises:
            DiskError: What stands there cannot be read.
        """
        path = self.folder / name
        if not os.path.lexists(path):
            return "nothing"
        there = size_of(path)
        could_be = bool(there) and size_bytes in (None, there)
        if could_be and sha256 is not None and self.digests.of(path) == sha256:
            return "same"
        if self.is_ours(name):
            return "ours"
        return "alike" if could_be and sha256 is None else "other"

    def is_ours(self, name: str) -> bool:
        """Whether a file is what we once brought: recorded then, and not changed since."""
        path, record = self.folder / name, self.records.get(name)
        if record is None or record.source == LOCAL or not is_fetched(name) or size_of(path) != record.size_bytes:
            return False
        if os.path.islink(path) or (path.parent != self.folder and os.path.islink(path.parent)):  # moved by the user
            return False
        return self.digests.of(path) == record.sha256


def read_inventory(folder: Path, digests: Digests) -> Inventory:
    """The files of a folder and what its manifest says; one that cannot be understood counts as none."""
    try:
        records = manifest.read(folder)
    except HubError as error:
        logger.warning("%s A new record is begun.", error)
        records = {}
    return Inventory(folder=folder, records=records, digests=digests)
