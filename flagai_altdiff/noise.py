"""Random numbers of a call, from generators of its own: in FlagAI's order, or image by image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from flagai_altdiff.request import MAX_SEED, Batch, ResolvedRequest

Draw = Callable[[Sequence[int]], Tensor]
"""(C, h, w) -> standard normal (B, C, h, w)."""


class CallNoise:
    """Draws of one call.

    With ``seed_mode="batch"`` they are FlagAI's: one generator on the model's device, drawn from batch by batch. On the
    CPU its numbers are those of torch's global generator after ``torch.manual_seed``. With ``"per_image"`` each image
    has a generator on the CPU, so that its noise depends on its seed alone.

    Args:
        request: The request.
        shape: (C, h, w) of a latent.
        device: Where the noise is wanted.
    """

    def __init__(self, request: ResolvedRequest, shape: Sequence[int], device: torch.device) -> None:
        self._request, self._shape, self._device = request, tuple(shape), device
        self._generator = torch.Generator(device).manual_seed(request.seed)
        self._fixed = self._normal(request.batch_size, self._shape) if request.fixed_code else None

    def start(self, batch: Batch) -> tuple[Tensor, Draw]:
        """Start noise of a batch, (B, C, h, w), and what draws more; to be asked for in the order of the batches.

        What draws is given the shape (C, h, w) of the noise.
        """
        draw: Draw = partial(self._normal, len(batch))
        if self._request.seed_mode == "per_image":
            generators = [torch.Generator("cpu").manual_seed(self._request.seed_of(i)) for i in batch.indices]
            draw = partial(_rows, generators, self._device)
        first = draw(self._shape) if self._fixed is None else self._fixed[: len(batch)]
        return (self._variations(batch) if self._request.variation_strength else first), draw

    def _variations(self, batch: Batch) -> Tensor:
        """The noise of the request's seed, with some of another mixed in for each image."""
        request = self._request
        assert request.variation_seed is not None
        assert request.variation_strength is not None
        seeds = [(request.variation_seed + i) % (MAX_SEED + 1) for i in batch.indices]
        base = _rows([torch.Generator("cpu").manual_seed(request.seed)], self._device, self._shape)
        others = _rows([torch.Generator("cpu").manual_seed(seed) for seed in seeds], self._device, self._shape)
        return slerp(base.expand_as(others), others, request.variation_strength)

    def _normal(self, rows: int, shape: Sequence[int]) -> Tensor:
        return torch.randn(rows, *shape, generator=self._generator, device=self._device, dtype=torch.float32)


def _rows(generators: Sequence[torch.Generator], device: torch.device, shape: Sequence[int]) -> Tensor:
    rows = [torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32) for generator in generators]
    return torch.stack(rows).to(device)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From one noise to another along the sphere, row by row, so that it stays noise of the same strength.

    Args:
        a: (B, ...).
        b: (B, ...).
        share: 0 gives ``a``, 1 gives ``b``.
    """
    first, second = a.flatten(1), b.flatten(1)
    angle = torch.acos(F.cosine_similarity(first, second, dim=1).clamp(-1 + 1e-6, 1 - 1e-6))[:, None]
    mixed = (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)
    return mixed.view(a.shape)
