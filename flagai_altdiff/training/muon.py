"""An optimizer whose steps on matrices have no preferred direction: far fewer samples than AdamW for small networks.

**Source**: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; the scale of its steps: Liu et al. 2025
(arXiv 2502.16982), by which a learning rate and a weight decay of AdamW hold for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
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
        matrices: What learns by Muon; see :func:`matrices_of`.
        others: What learns by AdamW.
        lr: Of both.
        momentum: Muon's, Nesterov's kind.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Of both, decoupled.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        groups = [{"params": list(matrices), "by_muon": True}, {"params": list(others), "by_muon": False}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; what has no gradient stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [parameter for parameter in group["params"] if parameter.grad is not None]
            by_muon = group["by_muon"]
            updates = self._matrix_updates(moved, group) if by_muon else [self._other_update(p, group) for p in moved]
            for parameter, update in zip(moved, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
        return loss

    def _matrix_updates(self, parameters: Sequence[nn.Parameter], group: dict[str, Any]) -> list[Tensor]:
        directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
        return [
            unit.mul_(_LIKE_ADAMW * math.sqrt(max(unit.shape))).view(parameter.shape)
            for unit, parameter in zip(_all_orthogonal(directions), parameters, strict=True)
        ]

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(state["momentum"], momentum).flatten(1)

    def _other_update(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        gradient, state, (beta1, beta2) = parameter.grad, self.state[parameter], group["betas"]
        assert gradient is not None
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        state["step"] += 1
        steps = int(state["step"])
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].lerp_(gradient.square(), 1 - beta2)
        root = state["square"].sqrt().div_(math.sqrt(1 - beta2**steps)).add_(group["eps"])
        return state["mean"].div(root).div_(1 - beta1**steps)


def matrices_of(model: nn.Module) -> set[str]:
    """Names of the weights that Muon is for: matrices and convolutions' filters, but no embeddings."""
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    found = {n for n, p in model.named_parameters() if p.ndim > 1 and min(p.flatten(1).shape) >= _LEAST}
    return found - tables


def _all_orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each of them by one of the processes, which all have the same ones, and then give each other what they made."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [orthogonal(matrix) for matrix in matrices]
    largest_first = sorted(range(len(matrices)), key=lambda i: -matrices[i].numel())
    own = set(largest_first[dist.get_rank() :: dist.get_world_size()])
    parts = [orthogonal(m).flatten() if i in own else m.new_zeros(m.numel()) for i, m in enumerate(matrices)]
    together = torch.cat(parts)
    dist.all_reduce(together)
    cut = torch.split(together, [matrix.numel() for matrix in matrices])  # type: ignore[no-untyped-call]
    return [part.view_as(matrix) for part, matrix in zip(cut, matrices, strict=True)]


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the same singular vectors and all singular values near 1 (a polynomial of Newton and Schulz).

    It is computed in bfloat16, whose errors are smaller than those of the polynomial, in half the time.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + torch.addmm(square, square, square, beta=b, alpha=c) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
