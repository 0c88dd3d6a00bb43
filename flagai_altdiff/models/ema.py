"""Exponential moving average of a module's parameters, with LDM's names.

**Source**: Rombach et al. 2022; buffers are the parameter names without their dots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat

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
        self._aside: list[tuple[nn.Parameter, Tensor]] | None = None
        parameters = dict(model.named_parameters())
        for name, buffer in self._names.items():
            self.register_buffer(buffer, parameters[name].detach().clone())

    def forward(self, model: nn.Module) -> None:
        """Move the copies towards the parameters of ``model``."""
        self.follow(dict(model.named_parameters()))

    @torch.no_grad()
    def follow(self, parameters: Mapping[str, Tensor]) -> None:
        """The same, for who has the parameters by their names at hand."""
        self._put_back(self._aside)
        self.num_updates += 1
        n = int(self.num_updates)
        weight = 1.0 - min(float(self.decay), (1 + n) / (10 + n))
        copies = [self.get_buffer(buffer) for buffer in self._names.values()]
        torch._foreach_lerp_(copies, [parameters[name].detach() for name in self._names], weight)

    def copies(self) -> dict[str, Tensor]:
        """The copies by the names of their parameters."""
        return {name: self.get_buffer(buffer) for name, buffer in self._names.items()}

    def take(self, copies: Mapping[str, Tensor]) -> None:
        """Have other tensors as the copies, under the names of their parameters."""
        for name, copy in copies.items():
            self.register_buffer(self._names[name], copy)

    @contextmanager
    def in_place_of_parameters(self, model: nn.Module) -> Iterator[None]:
        """Run the block with the copies as the parameters of ``model``, which are themselves again after it.

        Nothing is copied: a parameter refers to other numbers meanwhile. However often a signal interrupts it, the
        parameters are all the averaged or all the trained ones. Where an interruption left the averaged ones, the next
        step of the training puts the trained ones back.

        Args:
            model: The module that is followed.
        """
        if self._aside is not None:  # a block within a block
            yield
            return
        parameters = dict(model.named_parameters())
        followed = [parameters[name] for name in self._names]
        aside = self._aside = [(parameter, parameter.data) for parameter in followed]
        try:
            try:
                _refer(followed, [self.get_buffer(buffer) for buffer in self._names.values()])
                yield
            finally:
                self._put_back(aside)
        finally:
            self._put_back(aside)  # an interruption may have come before the first of the two

    def _put_back(self, aside: list[tuple[nn.Parameter, Tensor]] | None) -> None:
        """Let the parameters be the trained ones that were set aside, unless somebody has seen to it."""
        if aside is not None and aside is self._aside:
            _refer([parameter for parameter, _ in aside], [trained for _, trained in aside])
            self._aside = None

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the copies in the place of the parameters of ``model``, for good."""
        parameters = dict(model.named_parameters())
        for name, buffer in self._names.items():
            parameters[name].copy_(self.get_buffer(buffer))


def _refer(parameters: Sequence[nn.Parameter], numbers: Sequence[Tensor]) -> None:
    """Let parameters be other numbers, on the device and in the precision that they have, all at once.

    A signal's exception comes between two steps of Python, and the last line is one.
    """
    fitting = [number.to(parameter) for parameter, number in zip(parameters, numbers, strict=True)]
    deque(map(setattr, parameters, repeat("data"), fitting), maxlen=0)
