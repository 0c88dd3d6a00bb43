"""A model whose images go on at the opposite edge: its convolutions look there, and not beyond the edge."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.engine.twins import drawing_modules, twin_of
from flagai_altdiff.models import LatentDiffusion


def seamless(model: LatentDiffusion, axes: str) -> LatentDiffusion:
    """The model with circular convolutions; it shares all weights with the given one, which stays as it is.

    Args:
        model: The model.
        axes: ``"x"``, ``"y"`` or ``"xy"``.
    """
    twin = twin_of(model)
    for module in drawing_modules(twin):
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            module.forward = partial(_circular, module, axes)  # type: ignore[method-assign]
    return twin


def _circular(conv: nn.Conv2d, axes: str, x: Tensor) -> Tensor:
    """A convolution whose padding comes from the opposite side along some axes."""
    assert not isinstance(conv.padding, str)
    down, along = conv.padding
    for axis, margins in (("x", (along, along, 0, 0)), ("y", (0, 0, down, down))):
        x = F.pad(x, margins, mode="circular" if axis in axes else "constant")
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
