"""Pictures of any length: overlapping windows, each as large as the model is good at, joined at every step.

**Source**: Bar-Tal et al. 2023, MultiDiffusion (arXiv 2302.08113), equation 5 with equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Window:
    """A part of a latent, in its cells; it may go over the edge, to the other side.

    Args:
        top: First row.
        left: First column.
        height: Rows.
        width: Columns.
    """

    top: int
    left: int
    height: int
    width: int

    def times(self, factor: int) -> Window:
        """The same part where each cell has become so many pixels a side."""
        return Window(
            top=self.top * factor, left=self.left * factor, height=self.height * factor, width=self.width * factor
        )

    def cut(self, x: Tensor) -> Tensor:
        """This part of (B, C, h, w)."""
        rows = _indices(self.top, self.height, x.shape[2], x)
        columns = _indices(self.left, self.width, x.shape[3], x)
        return x[:, :, rows][..., columns]

    def add(self, part: Tensor, total: Tensor) -> None:
        """Add (B, C, height, width) to a whole latent, in place."""
        rows = _indices(self.top, self.height, total.shape[2], total)
        columns = _indices(self.left, self.width, total.shape[3], total)
        total[:, :, rows[:, None], columns] += part


def _indices(first: int, count: int, length: int, like: Tensor) -> Tensor:
    import torch

    return torch.arange(first, first + count, device=like.device) % length


def window_starts(length: int, window: int, stride: int, *, wraps: bool) -> list[int]:
    """Where windows begin along a side: every ``stride`` cells, the last one at the end.

    Args:
        length: Of the side, in cells.
        window: Of a window.
        stride: Cells between two of them.
        wraps: Whether the end goes on at the beginning: then there is no last one, and at least two.
    """
    if wraps:
        count = max(-(-length // stride), 2)
        return [round(k * length / count) for k in range(count)]
    if window >= length:
        return [0]
    return [*range(0, length - window, stride), length - window]


def make_windows(
    shape: Sequence[int], window: int, stride: int, *, wraps_y: bool = False, wraps_x: bool = False
) -> list[Window]:
    """Windows that cover a latent.

    Args:
        shape: (h, w) of the latent.
        window: Side of a window, in cells.
        stride: Cells between two windows.
        wraps_y: Whether the lower edge goes on at the upper one.
        wraps_x: Whether the right edge goes on at the left one.
    """
    size = {"height": min(window, shape[0]), "width": min(window, shape[1])}
    tops, lefts = _starts(shape, window, stride, wraps_y, wraps_x)
    return [Window(top=top, left=left, **size) for top in tops for left in lefts]


def cells_in_windows(
    shape: Sequence[int], window: int, stride: int, *, wraps_y: bool = False, wraps_x: bool = False
) -> int:
    """Cells of all windows together, which may be millions; arguments as of :func:`make_windows`."""
    tops, lefts = _starts(shape, window, stride, wraps_y, wraps_x)
    return len(tops) * len(lefts) * min(window, shape[0]) * min(window, shape[1])


def _starts(
    shape: Sequence[int], window: int, stride: int, wraps_y: bool, wraps_x: bool
) -> tuple[list[int], list[int]]:
    height, width = shape
    return window_starts(height, window, stride, wraps=wraps_y), window_starts(width, window, stride, wraps=wraps_x)


def joined(predict: Callable[[Window], EpsFunction], windows: Sequence[Window]) -> EpsFunction:
    """The noise prediction for a whole latent: in each cell the mean of those of the windows that it lies in.

    Args:
        predict: Window -> the model's prediction for what lies in it.
        windows: They cover the latent.
    """
    import torch

    parts = [(window, predict(window)) for window in windows]

    def eps(x: Tensor, t: float) -> Tensor:
        total, count = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for window, part in parts:
            window.add(part(window.cut(x), t), total)
            window.add(torch.ones_like(window.cut(count)), count)
        return total / count

    return eps
