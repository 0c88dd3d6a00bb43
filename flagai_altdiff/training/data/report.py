"""What is in the data: numbers, languages, sizes, what is broken, and how quickly it is read."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flagai_altdiff.errors import BrokenExampleError, DataError, InvalidRequestError
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.training.data.example import Caption, Examples, Tally
from flagai_altdiff.training.data.filters import UNKNOWN
from flagai_altdiff.training.data.order import Order

SIDES = (64, 128, 256, 384, 512, 768, 1024, 2048)
LENGTHS = (10, 20, 40, 80, 160, 320)
"""Where the bars of the histograms begin; what is smaller has a bar of its own."""
TILE = 128
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Tile:
    """An example on the contact sheet.

    Args:
        key: Its name.
        caption: One of its captions.
        image: Small.
    """

    key: str
    caption: Caption
    image: Image.Image = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """What was found.

    Attributes:
        examples: How many there are.
        looked_at: How many of them were read.
        good: How many of these can be used.
        captions: Captions of the good ones by language.
        captions_per_image: Number of captions -> images.
        shorter_sides: Shorter side, from so many px on -> images.
        lengths: Characters of a caption, from so many on -> captions.
        smallest: Width and height of the image with the smallest shorter side.
        largest: Width and height of the one with the most pixels.
        left_out: What got no number when the data were opened.
        broken: What could not be used of what was read.
        images_per_second: Read and decoded, with all workers.
        tiles: Some examples.
    """

    examples: int
    looked_at: int
    good: int
    captions: dict[str, int]
    captions_per_image: dict[int, int]
    shorter_sides: dict[int, int]
    lengths: dict[int, int]
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    left_out: Tally
    broken: Tally
    images_per_second: float
    tiles: list[Tile] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Plain values; the tiles as name and caption."""
        plain = {name: value for name, value in vars(self).items() if name not in ("left_out", "broken", "tiles")}
        shown = [{"key": t.key, "caption": t.caption.text, "language": t.caption.language} for t in self.tiles]
        return {**plain, "left_out": self.left_out.as_json(), "broken": self.broken.as_json(), "shown": shown}


def report(examples: Examples, *, most: int | None = None, tiles: int = 0, workers: int = 0) -> DataReport:
    """Read examples, all of them or a random choice, as training would.

    Args:
        examples: The data.
        most: Look at so many at most.
        tiles: Keep so many for a contact sheet.
        workers: Processes that read; 0 for this one.

    Raises:
        DataError: The disk or the server does not answer.
    """
    for name, value, least in (("most", most, 1), ("tiles", tiles, 0), ("workers", workers, 0)):
        if value is not None and value < least:
            raise InvalidRequestError(name, value, f"expected {least} or more")
    numbers: Sequence[int] = range(len(examples))
    if most is not None and most < len(examples):
        order = Order(examples.layout, _SEED)
        numbers = [order.index(0, position) for position in range(most)]
    count = len(numbers)
    shown = {numbers[i * count // tiles] for i in range(tiles)} if count else set()
    loader = DataLoader(
        _Looks(examples, numbers, shown), batch_size=None, num_workers=workers, generator=torch.Generator()
    )
    found, began = _Found(), None
    for look in bar_class()(loader, total=count, unit="image", disable=not show_bars(), leave=False):
        began = began or time.monotonic()  # when all is under way
        found.add(look)
    return found.as_report(examples, count, time.monotonic() - (began or 0.0))


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What one example is; a reason or a failure if it is none."""

    key: str = ""
    size: tuple[int, int] | None = None
    captions: tuple[Caption, ...] = ()
    tile: Image.Image | None = None
    reason: str = ""
    failure: str = ""


class _Looks(Dataset[_Look]):
    def __init__(self, examples: Examples, numbers: Sequence[int], shown: set[int]) -> None:
        self._examples, self._numbers, self._shown = examples, numbers, shown

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> _Look:
        number = self._numbers[place]
        try:
            example = self._examples[number]
        except BrokenExampleError as error:
            return _Look(key=error.named, reason=error.reason)
        except DataError as error:
            return _Look(failure=str(error))
        image = example.image
        if image is None:
            return _Look(key=example.key, captions=example.captions)
        tile = None
        if number in self._shown:
            tile = image.copy()
            tile.thumbnail((TILE, TILE))
        return _Look(key=example.key, size=image.size, captions=example.captions, tile=tile)


class _Found:
    """Counts of the looks so far."""

    def __init__(self) -> None:
        self._languages, self._numbers = Counter[str](), Counter[int]()
        self._sides, self._lengths = Counter[int](), Counter[int]()
        self._smallest: tuple[int, int] | None = None
        self._largest: tuple[int, int] | None = None
        self._broken, self._tiles = Tally(), list[Tile]()

    def add(self, look: _Look) -> None:
        """Count one; DataError if there is no going on."""
        if look.failure:
            raise DataError(look.failure)
        if look.reason:
            self._broken.add(look.reason, look.key)
            return
        self._languages.update(caption.language or UNKNOWN for caption in look.captions)
        self._numbers[len(look.captions)] += 1
        self._lengths.update(_bar(LENGTHS, len(caption.text)) for caption in look.captions)
        if look.size is not None:
            self._sides[_bar(SIDES, min(look.size))] += 1
            self._smallest = min(self._smallest or look.size, look.size, key=min)
            self._largest = max(self._largest or look.size, look.size, key=math.prod)
        if look.tile is not None:
            self._tiles.append(
                Tile(key=look.key, caption=look.captions[len(self._tiles) % len(look.captions)], image=look.tile)
            )

    def as_report(self, examples: Examples, count: int, seconds: float) -> DataReport:
        """All of it."""
        return DataReport(
            examples=len(examples),
            looked_at=count,
            good=count - len(self._broken),
            captions=dict(self._languages.most_common()),
            captions_per_image=dict(sorted(self._numbers.items())),
            shorter_sides=dict(sorted(self._sides.items())),
            lengths=dict(sorted(self._lengths.items())),
            smallest=self._smallest,
            largest=self._largest,
            left_out=examples.left_out,
            broken=self._broken,
            images_per_second=round(max(count - 1, 0) / max(seconds, 1e-3), 1),
            tiles=self._tiles,
        )


def _bar(begins: tuple[int, ...], value: int) -> int:
    """Where the bar of a value begins."""
    return max((begin for begin in begins if begin <= value), default=0)
