"""Who measures what: the work of all processes, divided without a word between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.evaluation.references import ImageFile, open_images
from flagai_altdiff.evaluation.scorers import Scorer
from flagai_altdiff.evaluation.store import Measured, Shelf, digest

FILES_AT_ONCE = 32


@dataclass(frozen=True)
class Share:
    """What one of several processes does: every so many-th batch.

    Args:
        rank: Its number, from 0.
        processes: How many there are.
    """

    rank: int = 0
    processes: int = 1

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Share:
        """As torchrun says it in ``RANK`` and ``WORLD_SIZE``; everything where it says nothing.

        Raises:
            InvalidRequestError: They make no sense.
        """
        rank, processes = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        numbers = [int(text) if text.isdecimal() and text.isascii() else -1 for text in (rank, processes)]
        if not 0 <= numbers[0] < numbers[1]:
            raise InvalidRequestError("RANK", rank, f"expected a whole number from 0 to below WORLD_SIZE={processes}")
        return cls(*numbers)

    def of(self, count: int, offset: int = 0) -> Iterator[int]:
        """Which of ``count`` batches; ``offset`` spreads what comes in several small lots."""
        return (number for number in range(count) if (number + offset) % self.processes == self.rank)


@dataclass(frozen=True)
class Files:
    """Image files to be measured, a batch at a time.

    Args:
        paths: The files.
        shelf: Where their measurements are kept. The column ``place`` has the number of each row's file.
    """

    paths: Sequence[ImageFile]
    shelf: Shelf

    @classmethod
    def of(cls, paths: Sequence[ImageFile], folder: Path, name: str, *depends: object) -> Files:
        """Files whose measurements lie in ``folder``; they hang on names, sizes and times, and on ``depends``."""
        facts = [(str(path.absolute()), *_facts(path)) for path in paths]
        batches = -(-len(paths) // FILES_AT_ONCE)
        return cls(paths, Shelf(folder / f"{name}-{digest(facts, FILES_AT_ONCE, *depends)}", batches))

    def measure(
        self, batch: int, scorer: Scorer, prepared: Callable[[Image.Image], Image.Image] = lambda image: image
    ) -> None:
        """Measure a batch; an image that cannot be read is named in its place."""
        first = batch * FILES_AT_ONCE
        places, images, broken = open_images(self.paths[first : first + FILES_AT_ONCE])
        columns = dict(scorer.score([prepared(image) for image in images], ())) if images else {}
        columns["place"] = torch.tensor([first + place for place in places], dtype=torch.int64)
        self.shelf.put(batch, Measured(columns, broken))


def _facts(path: ImageFile) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (-1, -1)
    return found.st_size, found.st_mtime_ns
