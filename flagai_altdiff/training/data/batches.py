"""The batches of one process: which positions they hold, and a DataLoader that begins at any step."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from flagai_altdiff.errors import BrokenExampleError, DataError, InvalidRequestError, printable
from flagai_altdiff.training.data.example import Examples, Tally
from flagai_altdiff.training.data.order import Order
from flagai_altdiff.training.data.preparation import Preparation, normalised
from flagai_altdiff.training.randomness import generator

if TYPE_CHECKING:
    _Base = DataLoader[dict[str, Any]]
else:
    _Base = DataLoader

logger = logging.getLogger(__name__)

ENOUGH_TO_JUDGE = 100
"""So many examples are looked at before too many broken ones are an error."""


class Piece(NamedTuple):
    """What a process takes at once of a global batch.

    Args:
        epoch: From 0.
        step: The global batch, counted from the beginning of the run, from 0.
        size: Positions of the whole global batch.
        part: Which part of it this is, from 0.
        positions: Of this piece, in the epoch.
    """

    epoch: int
    step: int
    size: int
    part: int
    positions: range


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a process takes of every global batch: the positions ``rank``, ``rank + world``, ... of it.

    Args:
        count: Examples in an epoch.
        batch_size: Positions in a global batch; the last one of an epoch may have fewer.
        rank: Of the process, from 0.
        world: Number of processes.
        parts: In so many parts a global batch is taken, one after the other, each shared by all processes: those whose
            gradients are accumulated. Some are empty where a batch has fewer positions.
    """

    count: int
    batch_size: int
    rank: int = 0
    world: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("batch_size", 1), ("world", 1), ("rank", 0), ("parts", 1)):
            if getattr(self, name) < least:
                raise InvalidRequestError(name, getattr(self, name), f"expected {least} or more")
        if self.rank >= self.world:
            raise InvalidRequestError("rank", self.rank, f"expected less than world, which is {self.world}")

    @property
    def steps(self) -> int:
        """Global batches in an epoch."""
        return -(-self.count // self.batch_size)

    def pieces(self, step: int) -> list[Piece]:
        """What this process takes of a global batch.

        Args:
            step: The batch, counted from the beginning of the run, from 0.
        """
        epoch, place = divmod(step, self.steps)
        first, last = place * self.batch_size, min((place + 1) * self.batch_size, self.count)
        cuts = [first + part * (last - first) // self.parts for part in range(self.parts + 1)]
        parts = enumerate(range(low + self.rank, high, self.world) for low, high in itertools.pairwise(cuts))
        return [Piece(epoch, step, last - first, part, positions) for part, positions in parts]


def batches(
    examples: Examples,
    share: Share,
    prepare: Preparation | None,
    *,
    seed: int,
    start: int = 0,
    steps: int | None = None,
    workers: int = 0,
    context: str | None = None,
    pin: bool = False,
) -> Batches:
    """A DataLoader of the pieces of one process.

    Each batch is a dict: ``image`` (B, 3, side, side), float32 in [-1, 1]; ``caption`` and ``language``, of one caption
    by chance; ``captions``, pairs of text and language of all; ``key``; ``position`` (B,), int64, in the epoch;
    ``epoch``, ``step``, ``size`` and ``part`` as in :class:`Piece`; ``broken``: key, reason, and this in full. Broken
    examples are in none of the others, so B may be 0.

    Args:
        examples: The data.
        share: Which positions.
        prepare: What becomes of an image; ``None`` to leave images out, and ``image``.
        seed: The run's: of the order, and of the choices for each example.
        start: Step to begin with.
        steps: How many steps; without end unless given.
        workers: Processes that read; 0 for this one.
        context: How they are started: ``fork``, ``spawn``, ``forkserver``.
        pin: Whether tensors lie where a GPU can copy them from; only with CUDA.
    """
    if share.count != len(examples):
        raise InvalidRequestError("count", share.count, f"the data have {len(examples)} examples")
    return Batches(
        dataset=_Prepared(examples, prepare, seed),
        batch_sampler=_Pieces(share, start, steps),  # type: ignore[arg-type]  # the dataset takes pieces
        collate_fn=_as_it_is,
        num_workers=workers,
        multiprocessing_context=context if workers else None,
        pin_memory=pin and torch.cuda.is_available(),
        generator=torch.Generator(),  # so that none is drawn from the process's own
    )


class Batches(_Base):
    """What :func:`batches` gives: a DataLoader that counts broken examples, naming each once in the log.

    Attributes:
        broken: Count by reason.

    Raises:
        DataError: While it is iterated: a disk or server failed, or most examples are broken.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        self.broken = Tally()
        named, seen, bad = set[str](), 0, 0
        for batch in self._read():
            if failure := batch.pop("failure", None):
                raise DataError(failure)
            broken = batch["broken"]
            seen, bad = seen + len(batch["key"]) + len(broken), bad + len(broken)
            for key, reason, words in broken:
                if key not in named:
                    named.add(key)
                    self.broken.add(reason, key)
                    logger.warning("left out of training: %s: %s", printable(key, 300), words)
            if seen >= ENOUGH_TO_JUDGE and bad > seen / 2:
                raise DataError(f"{bad} of {seen} examples are broken: {'; '.join(self.broken.lines())}.")
            yield batch

    def _read(self) -> Iterator[dict[str, Any]]:
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                "a process that reads data was killed, most likely for lack of memory: use fewer workers, or free some"
                " (in a container also in /dev/shm)."
            ) from error


class _Pieces(Sampler[Piece]):
    def __init__(self, share: Share, start: int, steps: int | None) -> None:
        self._share, self._start, self._steps = share, start, steps

    def __iter__(self) -> Iterator[Piece]:
        numbers = itertools.count(self._start) if self._steps is None else range(self._start, self._start + self._steps)
        return itertools.chain.from_iterable(map(self._share.pieces, numbers))

    def __len__(self) -> int:
        if self._steps is None:
            raise TypeError("it has no end")
        return sum(len(self._share.pieces(step)) for step in range(self._start, self._start + self._steps))


class _Prepared(Dataset[dict[str, Any]]):
    """Pieces, read and prepared. What is made of a position depends on the seed, the epoch and the position only."""

    def __init__(self, examples: Examples, prepare: Preparation | None, seed: int) -> None:
        self._examples, self._prepare, self._seed = examples, prepare, seed
        self._order = Order(examples.layout, seed)

    def __getitems__(self, piece: Piece) -> dict[str, Any]:
        rows, broken = list[dict[str, Any]](), list[tuple[str, str, str]]()
        for position in piece.positions:
            try:
                rows.append(self._row(piece.epoch, position))
            except BrokenExampleError as error:
                broken.append((error.key, error.reason, error.words))
            except DataError as error:  # the process that trains raises it, without the reader's traceback
                return {"failure": str(error)}
        names = ("caption", "language", "captions", "key")
        batch: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
        batch["position"] = torch.tensor([row["position"] for row in rows], dtype=torch.int64)
        if self._prepare is not None:
            side = self._prepare.side
            images = [row["image"] for row in rows]
            batch["image"] = normalised(torch.stack(images)) if images else torch.empty(0, 3, side, side)
        return {**batch, "broken": broken, **{name: getattr(piece, name) for name in ("epoch", "step", "size", "part")}}

    def _row(self, epoch: int, position: int) -> dict[str, Any]:
        """What a batch has of an example."""
        example = self._examples[self._order.index(epoch, position)]
        chance = generator(self._seed, "example", epoch, position)
        chosen = example.captions[int(torch.randint(len(example.captions), (), generator=chance))]
        row = {
            "caption": chosen.text,
            "language": chosen.language,
            "captions": [(caption.text, caption.language) for caption in example.captions],
            "key": example.key,
            "position": position,
        }
        if self._prepare is None:
            return row
        if example.image is None:
            raise DataError(f"{printable(example.key, 300)} is text without an image; this needs images.")
        return {**row, "image": self._prepare.cut(example.image, chance)}


def _as_it_is(batch: Any) -> Any:
    return batch
