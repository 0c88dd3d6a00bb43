"""Convolutions and linear layers from weights that are laid out once, in the layout that oneDNN multiplies with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.checkpoint.mapped import let_go
from flagai_altdiff.engine.winograd import Filtering, LargeTiles, SmallTiles
from flagai_altdiff.models.quantized import kept

Layer = nn.Linear | nn.Conv2d
Laid = TypeVar("Laid")

_FEWEST_CHANNELS = 128
"""With fewer, minimal filtering does not pay."""
_WIDE_CHANNELS = 640
"""With more, kernels of the larger tile take too much memory: four times the plain ones."""
_NARROW_UPSAMPLE = 320
"""Up to so many channels, an enlarged map is convolved sooner at its small size than by minimal filtering."""
_FEW_CELLS, _NARROW_GROUP = 1024, 8
"""Maps with fewer cells and groups with fewer channels torch norms slowly where channels are together."""
_FEW_PRODUCTS = 1 << 22
"""Up to so many, a linear layer takes longer to be set up by oneDNN than by the library behind torch's own."""
_ALL = slice(None)


class _Weights:
    """Weights of layers, laid out when they are first asked for, and again when they have changed.

    Args:
        layers: Read only; the weights stay the model's. Those of several are one, below each other.
        rows: Which rows of the weights.
    """

    def __init__(self, *layers: Layer, rows: slice = _ALL) -> None:
        self._layers, self._rows = layers, rows
        self._laid_out: dict[Callable[[Tensor], Any], Any] = {}
        self._state: object = None
        self._lock = threading.Lock()

    def get(self, lay_out: Callable[[Tensor], Laid]) -> Laid:
        """As ``lay_out`` has made them of (K, ...)."""
        stored = [kept(layer) for layer in self._layers]
        state = [(tensor.data_ptr(), tensor._version, tensor.shape) for tensor in stored]
        with self._lock:
            if self._state != state:
                self._laid_out, self._state = {}, state
            if lay_out not in self._laid_out:
                weights = [layer.weight.detach() for layer in self._layers]
                whole = torch.cat(weights) if len(weights) > 1 else weights[0]
                self._laid_out[lay_out] = lay_out(whole[self._rows])
                for tensor in stored:
                    let_go(tensor)
            found: Laid = self._laid_out[lay_out]
            return found

    @property
    def bias(self) -> Tensor | None:
        """(K,), or ``None`` where the layers have none."""
        biases = [layer.bias for layer in self._layers if layer.bias is not None]
        if not biases:
            return None
        whole = torch.cat(biases) if len(biases) > 1 else biases[0]
        return whole if self._rows is _ALL else whole[self._rows]


class PackedConv:
    """A convolution.

    The way of computing depends on the size of its input alone, so that a result never depends on what ran before.

    Args:
        conv: The model's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv, self._weights = conv, _Weights(conv)
        self._form = _form_of(conv)
        self._channels = min(conv.in_channels, conv.out_channels)
        self._how: tuple[object, ...] = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def __call__(self, x: Tensor, shift: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), its channels together.

        Args:
            x: The map.
            shift: (K,), added to each channel beside the layer's own bias.
            plus: Of the same shape as the output; added to it.
        """
        bias = self._conv.bias
        if shift is not None:
            bias = shift if bias is None else bias + shift
        form = self._form
        if form is not None and self.is_filtered(x.shape[2], x.shape[3]):
            found = form.convolve(x, self._weights.get(form.transformed), bias)
            return found if plus is None else found.add_(plus)
        x, weight = x.contiguous(memory_format=torch.channels_last), self._weights.get(self._lay_out)
        pointwise = torch.ops.mkldnn._convolution_pointwise
        if plus is None:
            return pointwise(x, weight, bias, *self._how, "none", [], "")
        plus = plus.contiguous(memory_format=torch.channels_last)
        return pointwise.binary(x, plus, weight, bias, *self._how, "add", None, None, [], None)

    def is_filtered(self, height: int, width: int) -> bool:
        """Whether maps of this size are convolved by minimal filtering."""
        return self._form is not None and height * width * self._channels >= self._form.least

    def _lay_out(self, weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self._how)


class PackedUpsample:
    """A map twice as high and wide, each cell four times, and a 3x3 convolution of that: one of 2x2 of the map itself.

    In three rows of the large map there are two of the small one, so that each of a cell's four pixels has a kernel of
    2x2, whose weights are sums: 4/9 of the multiplications. With many channels minimal filtering has no more than that,
    and is laid out sooner.

    Args:
        conv: The model's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._weights, self._wide = _Weights(conv), conv.out_channels
        self._filtered = PackedConv(conv) if conv.out_channels > _NARROW_UPSAMPLE else None

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, 2 H, 2 W), its channels together."""
        count, _, height, width = x.shape
        if self._filtered and self._filtered.is_filtered(2 * height, 2 * width):
            return self._filtered(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        bias, weights = self._weights.bias, self._weights.get(_laid_out_for_pixels)
        x = x.contiguous(memory_format=torch.channels_last)
        bias = None if bias is None else bias.repeat(2)
        made = x.new_empty(count, height, 2, 2 * width * self._wide)
        for row, weight in enumerate(weights):
            found = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *_WINDOWS, "none", [], "")
            pixels = found.permute(0, 2, 3, 1).flatten(2)[:, row : row + height]
            made[:, :, row] = pixels[:, :, self._wide : -self._wide]
        return made.view(count, 2 * height, 2 * width, self._wide).permute(0, 3, 1, 2)


class PackedLinear:
    """A linear layer, or several that have the same input, as one.

    Args:
        layers: The model's; convolutions of 1x1 are linear layers of tokens.
        rows: Which of the outputs are wanted.
        activation: What is done to them: ``"none"`` or ``"gelu"``, the exact one.
    """

    def __init__(self, *layers: Layer, rows: slice = _ALL, activation: str = "none") -> None:
        self._weights, self._activation = _Weights(*layers, rows=rows), activation
        self._wide = len(range(*rows.indices(sum(map(_outputs, layers)))))

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., K), plus what is given, (..., K), where there is no activation."""
        assert plus is None or self._activation == "none"
        bias, x = self._weights.bias, x.contiguous()
        if x.numel() * self._wide <= _FEW_PRODUCTS:
            found = F.linear(x, self._weights.get(_as_it_is), bias)
            return F.gelu(found) if self._activation == "gelu" else found if plus is None else found.add_(plus)
        weight = self._weights.get(_laid_out)
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, self._activation, [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, plus, weight, bias, "add")

    def of_map(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W), its channels together."""
        return self(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _outputs(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _as_it_is(weight: Tensor) -> Tensor:
    return weight.flatten(1)


_WINDOWS = ((1, 1), (1, 1), (1, 1), 1)
"""Of 2x2, with a margin: padding, stride, dilation, groups."""
_ROWS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
"""(2, 2, 3): for each pixel of a cell, for each row of its window, the rows of the kernel that look at it."""


def _laid_out_for_pixels(weight: Tensor) -> list[Tensor]:
    """(K, C, 3, 3) -> for the upper and the lower pixels of cells, (2 K, C, 2, 2) as oneDNN has it.

    The right pixel of a cell comes before the left one of the next, which the window between them both gives.
    """
    kernels = torch.einsum("aur,bvs,kcrs->abkcuv", _ROWS, _ROWS.flip(0), weight).flatten(1, 2)
    return [torch.ops.mkldnn._reorder_convolution_weight(kernel, *_WINDOWS) for kernel in kernels]


def _laid_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1).contiguous(), None)


def _form_of(conv: nn.Conv2d) -> Filtering[Any] | None:
    """The way of minimal filtering that suits a convolution, if any does."""
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    widths = (conv.in_channels, conv.out_channels)
    if not plain or min(widths) < _FEWEST_CHANNELS:
        return None
    return _filtering(LargeTiles if max(widths) <= _WIDE_CHANNELS else SmallTiles)


@cache
def _filtering(kind: type[Filtering[Any]]) -> Filtering[Any]:
    """One for all convolutions."""
    return kind()


def normed(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """(N, C, H, W) -> the same normed in groups of channels, in whichever layout is quick."""
    _, channels, height, width = x.shape
    if height * width < _FEW_CELLS and channels // norm.num_groups < _NARROW_GROUP:
        x = x.contiguous()
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
