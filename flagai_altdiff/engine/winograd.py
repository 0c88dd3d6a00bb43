"""3x3 convolutions of stride 1 by minimal filtering: a half to a quarter of the multiplications, as matrix products.

Tiles of the input are transformed, multiplied with transformed weights place by place, and transformed back. All three
are products of dense matrices, which is what a processor does best.

**Source**: Winograd 1980, "Arithmetic complexity of computations"; Lavin and Gray 2016 (arXiv 1509.09308). The points
of the larger tile are chosen for small errors: about those of a plain convolution in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL = 3
_POINTS: dict[int, tuple[float, ...]] = {2: (0, 1, -1), 4: (0, 1, -1, 0.5, -2)}
"""Side of a tile of the output -> where its polynomials are evaluated, beside infinity."""
CHUNK_BYTES = 16 << 20
"""Of transformed input at once: what stays near the processor."""


@dataclass(frozen=True, eq=False)
class Filtering:
    """How tiles of m x m outputs come from tiles of a x a inputs, a = m + 2; everything float32.

    Attributes:
        tile: m.
        inputs: (a², a²), input tiles -> what is multiplied.
        weights: (a², 9), kernels -> what it is multiplied with.
        outputs: (m², a²), products -> output tiles.
    """

    tile: int
    inputs: Tensor
    weights: Tensor
    outputs: Tensor

    @property
    def side(self) -> int:
        """Side of an input tile."""
        return self.tile + _KERNEL - 1

    def transformed(self, weight: Tensor) -> Tensor:
        """Kernels (K, C, 3, 3) -> (a², K, C)."""
        return (self.weights @ weight.reshape(-1, _KERNEL**2).T).view(-1, *weight.shape[:2])


@cache
def filtering(tile: int) -> Filtering:
    """The matrices of a tile's side, a key of ``_POINTS``."""
    points = _POINTS[tile]
    side = len(points) + 1
    outputs, weights, inputs = (torch.zeros(n, side, dtype=torch.float64) for n in (tile, _KERNEL, side))
    for column, point in enumerate(points):
        others = points[:column] + points[column + 1 :]
        powers = torch.tensor([float(point) ** n for n in range(side)], dtype=torch.float64)
        outputs[:, column] = powers[:tile]
        weights[:, column] = powers[:_KERNEL] / torch.tensor([point - other for other in others]).double().prod()
        inputs[: side - 1, column] = _polynomial(others)
    outputs[-1, -1] = weights[-1, -1] = 1
    inputs[:, -1] = _polynomial(points)
    return Filtering(
        tile, *(torch.kron(m, m).float() for m in (inputs.T.contiguous(), weights.T.contiguous(), outputs))
    )


def _polynomial(roots: Sequence[float]) -> Tensor:
    """Coefficients of the product of (x - root), the constant one first, (roots + 1,) float64."""
    found = torch.ones(1, dtype=torch.float64)
    for root in roots:
        found = F.pad(found, (1, 0)) - root * F.pad(found, (0, 1))
    return found


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, form: Filtering) -> Tensor:
    """A 3x3 convolution of stride 1 with a margin of one zero.

    Args:
        x: (N, C, H, W); fastest if its channels lie together.
        weight: (a², K, C), from :meth:`Filtering.transformed`.
        bias: (K,).
        form: The same one.

    Returns:
        (N, K, H, W), its channels together.
    """
    (count, channels, height, width), tile, side = x.shape, form.tile, form.side
    filters, wide = weight.transpose(1, 2), weight.shape[1]
    down, along = -(-height // tile), -(-width // tile)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, along * tile + 1 - width, 1, down * tile + 1 - height))
    image, row, column, _ = padded.stride()
    found = x.new_empty(count, down * tile, along * tile, wide)
    rows = max(1, CHUNK_BYTES // (side * side * count * along * channels * x.element_size()))
    for first in range(0, down, rows):
        here = min(rows, down - first)
        tiles = padded[:, first * tile :].as_strided(
            (count, here, along, side, side, channels), (image, row * tile, column * tile, row, column, 1)
        )
        given = torch.matmul(form.inputs, tiles.reshape(-1, side * side, channels))
        # oneDNN's grouped convolution is up to a fifth faster here, without AVX-512 seven times slower at some sizes.
        products = torch.bmm(given.transpose(0, 1), filters)
        made = (form.outputs @ products.flatten(1)).view(tile, tile, count, here, along, wide).permute(2, 3, 0, 4, 1, 5)
        place = found[:, first * tile : (first + here) * tile].view(count, here, tile, along, tile, wide)
        if bias is None:
            place.copy_(made)
        else:
            torch.add(made, bias, out=place)
    return found[:, :height, :width].permute(0, 3, 1, 2)
