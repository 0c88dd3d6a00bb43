"""Exponential moving average of a module's parameters, with LDM's names.

**Source**: Rombach et al. 2022; buffers are the parameter names without their dots.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class LitEma(nn.Module):
    """Keeps a slowly following copy of every trainable parameter of ``model``.

    Args:
        model: The module to follow.
        decay: Upper limit of the decay; the first steps follow faster, min(decay, (1 + n) / (10 + n)).
    """

    decay: Tensor
    num_updates: Tensor

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self._names = {name: name.replace(".", "") for name, p in model.named_parameters() if p.requires_grad}
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        parameters = dict(model.named_parameters())
        for name, buffer in self._names.items():
            self.register_buffer(buffer, parameters[name].detach().clone())

    def forward(self, model: nn.Module) -> None:
        """Move the copies towards the parameters of ``model``."""
        self.follow(dict(model.named_parameters()))

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """The same, for who has the parameters by their names at hand."""
        self.num_updates += 1
        n = int(self.num_updates)
        weight = 1.0 - min(float(self.decay), (1 + n) / (10 + n))
        copies = [self.get_buffer(buffer) for buffer in self._names.values()]
        torch._foreach_lerp_(copies, [parameters[name].detach() for name in self._names], weight)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the copies with the parameters of ``model``; twice is the identity."""
        parameters = dict(model.named_parameters())
        for name, buffer in self._names.items():
            copy = self.get_buffer(buffer).clone()
            self.get_buffer(buffer).copy_(parameters[name])
            parameters[name].copy_(copy)
