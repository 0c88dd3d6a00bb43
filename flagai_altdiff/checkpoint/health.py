"""Numbers that no trained model has: NaN, infinity, matrices of nothing but zeros."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flagai_altdiff.errors import CheckpointError, printable

logger = logging.getLogger(__name__)

_SMALL = 1 << 16
_WINDOW = 1 << 12
_CHUNK = 1 << 22
_MAY_BE_ZERO = re.compile(r"(bias|position_ids|proj_out\.weight|out_layers\.3\.weight|out\.2\.weight)$")
"""What begins at zero by construction, and may stay there: biases and the last layer of each block of the UNet."""


def check_weights(state: Mapping[str, Tensor], where: str, *, thorough: bool = False) -> None:
    """Look for numbers that cannot be meant.

    Args:
        state: Key -> tensor; those that hold no floating-point numbers are passed over.
        where: The file, for errors.
        thorough: Look at every number. Otherwise at small tensors whole, and at the beginning, middle and end of large
            ones, which leaves a mapped file on the disk.

    Raises:
        CheckpointError: A tensor holds NaN or infinity. Tensors that are all zero are warned of.
    """
    zeros = []
    for key, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        nonzero = False
        for part in _parts(tensor, thorough):
            low, high = part.float().aminmax()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                kind = "NaN" if torch.isnan(low) else "infinity"
                raise CheckpointError(
                    f"{where}: {printable(key, 120)} holds {kind}, so every image would be black or noise. "
                    "The training that made it failed, or the file is damaged: fetch it again, or take an earlier one."
                )
            nonzero = nonzero or bool(low) or bool(high)
        if not (nonzero or _MAY_BE_ZERO.search(key) or tensor.any()):
            zeros.append(key)
    if zeros:
        first = ", ".join(printable(key, 120) for key in zeros[:3])
        logger.warning(
            "%s: %d tensors are all zero: %s. Is the file whole? Fetch it again.",
            printable(where),
            len(zeros),
            first + (f" and {len(zeros) - 3} more" if len(zeros) > 3 else ""),
        )


def _parts(tensor: Tensor, thorough: bool) -> Iterator[Tensor]:
    numbers = tensor.reshape(-1)
    if thorough or len(numbers) <= _SMALL:
        yield from (numbers[start : start + _CHUNK] for start in range(0, len(numbers), _CHUNK))
    else:
        middle = len(numbers) // 2
        yield from (numbers[:_WINDOW], numbers[middle : middle + _WINDOW], numbers[-_WINDOW:])
