"""Where in a file the numbers of a tensor lie, and the tensors there: mapped into memory, or read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from flagai_altdiff.checkpoint.mapped import map_file
from flagai_altdiff.errors import CheckpointError, printable

MAX_DIMENSIONS = 16
MAX_KEY_LENGTH = 1000
"""The longest names in files of this family have some hundred letters."""
MAX_TENSORS = 20_000
"""The weights of this family, with averages, are some two thousand."""
_MAX_NUMBERS = 1 << 50
"""In a tensor, where each empty dimension counts as one: torch multiplies them all, and must not overflow."""
_MAX_SHARING = 4
"""Tensors may share numbers (a file with averaged weights under two names), but not stand for many times the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """Place and shape of one tensor.

    Args:
        dtype: Of its numbers.
        start: First byte of the block of numbers that it looks at.
        size_bytes: Length of that block.
        shape: Of the tensor.
        stride: Steps between neighbours along each dimension, in numbers; ``None`` for rows one after the other.
        offset: Its first number, counted from the start of the block.
    """

    dtype: torch.dtype
    start: int
    size_bytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0

    def trouble(self, file_size: int) -> str:
        """What is impossible about it in a file of ``file_size`` bytes; empty if nothing is."""
        numbers, rest = divmod(self.size_bytes, self.dtype.itemsize)
        stride = self.stride if self.stride is not None else (0,) * len(self.shape)
        if len(self.shape) > MAX_DIMENSIONS or len(stride) != len(self.shape):
            return f"has {len(self.shape)} dimensions and {len(stride)} strides"
        if min((*self.shape, *stride, self.offset, self.start, self.size_bytes), default=0) < 0:
            return "has a negative size, stride or offset"
        if math.prod(max(size, 1) for size in self.shape) > _MAX_NUMBERS:
            return f"of shape {list(self.shape)} is larger than any file"
        if self.start + self.size_bytes > file_size:
            return f"ends at byte {self.start + self.size_bytes}, but the file has {file_size}"
        count = math.prod(self.shape)
        last = (
            sum((size - 1) * step for size, step in zip(self.shape, stride, strict=True))
            if self.stride is not None
            else 0
        )
        if rest or count > numbers or (count and self.offset + last >= numbers) or self.offset > numbers:
            return f"of shape {list(self.shape)} does not lie within its {self.size_bytes} bytes"
        return ""


def open_tensors(file: BinaryIO, records: Mapping[str, Record], where: str) -> dict[str, Tensor]:
    """The tensors of an open file. Of a large file on a local disk, a number is read when it is first looked at.

    Args:
        file: Open for reading; may be closed afterwards.
        records: Key -> place.
        where: The file, for errors.

    Returns:
        Key -> tensor on the CPU. Writing into one changes this process's copy, never the file.

    Raises:
        CheckpointError: A record lies outside the file, or together they claim many times its length.
    """
    size = os.fstat(file.fileno()).st_size
    if len(records) > MAX_TENSORS:
        raise CheckpointError(f"{where} holds {len(records)} tensors; at most {MAX_TENSORS} are read.")
    for key, record in records.items():
        if trouble := record.trouble(size):
            raise CheckpointError(
                f"{where} is a truncated or corrupt file of weights: {printable(key, 120)} {trouble}. "
                "Fetch the file again."
            )
    total = sum(math.prod(record.shape) * record.dtype.itemsize for record in records.values())
    if total > _MAX_SHARING * size:
        raise CheckpointError(f"{where} has {size} bytes, but its tensors claim {total}; refused.")
    blocks = {(record.start, record.size_bytes, record.dtype): record for record in records.values()}
    mapping = map_file(file, where)
    numbers = {
        block: _read(file, record, where) if mapping is None else _mapped(mapping, record)
        for block, record in sorted(blocks.items(), key=lambda item: item[1].start)
    }
    return {key: _view(numbers[r.start, r.size_bytes, r.dtype], r) for key, r in records.items()}


def _mapped(mapping: mmap.mmap, record: Record) -> Tensor:
    if record.size_bytes == 0:
        return torch.empty(0, dtype=record.dtype, device="cpu")
    count = record.size_bytes // record.dtype.itemsize
    numbers = torch.frombuffer(mapping, dtype=record.dtype, count=count, offset=record.start)
    # Not every processor computes with numbers at odd addresses.
    return numbers.clone() if record.start % record.dtype.itemsize else numbers


def _read(file: BinaryIO, record: Record, where: str) -> Tensor:
    try:
        numbers = torch.empty(record.size_bytes // record.dtype.itemsize, dtype=record.dtype, device="cpu")
    except RuntimeError as error:  # what torch raises instead
        raise MemoryError from error
    file.seek(record.start)
    if numbers.numel() and file.readinto(numbers.view(torch.uint8).numpy()) != record.size_bytes:  # type: ignore[attr-defined]
        raise CheckpointError(
            f"{where} became shorter while it was read. Wait until it is written, then load it again."
        )
    return numbers


def _view(numbers: Tensor, record: Record) -> Tensor:
    if 0 in record.shape:
        return torch.empty(record.shape, dtype=record.dtype, device="cpu")
    if record.stride is None:
        return numbers[record.offset : record.offset + math.prod(record.shape)].view(record.shape)
    # A stride that is never taken may be any number; torch multiplies it all the same.
    stride = [step if size > 1 else 1 for size, step in zip(record.shape, record.stride, strict=True)]
    return numbers.as_strided(record.shape, stride, record.offset)
