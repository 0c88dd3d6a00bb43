"""A model whose images go on at the opposite edge: its convolutions look there, and not beyond the edge."""

from __future__ import annotations

import copy
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.models import LatentDiffusion

_PARTS = ("model", "first_stage_model")
"""What has convolutions."""


def seamless(model: LatentDiffusion, axes: str) -> LatentDiffusion:
    """The model with circular convolutions; it shares all weights with the given one, which stays as it is.

    Args:
        model: The model.
        axes: ``"x"``, ``"y"`` or ``"xy"``.
    """
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for name in _PARTS:
        part = model.get_submodule(name)
        shared = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        twin._modules[name] = own = copy.deepcopy(part, shared)
        for module in own.modules():
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
