"""Random numbers of a call, from generators of its own: in FlagAI's order, or image by image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flagai_altdiff.request import Batch, ResolvedRequest
from flagai_altdiff.sampling import NoiseFunction


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
        self._fixed = self._normal(request.batch_size) if request.fixed_code else None

    def start(self, batch: Batch) -> tuple[Tensor, NoiseFunction]:
        """Start noise of a batch, (B, C, h, w), and what draws more; to be asked for in the order of the batches."""
        draw: NoiseFunction = partial(self._normal, len(batch))
        if self._request.seed_mode == "per_image":
            generators = [torch.Generator("cpu").manual_seed(self._request.seed_of(i)) for i in batch.indices]
            draw = partial(_rows, generators, self._shape, self._device)
        return (draw() if self._fixed is None else self._fixed[: len(batch)]), draw

    def _normal(self, rows: int) -> Tensor:
        return torch.randn(rows, *self._shape, generator=self._generator, device=self._device, dtype=torch.float32)


def _rows(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device) -> Tensor:
    rows = [torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32) for generator in generators]
    return torch.stack(rows).to(device)
