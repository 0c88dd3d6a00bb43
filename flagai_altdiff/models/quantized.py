"""Layers whose weights are kept in 8 or 4 bits, and unfolded when they are used: less memory, not less time.

A weight is cut into groups, each with a lowest number and a step: ``low + step * code``. With 8 bits a group is all
that makes one output of a layer, with 4 bits it is 64 numbers of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Precision:
    """How a weight is kept.

    Args:
        bits: Of a code, 8 or 4.
        group: Numbers of a group; 0 is a whole row.
        scales: What a group's lowest number and step are kept as.
    """

    bits: int
    group: int
    scales: torch.dtype


PRECISIONS = {"int8": Precision(8, 0, torch.float32), "int4": Precision(4, 64, torch.bfloat16)}
_AT_ONCE = 1 << 24
"""Numbers of a weight that are turned into codes together."""
_THIN = 16
"""Weights with fewer inputs or outputs stay as they are: the first and last layers, whose errors are seen most."""


def _folded(rows: Tensor, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, groups, bytes) of rows (out, n), and lowest numbers and steps of their groups, (out, groups, 1)."""
    size = precision.group or rows.shape[1]
    groups = F.pad(rows, (0, -rows.shape[1] % size)).view(len(rows), -1, size)
    lows, highs = (ends.to(precision.scales) for ends in groups.aminmax(dim=2, keepdim=True))
    most = 2**precision.bits - 1
    steps = ((highs.float() - lows.float()) / most).clamp(min=torch.finfo(torch.float32).tiny).to(precision.scales)
    codes = (groups - lows.float()).div_(steps.float()).round_().clamp_(0, most).to(torch.uint8)
    if precision.bits == 4:  # the first half of a group in the lower bits
        codes = codes[..., : size // 2] | codes[..., size // 2 :] << 4
    return codes, lows, steps


class Quantized(nn.Module):
    """What these layers have in common: ``weight`` is no parameter, but made of codes whenever it is asked for."""

    codes: Tensor
    lows: Tensor
    steps: Tensor
    like: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight in its usual shape, of the precision that the layer computes in."""
        return self._unfolded(self.codes, self.lows, self.steps).view(self._shape)

    def fold(self, precision: Precision) -> None:
        """Take the parameter's place."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self._shape, self._bits = weight.shape, precision.bits
        rows = weight.detach().flatten(1)
        parts = [_folded(some, precision) for some in torch.split(rows, max(1, _AT_ONCE // rows.shape[1]))]  # type: ignore[no-untyped-call]
        kept = [torch.cat(some) for some in zip(*parts, strict=True)]
        for name, value in zip(("codes", "lows", "steps"), kept, strict=True):
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("like", rows.new_empty(0), persistent=False)

    def _unfolded(self, codes: Tensor, lows: Tensor, steps: Tensor) -> Tensor:
        """Codes (..., groups, bytes) -> rows of numbers (..., n)."""
        if self._bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        dtype, count = self.like.dtype, self._shape[1:].numel()
        return torch.addcmul(lows.to(dtype), codes.to(dtype), steps.to(dtype)).flatten(-2)[..., :count]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = self.weight


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[misc, override]
    """A linear layer."""


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[misc, override]
    """A convolution."""


class QuantizedEmbedding(Quantized, nn.Embedding):  # type: ignore[misc, override]
    """A table, of which only the rows are unfolded that are looked up."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        return self._unfolded(self.codes[ids], self.lows[ids], self.steps[ids])


_FORMS: dict[type[nn.Module], type[Quantized]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    nn.Embedding: QuantizedEmbedding,
}


def fold(module: nn.Module, precision: Precision) -> bool:
    """Keep a layer's weight in fewer bits; it becomes another kind of layer, in its place.

    Args:
        module: Changed in place, if there is such a layer for it and its weight is not thin.
        precision: How it is kept.

    Returns:
        Whether it was changed.
    """
    form = next((form for kind, form in _FORMS.items() if isinstance(module, kind)), None)
    weight = module._parameters.get("weight")
    if form is None or weight is None or min(weight.shape[:2]) < _THIN:
        return False
    module.__class__ = form
    assert isinstance(module, Quantized)
    module.fold(precision)
    return True


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has such layers."""
    return any(isinstance(module, Quantized) for module in model.modules())


def kept(module: nn.Linear | nn.Conv2d) -> Tensor:
    """What a layer keeps of its weight: its codes, or the weight."""
    return module.codes if isinstance(module, Quantized) else module.weight
