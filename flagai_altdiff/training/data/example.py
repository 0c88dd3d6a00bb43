"""What one example of training data is, what many are, and the count of those that cannot be used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from flagai_altdiff.errors import printable

FIRST_NAMES = 5
"""So many names are kept for each reason."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A text that describes an image.

    Args:
        text: On one line, not empty.
        language: Its code in lower case, as ``de``; ``None`` if nobody said.
    """

    text: str
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image and the texts that describe it.

    Args:
        key: Its name; no other example of the same data has it.
        image: Upright, RGB; ``None`` where there are only texts.
        captions: At least one.
    """

    key: str
    image: Image.Image | None = field(repr=False)
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class Layout:
    """How examples lie together, for an order that reads what lies together at about the same time.

    Args:
        parts: How many examples each part has (a shard, a group of rows), in the order of their numbers.
        lanes: How many parts are read side by side.
    """

    parts: tuple[int, ...]
    lanes: int = 1

    @property
    def digest(self) -> str:
        """What processes of one run, and a run that goes on, must have in common: positions mean the same examples."""
        return hashlib.blake2b(repr((self.parts, self.lanes)).encode(), digest_size=12).hexdigest()


class Examples(Protocol):
    """Numbered examples. They can be pickled, and read from any number of processes at once."""

    @property
    def layout(self) -> Layout:
        """How they lie together."""

    @property
    def keys(self) -> Sequence[str]:
        """The name of each."""

    @property
    def left_out(self) -> Tally:
        """What was told when they were opened to be of no use, and so has no number."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Example:
        """One of them.

        Raises:
            BrokenExampleError: It cannot be used.
            DataError: The disk or the server does not answer.
        """


class Tally:
    """How many were left out for each reason, with the first names."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tally) and (self.counts, self.names) == (other.counts, other.names)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count one, or several of which one has a name."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.names.setdefault(reason, [])
        if len(names) < FIRST_NAMES:
            names.append(printable(name, 300))

    def update(self, others: Iterable[Tally]) -> None:
        """Count what others counted."""
        for other in others:
            for reason, count in other.counts.items():
                self.counts[reason] = self.counts.get(reason, 0) + count
                names = self.names.setdefault(reason, [])
                names += other.names.get(reason, [])[: FIRST_NAMES - len(names)]

    def as_json(self) -> dict[str, Any]:
        """Reason -> count and first names."""
        return {reason: {"count": count, "first": self.names[reason]} for reason, count in self.counts.items()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Tally:
        """What :meth:`as_json` gave; KeyError, TypeError or ValueError of anything else."""
        tally = cls()
        for reason, entry in found.items():
            tally.counts[str(reason)] = int(entry["count"])
            tally.names[str(reason)] = [str(name) for name in entry["first"]]
        return tally

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first."""
        rows = sorted(self.counts.items(), key=lambda row: (-row[1], row[0]))
        return [
            f"{count:,} {reason}: {', '.join(self.names[reason])}{', …' if count > len(self.names[reason]) else ''}"
            for reason, count in rows
        ]
