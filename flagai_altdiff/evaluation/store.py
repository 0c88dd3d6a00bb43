"""What is measured of each batch, kept in files: work that was done is never done again, whichever process did it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.errors import OutputError
from flagai_altdiff.files import new_file

_BROKEN = "broken"


@dataclass(frozen=True)
class Measured:
    """What is known of a batch.

    Args:
        columns: Name -> one row for each image, (B, …).
        broken: File -> what is wrong with it; such an image has no row.
    """

    columns: Mapping[str, Tensor]
    broken: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Shelf:
    """The files of one kind of measurement, one for each batch.

    Args:
        folder: Where they lie.
        batches: How many there are to be.
    """

    folder: Path
    batches: int

    def lacks(self, batch: int) -> bool:
        """Whether a batch is still to be measured."""
        return not self._file(batch).is_file()

    @property
    def complete(self) -> bool:
        """Whether every batch is there."""
        return not any(self.lacks(batch) for batch in range(self.batches))

    def put(self, batch: int, measured: Measured) -> None:
        """Keep what was measured; the file is there whole, or not at all.

        Raises:
            OutputError: The disk refuses.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self._file(batch), replace=True) as unfinished:
                columns = {name: column.contiguous() for name, column in measured.columns.items()}
                save_file(columns, unfinished, metadata={_BROKEN: json.dumps(dict(measured.broken))})
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            text = f"{self.folder}: {reason}. What was measured before stays; see to it, and run the command again."
            raise OutputError(text, getattr(error, "errno", None)) from error

    def __iter__(self) -> Iterator[Measured]:
        """All batches in their order, one at a time.

        Raises:
            OutputError: A file is damaged.
        """
        for batch in range(self.batches):
            path = self._file(batch)
            try:
                with safe_open(path, "pt") as file:
                    columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                    broken = json.loads((file.metadata() or {}).get(_BROKEN, "{}"))
            except (OSError, SafetensorError, ValueError) as error:
                raise OutputError(f"{path} cannot be read. Remove it, and run the command again.") from error
            yield Measured(columns, broken)

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch:06d}.safetensors"


def digest(*values: object) -> str:
    """A short name of what a measurement depends on; values are as JSON has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def joined(shelf: Shelf) -> Measured:
    """All batches as one; columns (N, …)."""
    parts: dict[str, list[Tensor]] = {}
    broken: dict[str, str] = {}
    for measured in shelf:
        broken |= measured.broken
        for name, column in measured.columns.items():
            parts.setdefault(name, []).append(column)
    return Measured({name: torch.cat(columns) for name, columns in parts.items()}, broken)
