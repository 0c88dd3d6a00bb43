"""Texts that say the same in several languages, for a student that learns from an English teacher."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from flagai_altdiff.errors import DataError, shown
from flagai_altdiff.training.data.batches import Share
from flagai_altdiff.training.data.example import Layout
from flagai_altdiff.training.data.order import Order
from flagai_altdiff.training.objectives import Batch
from flagai_altdiff.training.randomness import generator

ENGLISH = "en"


class ParallelTexts:
    """Rows of texts that mean the same.

    Args:
        files: ``.tsv`` with codes of languages in the first line, or ``.jsonl`` with code -> text in each line. Every
            row has English; it is its own translation where it has nothing else.

    Raises:
        DataError: A file cannot be read, or a row has no English text.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._rows = [row for file in files for row in _read(file)]
        if not self._rows:
            raise DataError(f"{', '.join(map(str, files))}: no texts.")

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, share: Share, *, seed: int, start: int = 0, languages: Sequence[str] = ()) -> Iterator[Batch]:
        """The batches of one process: of each row its English text and one of all its texts, English among them.

        Args:
            share: Which positions.
            seed: The run's.
            start: Step to begin with.
            languages: Only these; all unless given.
        """
        order = Order(Layout((len(self),)), seed)
        for piece in itertools.chain.from_iterable(map(share.pieces, itertools.count(start))):
            english, captions, codes = [], [], []
            for position in piece.positions:
                row = self._rows[order.index(piece.epoch, position)]
                known = [code for code in row if not languages or code in languages] or [ENGLISH]
                chance = generator(seed, "language", piece.epoch, position)
                code = known[int(torch.randint(len(known), (), generator=chance))]
                english.append(row[ENGLISH])
                captions.append(row[code])
                codes.append(code)
            yield {
                "english": english,
                "caption": captions,
                "language": codes,
                "epoch": piece.epoch,
                "position": torch.tensor(piece.positions, dtype=torch.int64),
            }


def _read(path: Path) -> Iterator[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".tsv":
                rows: Iterator[object] = iter(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            elif path.suffix == ".jsonl":
                rows = (json.loads(line) for line in file if line.strip())
            else:
                raise DataError(f"{path}: expected a .tsv or .jsonl file of parallel texts.")
            for number, row in enumerate(rows, 1):
                yield _checked(row, f"{path}, row {number}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{path} is no table of texts in UTF-8: {shown(str(error))}.") from error


def _checked(row: object, where: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object of language -> text, got {shown(row)}.")
    texts = {str(code): text for code, text in row.items() if isinstance(text, str) and text.strip()}
    if ENGLISH not in texts:
        raise DataError(f"{where}: it has no English text ({ENGLISH!r}), which the teacher reads.")
    return texts
