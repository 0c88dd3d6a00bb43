"""An image as training sees it: a square of a given side, normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Crop to the shorter side, resize, normalise.

    Args:
        side: Of the result, in px.
        crop: Where the square is cut out of the image.
        flip: Whether every second image is mirrored, by chance. Texts with left and right in them become wrong.
    """

    side: int
    crop: Literal["random", "centre"] = "random"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.side < 1:
            raise InvalidRequestError("side", self.side, "expected 1 px or more")
        if self.crop not in ("random", "centre"):
            raise InvalidRequestError("crop", self.crop, "expected 'random' or 'centre'")

    def __call__(self, image: Image.Image, chance: torch.Generator) -> Tensor:
        """An RGB image -> (3, side, side), float32 in [-1, 1]; arguments as of :meth:`cut`."""
        return normalised(self.cut(image, chance))

    def cut(self, image: Image.Image, chance: torch.Generator) -> Tensor:
        """An RGB image -> (3, side, side), bytes.

        Args:
            image: Of any size.
            chance: Three numbers are drawn from it, whatever is set.
        """
        shift_x, shift_y, mirror = torch.rand(3, generator=chance, dtype=torch.float64).tolist()
        if self.crop == "centre":
            shift_x = shift_y = 0.5
        square = min(image.size)
        left, top = int(shift_x * (image.width - square + 1)), int(shift_y * (image.height - square + 1))
        box = (left, top, left + square, top + square)
        small = image.resize((self.side, self.side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
        if self.flip and mirror < 0.5:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).contiguous()


def normalised(pixels: Tensor) -> Tensor:
    """Bytes -> float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
