"""Latents and text states on disk, so that a step needs neither autoencoder nor text encoder.

A block of examples is a folder that appears whole; any number of processes, whenever they start, make those that lack.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flagai_altdiff.errors import BrokenExampleError, DataError, DiskError, printable
from flagai_altdiff.files import new_folder
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.training.data.batches import ENOUGH_TO_JUDGE, Share
from flagai_altdiff.training.data.example import Examples
from flagai_altdiff.training.data.order import Order
from flagai_altdiff.training.data.preparation import Preparation, normalised
from flagai_altdiff.training.data.source import Recent
from flagai_altdiff.training.objectives import Batch
from flagai_altdiff.training.processes import wait_until
from flagai_altdiff.training.randomness import generator

logger = logging.getLogger(__name__)

BLOCK = 256
"""Examples of a block."""
_VERSION = 1
_AT_ONCE = 8
_OPEN_BLOCKS = 128
_FROZEN = ("first_stage_model.", "cond_stage_model.")
MOMENTS, STATES, ROWS = "moments.npy", "states.npy", "rows.json"


class Cache:
    """What the frozen parts of a model make of every example.

    Args:
        folder: Of all caches of a run; each has a folder of its own there, named by all that decides what is in it.
        model: Its autoencoder and text encoder are asked, where it then is.
        examples: The data.
        prepare: Of the images; it must cut the same square each time.
        about: Further of the data that decides what they are.
    """

    def __init__(
        self, folder: Path, model: LatentDiffusion, examples: Examples, prepare: Preparation, about: str = ""
    ) -> None:
        self._model, self._examples, self._prepare = model, examples, prepare
        self._folder = folder / _digest(model, examples, prepare, about)
        self._blocks = [self._folder / f"{number:06d}" for number in range(-(-len(examples) // BLOCK))]
        self._open = Recent[_Block](_OPEN_BLOCKS)

    def fill(self, rank: int = 0, world: int = 1, *, workers: int = 0) -> None:
        """Make this process's share of what is missing, and wait for the others'.

        Args:
            rank: Of the process.
            world: Number of processes, all of which must call this.
            workers: Processes that read images.

        Raises:
            DataError: The disk or the server of the data does not answer.
            DiskError: A block cannot be written.
        """
        missing = [number for number in range(rank, len(self._blocks), world) if not self._blocks[number].is_dir()]
        loader = DataLoader(
            _Read(self._examples, self._prepare),
            batch_size=None,
            sampler=missing,
            num_workers=workers,
            generator=torch.Generator(),
        )
        hidden = rank != 0 or not show_bars()
        for number, rows in bar_class()(loader, desc="cache", unit="block", disable=hidden, leave=False):
            if isinstance(rows, str):
                raise DataError(rows)
            self._judge(rows)
            try:
                self._write(number, rows)
            except FileExistsError:
                continue  # another process was quicker
            except OSError as error:
                text = f"{self._folder} cannot be written: {error.strerror}. Make room, or set data.cache: false."
                raise DiskError(text, error.errno) from error
        wait_until(lambda: all(block.is_dir() for block in self._blocks))

    def batches(self, share: Share, *, seed: int, start: int = 0) -> Iterator[Batch]:
        """What ``training.data.batches`` gives, with ``moments`` and ``states`` in place of the images.

        Args:
            share: Of this process.
            seed: The run's.
            start: Step to begin with.
        """
        order, step = Order(self._examples.layout, seed), start
        while True:
            for piece in share.pieces(step):
                rows = [self._row(order, seed, piece.epoch, position) for position in piece.positions]
                good = [row for row in rows if row is not None]
                batch: dict[str, Any] = {name: [row[name] for row in good] for name in ("caption", "language", "key")}
                batch |= {name: torch.stack([row[name] for row in good]) for name in ("moments", "states") if good}
                batch["position"] = torch.tensor([row["position"] for row in good], dtype=torch.int64)
                yield {**batch, "epoch": piece.epoch, "step": piece.step, "size": piece.size, "part": piece.part}
            step += 1

    def _judge(self, rows: list[dict[str, Any]]) -> None:
        broken = [row for row in rows if row["captions"] is None]
        for row in broken:
            logger.warning("left out of training: %s: %s", printable(row["key"], 300), row["reason"])
        if len(rows) >= min(ENOUGH_TO_JUDGE, len(self._examples)) and len(broken) > len(rows) / 2:
            raise DataError(f"{len(broken)} of {len(rows)} examples are broken: {broken[0]['reason']} for one.")

    def _row(self, order: Order, seed: int, epoch: int, position: int) -> dict[str, Any] | None:
        number, place = divmod(order.index(epoch, position), BLOCK)
        block = self._open.get(number, lambda: _Block.open(self._blocks[number]))
        row = block.rows[place]
        if row["captions"] is None:
            return None
        chance = generator(seed, "example", epoch, position)  # whose first number chooses the caption everywhere
        chosen = int(torch.randint(len(row["captions"]), (), generator=chance))
        text, language, first, last = row["captions"][chosen]
        return {
            "caption": text,
            "language": language,
            "key": row["key"],
            "position": position,
            "moments": torch.from_numpy(block.moments[place].copy()),
            "states": _padded(torch.from_numpy(block.states[first:last].copy()), block.tokens),
        }

    def _write(self, number: int, rows: list[dict[str, Any]]) -> None:
        good = [row for row in rows if row["captions"] is not None]
        texts = list(dict.fromkeys(text for row in good for text, _ in row["captions"]))
        states, places, tokens = self._states(texts)
        moments = self._moments([row.pop("image") for row in good])
        whole = np.zeros((len(rows), *moments.shape[1:]), np.float32)
        whole[[place for place, row in enumerate(rows) if row["captions"] is not None]] = moments
        for row in good:
            row["captions"] = [(text, language, *places[text]) for text, language in row["captions"]]
        with new_folder(self._blocks[number]) as made:
            np.save(made / MOMENTS, whole)
            np.save(made / STATES, states)
            (made / ROWS).write_text(json.dumps({"tokens": tokens, "rows": rows}), encoding="utf-8")

    @torch.no_grad()
    def _moments(self, images: list[Tensor]) -> NDArray[np.float32]:
        parts = []
        for first in range(0, len(images), _AT_ONCE):
            pixels = normalised(torch.stack(images[first : first + _AT_ONCE]))
            posterior = self._model.encode_first_stage(pixels.to(self._model.device))
            parts.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu().numpy())
        return np.concatenate(parts) if parts else np.zeros((0, 1, 1, 1), np.float32)

    @torch.no_grad()
    def _states(self, texts: list[str]) -> tuple[NDArray[np.float32], dict[str, tuple[int, int]], int]:
        """States of all texts below each other, where each has its own, and how many the UNet is given of each.

        Behind a text all states are the same, and only one of them is kept.
        """
        found, places, count, tokens = [np.zeros((0, self._model.config.unet.context_dim), np.float32)], {}, 0, 0
        for first in range(0, len(texts), _AT_ONCE):
            some = texts[first : first + _AT_ONCE]
            states = self._model.get_learned_conditioning(some).float().cpu()
            tokens = states.shape[1]
            for text, rows in zip(some, states, strict=True):
                differ = (rows != rows[-1]).any(dim=1).nonzero()
                length = int(differ.max()) + 2 if len(differ) else 1
                places[text] = (count, count + length)
                found.append(rows[:length].numpy())
                count += length
        return np.concatenate(found), places, tokens


@dataclass(frozen=True)
class _Block:
    """A block that is open.

    Args:
        moments: (N, 2C, h, w) of its images; zeros for those that are broken.
        states: (R, D) of all its texts.
        rows: Key, and for each caption its text, language and place in ``states``; for each example.
        tokens: States of a text as the UNet is given them.
    """

    moments: NDArray[np.float32]
    states: NDArray[np.float32]
    rows: list[dict[str, Any]]
    tokens: int

    @classmethod
    def open(cls, folder: Path) -> _Block:
        try:
            about = json.loads((folder / ROWS).read_text(encoding="utf-8"))
            moments, states = (np.load(folder / name, mmap_mode="r") for name in (MOMENTS, STATES))
            return cls(moments, states, about["rows"], about["tokens"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} is no whole part of a cache: {error}. Remove it, and go on.") from error


class _Read(Dataset[Any]):
    """The examples of a block: keys, captions and images; or the reason why the data cannot be read."""

    def __init__(self, examples: Examples, prepare: Preparation) -> None:
        self._examples, self._prepare = examples, prepare

    def __getitem__(self, number: int) -> tuple[int, list[dict[str, Any]] | str]:
        rows = list[dict[str, Any]]()
        for index in range(number * BLOCK, min((number + 1) * BLOCK, len(self._examples))):
            try:
                example = self._examples[index]
                if example.image is None:
                    return number, f"{example.key} is text without an image; this needs images."
            except BrokenExampleError as error:
                rows.append({"key": error.key, "captions": None, "reason": error.words})
                continue
            except DataError as error:  # the process that trains raises it, without the reader's traceback
                return number, str(error)
            captions = [(caption.text, caption.language) for caption in example.captions]
            image = self._prepare.cut(example.image, torch.Generator())
            rows.append({"key": example.key, "captions": captions, "image": image})
        return number, rows


def _padded(states: Tensor, tokens: int) -> Tensor:
    return torch.cat([states, states[-1:].expand(tokens - len(states), -1)])


def _digest(model: LatentDiffusion, examples: Examples, prepare: Preparation, about: str) -> str:
    """Of the frozen weights, the data's names and all settings."""
    digest = hashlib.blake2b(repr((_VERSION, BLOCK, prepare, about, examples.layout)).encode(), digest_size=12)
    for key in examples.keys:
        digest.update(f"{key}\n".encode(errors="surrogateescape"))
    for name, tensor in model.state_dict().items():
        if name.startswith(_FROZEN):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
