"""What a kind of data must be able to do, and what all of them become: filtered, decoded, numbered examples."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from flagai_altdiff.decoding import MAX_PIXELS, PILLOWS_MAX_PIXELS, read_image, read_size, reading
from flagai_altdiff.errors import BrokenExampleError, InvalidRequestError
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.training.data.example import Caption, Example, Layout, Tally
from flagai_altdiff.training.data.fields import NO_CAPTION, Facts
from flagai_altdiff.training.data.filters import Filters

T = TypeVar("T")

Rows = NDArray[np.int64]
"""Rows of a part, ascending."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How data are read.

    Args:
        filters: Which examples are wanted.
        max_pixels: Images with more are broken; they are not unpacked.
        at_least: Side that training needs, in px: a large JPEG may be decoded smaller, which is quicker.
        caption: For images that have none; they are left out unless it is given. It may be empty.
        skip_shards: Leave out shards that cannot be had; an error unless set.
        fetch_all: Fetch all shards when the data are opened. Unless set, those whose ``_stats.json`` says how many
            examples they have are fetched when the first of these is needed.
        cache: Folder for shards from servers, and for what is noted of shards whose own folder is not writable.
    """

    filters: Filters = field(default_factory=Filters)
    max_pixels: int = MAX_PIXELS
    at_least: int | None = None
    caption: str | None = None
    skip_shards: bool = False
    fetch_all: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= PILLOWS_MAX_PIXELS:
            raise InvalidRequestError("max_pixels", self.max_pixels, f"expected 1 to {PILLOWS_MAX_PIXELS}")


Choose = Callable[[], tuple[Rows, Tally]]
"""Gives the wanted rows of a part, and counts the others."""


class Part(Protocol):
    """Some rows that lie together: a folder, a group of rows, a shard."""

    def __len__(self) -> int:
        """Its rows."""

    def key(self, row: int) -> str:
        """The name of a row."""

    def facts(self, row: int) -> Facts:
        """What stands beside the image; BrokenExampleError if it cannot be read."""

    def open(self, row: int) -> BinaryIO:
        """The image's file; OSError if there is none."""


class Source(Protocol):
    """Data of one kind. It can be pickled."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many rows each part has, as far as that is known without opening it."""

    @property
    def lanes(self) -> int:
        """How many parts are well read side by side."""

    @property
    def has_images(self) -> bool:
        """Whether there are more than texts."""

    @property
    def left_out(self) -> Tally:
        """What was no example at first sight."""

    def part(self, number: int) -> Part:
        """A part, opened if need be."""

    def remembered(self, number: int, wanted: str, choose: Choose) -> tuple[Rows, Tally]:
        """The rows of a part that fit what is wanted: what ``choose`` gives, or gave in an earlier run."""


class Recent(Generic[T]):
    """The most recently used of what is costly to make; a process that gets it from another begins without any.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._kept = limit, OrderedDict[int, T]()

    def get(self, number: int, make: Callable[[], T]) -> T:
        """What ``make`` made for the number."""
        if number not in self._kept:
            self._kept[number] = make()
            if len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def __getstate__(self) -> dict[str, Any]:
        return {"_limit": self._limit, "_kept": OrderedDict()}


class Keys(Sequence[str]):
    """Names that are looked up when they are asked for.

    Args:
        count: How many there are.
        key: Gives one of them.
    """

    def __init__(self, count: int, key: Callable[[int], str]) -> None:
        self._count, self._key = count, key

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        numbers = range(self._count)[index]
        return self._key(numbers) if isinstance(numbers, int) else [self._key(number) for number in numbers]


class Selection:
    """The wanted examples of a source.

    Args:
        source: The data.
        how: How they are read.
    """

    def __init__(self, source: Source, how: Reading) -> None:
        self._source, self._how = source, how
        self._left_out = Tally()
        self._left_out.update([source.left_out])
        self._chosen = Recent[tuple[Rows, Tally]](max(source.lanes * 2, 4))
        sizes = list(source.sizes)
        if how.filters:
            parts = range(len(sizes))
            for number in bar_class()(parts, desc="filter", unit="part", disable=not show_bars(), leave=False):
                rows, tally = self._choice(number)
                sizes[number] = len(rows)
                self._left_out.update([tally])
        self._layout = Layout(tuple(sizes), source.lanes)
        self._ends = list(itertools.accumulate(sizes))

    @property
    def layout(self) -> Layout:
        """How they lie together."""
        return self._layout

    @property
    def keys(self) -> Sequence[str]:
        """The name of each, looked up when it is asked for."""
        return Keys(len(self), self._key)

    @property
    def left_out(self) -> Tally:
        """What was told when they were opened to be of no use."""
        return self._left_out

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        """An example; errors as of :class:`Examples`."""
        part, row = self._find(index)
        key, how = part.key(row), self._how
        captions, reason = how.filters.captions(self._facts(part, row).captions)
        if reason:
            raise BrokenExampleError(key, reason)
        image = None
        if self._source.has_images:
            with reading(key), part.open(row) as file:
                image = read_image(file, key, max_pixels=how.max_pixels, at_least=how.at_least)
        return Example(key=key, image=image, captions=captions)

    def _key(self, index: int) -> str:
        part, row = self._find(index)
        return part.key(row)

    def _find(self, index: int) -> tuple[Part, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        return self._source.part(number), int(self._choice(number)[0][row]) if self._how.filters else row

    def _facts(self, part: Part, row: int) -> Facts:
        facts = part.facts(row)
        if facts.captions:
            return facts
        if self._how.caption is None:
            raise BrokenExampleError(part.key(row), NO_CAPTION)
        return Facts((Caption(self._how.caption),), facts.score, facts.width, facts.height)

    def _choice(self, number: int) -> tuple[Rows, Tally]:
        """The wanted rows of a part."""
        how = self._how
        wanted = repr((how.filters, how.caption, how.max_pixels))
        return self._chosen.get(number, lambda: self._source.remembered(number, wanted, lambda: self._choose(number)))

    def _choose(self, number: int) -> tuple[Rows, Tally]:
        part, tally, rows = self._source.part(number), Tally(), list[int]()
        for row in range(len(part)):
            try:
                reason = self._against(part, row)
            except BrokenExampleError as error:
                tally.add(error.reason, error.named)
                continue
            if reason is None:
                rows.append(row)
            else:
                tally.add(reason, part.key(row))
        return np.asarray(rows, dtype=np.int64), tally

    def _against(self, part: Part, row: int) -> str | None:
        facts, filters = self._facts(part, row), self._how.filters
        if (reason := filters.against(facts)) or filters.min_side is None or not self._source.has_images:
            return reason
        width, height = facts.width, facts.height
        if width is None or height is None:
            key = part.key(row)
            with reading(key), part.open(row) as file:
                width, height = read_size(file, key, max_pixels=self._how.max_pixels)
        return filters.against_size(width, height)
