"""The interface between the pipeline and whatever runs a model."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.sampling.schedule import Schedule


class Engine(Protocol):
    """Runs the three parts of a model. All it takes and gives is float32, whatever precision it computes in."""

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs are."""
        ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """(T,), signal power by timestep, in full precision."""
        ...

    @property
    def parameterization(self) -> str:
        """What :meth:`denoise` gives: ``"eps"``, ``"v"`` or ``"x0"``."""
        ...

    def schedule(self, steps: int, grid: str = "flagai") -> Schedule:
        """The walk from noise to image in about so many steps, along one of ``sampling.GRIDS``."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent, from its size in px."""
        ...

    @property
    def cell(self) -> int:
        """Pixels along a side of a latent cell."""
        ...

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) token ids -> text states (B, L, D)."""
        ...

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """Noisy latents (B, C, h, w), timesteps (B,), text states (n B, L, D) -> eps, v or x0 (n B, C, h, w).

        All latents are seen with the first B states, then with the next B: both halves of guidance, for example. With
        shortcuts, some of the work is left out, and the output is another.
        """
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), without noise."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W), about [-1, 1], all finite.

        Raises:
            NotFiniteError: The decoder gives values that are no numbers, in float32 too.
        """
        ...
