"""An optimizer whose steps on matrices have no preferred direction: far fewer samples than AdamW for small networks.

**Source**: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale of its steps: Liu et al. 2025
(arXiv 2502.16982), by which a learning rate and a weight decay of AdamW hold for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_LIKE_ADAMW = 0.2
"""Root mean square of AdamW's steps, in learning rates."""
_LEAST = 8
"""Weights with fewer rows or columns are no matrices worth the name."""


class Muon(Optimizer):
    """Muon for matrices, and for convolutions as matrices of their filters; AdamW for all else.

    Args:
        parameters: What learns.
        lr: Of both.
        momentum: Muon's, Nesterov's kind.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Of both, decoupled.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; what has no gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._matrix_update if is_matrix(parameter) else self._other_update
                parameter.add_(update(parameter, parameter.grad, group), alpha=-group["lr"])
        return loss

    def _matrix_update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale = _LIKE_ADAMW * math.sqrt(max(direction.shape))
        return orthogonal(direction).mul_(scale).view(parameter.shape)

    def _other_update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        steps = int(state["step"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].lerp_(gradient.square(), 1 - beta2)
        root = state["square"].sqrt().div_(math.sqrt(1 - beta2**steps)).add_(group["eps"])
        return state["mean"].div(root).div_(1 - beta1**steps)


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon moves it: a matrix, or a convolution's filters."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) >= _LEAST


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and all singular values near 1 (a polynomial of Newton and Schulz)."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
