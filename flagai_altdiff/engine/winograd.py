"""3x3 convolutions of stride 1 by minimal filtering: a half to a quarter of the multiplications, as matrix products.

Tiles of the input are transformed, multiplied with transformed weights place by place, and transformed back.

**Source**: Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016 (arXiv 1509.09308). The points
of the larger tile are chosen for small errors: about those of a plain convolution in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL = 3
CHUNK_BYTES = 24 << 20
"""Of transformed input at once: what stays near the processor."""
Kernels = TypeVar("Kernels", Tensor, list[Tensor])
"""(K, C) for each of a² places."""


class Filtering(ABC, Generic[Kernels]):
    """How tiles of m x m outputs come from tiles of a x a inputs, a = m + 2; everything float32.

    Attributes:
        least: Pixels times channels from which it pays.
    """

    least: int
    _points: tuple[float, ...]
    """Where the polynomials of a tile are evaluated, beside infinity."""

    def __init__(self) -> None:
        self._side = len(self._points) + 1
        self._tile = self._side - _KERNEL + 1
        self._weights = _of_both_axes(_powers(self._points, _KERNEL) / _distances(self._points)).T.contiguous()

    @abstractmethod
    def transformed(self, weight: Tensor) -> Kernels:
        """Kernels (K, C, 3, 3) as :meth:`convolve` multiplies with them."""

    def convolve(self, x: Tensor, weight: Kernels, bias: Tensor | None) -> Tensor:
        """A 3x3 convolution of stride 1 with a margin of one zero.

        Args:
            x: (N, C, H, W); fastest if its channels lie together.
            weight: From :meth:`transformed`.
            bias: (K,).

        Returns:
            (N, K, H, W), its channels together.
        """
        (count, channels, height, width), tile = x.shape, self._tile
        down, along = -(-height // tile), -(-width // tile)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, along * tile + 1 - width, 1, down * tile + 1 - height))
        found = x.new_empty(count, down, tile, along, tile, len(weight[0]))
        rows = max(1, CHUNK_BYTES // (self._side**2 * count * along * channels * x.element_size()))
        for first in range(0, down, rows):
            last = min(first + rows, down)
            here = padded[:, first * tile : last * tile + _KERNEL - 1]
            self._convolve(here, weight, bias, found[:, first:last])
        return found.view(count, down * tile, along * tile, -1)[:, :height, :width].permute(0, 3, 1, 2)

    @abstractmethod
    def _convolve(self, x: Tensor, weight: Kernels, bias: Tensor | None, out: Tensor) -> None:
        """Of (N, m down + 2, m along + 2, C), into (N, down, m, along, m, K)."""


class LargeTiles(Filtering[Tensor]):
    """Of 4x4 outputs, all places multiplied at once: a quarter of the multiplications, four times the weights."""

    least = 128 * 16 * 16
    _points = (0, 1, -1, 0.5, -2)

    def __init__(self) -> None:
        super().__init__()
        self._inputs = _of_both_axes(_polynomials(self._points)).T.contiguous()
        self._outputs = _of_both_axes(_powers(self._points, self._tile))

    def transformed(self, weight: Tensor) -> Tensor:
        """Kernels (K, C, 3, 3) -> (a², K, C)."""
        return (self._weights @ weight.reshape(-1, _KERNEL**2).T).view(-1, *weight.shape[:2])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        (count, down, tile, along, _, wide), side, channels = out.shape, self._side, x.shape[-1]
        image, row, column, _ = x.stride()
        tiles = x.as_strided(
            (count, down, along, side, side, channels), (image, row * tile, column * tile, row, column, 1)
        )
        given = torch.matmul(self._inputs, tiles.reshape(-1, side**2, channels))
        products = torch.bmm(given.transpose(0, 1), weight.transpose(1, 2))
        made = (self._outputs @ products.flatten(1)).view(tile, tile, count, down, along, wide)
        made = made.permute(2, 3, 0, 4, 1, 5)
        if bias is None:
            out.copy_(made)
        else:
            torch.add(made, bias, out=out)


class SmallTiles(Filtering[list[Tensor]]):
    """Of 2x2 outputs: 4/9 of the multiplications, 16/9 of the weights.

    The points are 0 and units, so that what comes before and after the products is sums of a few maps. With wide layers
    there are few rows for many weights, which oneDNN multiplies fastest from a layout of its own.
    """

    least = 1280 * 4 * 4
    _points = (0, 1, -1)

    def transformed(self, weight: Tensor) -> list[Tensor]:
        """Kernels (K, C, 3, 3) as oneDNN has them, a few at once for the sake of memory."""
        flat = weight.reshape(-1, _KERNEL**2).T
        return [
            torch.ops.mkldnn._reorder_linear_weight(kernel.view(weight.shape[:2]), None)
            for few in self._weights.view(self._side, self._side, -1)
            for kernel in few @ flat
        ]

    def _convolve(self, x: Tensor, weight: list[Tensor], bias: Tensor | None, out: Tensor) -> None:
        (count, down, _, along, _, wide), side, channels = out.shape, self._side, x.shape[-1]
        rows = x.new_empty(side, count, down, x.shape[2], channels)
        given = x.new_empty(side, side, count, down, along, channels)
        _evaluate(x, 1, rows)
        _evaluate(rows, 3, given.transpose(0, 1))
        products = [
            # What is added where both points are 1 is added to every output.
            torch.ops.mkldnn._linear_pointwise(part, kernel, bias if place == side + 1 else None, "none", [], "")
            for place, (part, kernel) in enumerate(zip(given.view(side**2, -1, channels), weight, strict=True))
        ]
        for column in range(side):
            _interpolate(products[column::side], products[column], products[column + side])
        for row in range(self._tile):
            _interpolate(
                [part.view(count, down, along, wide) for part in products[row * side : (row + 1) * side]],
                *out[:, :, row].unbind(3),
            )


def _evaluate(x: Tensor, axis: int, out: Tensor) -> None:
    """At the points of the small tile, along an axis of 2 n + 2, into (4, ..., n, ...)."""
    last = x.shape[axis] - 3
    a, b, c, d = (x[(slice(None),) * axis + (slice(first, first + last, 2),)] for first in range(4))
    torch.sub(c, a, out=out[0])
    torch.add(b, c, out=out[1])
    torch.sub(c, b, out=out[2])
    torch.sub(d, b, out=out[3])


def _interpolate(products: Sequence[Tensor], first: Tensor, second: Tensor) -> None:
    """Both outputs of the small tile from four products, which are used up."""
    a, b, c, d = products
    torch.add(a.add_(b), c, out=first)
    torch.add(b.sub_(c), d, out=second)


def _powers(points: Sequence[float], count: int) -> Tensor:
    """(count, a) float64: of each point from the zeroth, and of infinity, where only the highest counts."""
    finite = torch.tensor(points, dtype=torch.float64) ** torch.arange(count)[:, None]
    return torch.cat([finite, torch.eye(count, dtype=torch.float64)[:, -1:]], dim=1)


def _distances(points: Sequence[float]) -> Tensor:
    """(a,): the product of each point's distances from the others, 1 for infinity."""
    return torch.tensor([*(prod(p - q for q in points if q != p) for p in points), 1.0], dtype=torch.float64)


def _polynomials(points: Sequence[float]) -> Tensor:
    """(a, a): coefficients, the constant one first, of what is zero at all points but each, and but infinity."""
    found = [_polynomial([q for q in points if q != p]) for p in points]
    return torch.stack([*(F.pad(coefficients, (0, 1)) for coefficients in found), _polynomial(points)], dim=1)


def _polynomial(roots: Sequence[float]) -> Tensor:
    """Coefficients of the product of (x - root), the constant one first, (roots + 1,) float64."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        found = F.pad(found, (1, 0)) - root * F.pad(found, (0, 1))
    return found


def _of_both_axes(matrix: Tensor) -> Tensor:
    """Of one axis -> of both, row by row, in float32."""
    return torch.kron(matrix, matrix).float()
