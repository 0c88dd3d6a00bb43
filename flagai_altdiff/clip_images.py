"""CLIP's preparation of an image, as the matching models and the safety checker look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Pixels = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
"""(3, size, size)."""
_LONGEST = 512
"""How many times longer than wide an image may be; of a longer one the middle is seen, or it would fill the memory."""


@dataclass(frozen=True, kw_only=True)
class ClipImageTransform:
    """Shorter side to ``size``, centre crop, normalised.

    Args:
        size: Side of the result, in pixels.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel.
        shorter: Length of the shorter side before the crop, if it is not ``size``.
    """

    size: int = 224
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    shorter: int | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        """Any PIL image -> (3, size, size), float32."""
        return torch.from_numpy(self.pixels(image))

    def normalised(self, images: Tensor) -> Tensor:
        """Square images of the right size as training has them, (B, 3, size, size) in [-1, 1], as CLIP has them."""
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return ((images + 1) / 2 - mean) / std

    def pixels(self, image: Image.Image) -> Pixels:
        """The same as an array."""
        image = image.convert("RGB")
        shorter = min(image.size)
        spare_x, spare_y = (max(0, side - _LONGEST * shorter) // 2 for side in image.size)
        image = image.crop((spare_x, spare_y, image.width - spare_x, image.height - spare_y))
        width, height = ((self.shorter or self.size) * side // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        values = np.asarray(image.crop((left, top, left + self.size, top + self.size)), dtype=np.float32) / 255.0
        normalised = (values - np.asarray(self.mean, dtype=np.float32)) / np.asarray(self.std, dtype=np.float32)
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


class PixelValues(dict[str, Any]):
    """What :class:`MatchingTransform` gives: a mapping with ``pixel_values``, which is an attribute as well."""

    @property
    def pixel_values(self) -> list[Pixels] | Tensor:
        """A list of arrays, or a tensor (N, 3, size, size)."""
        values: list[Pixels] | Tensor = self["pixel_values"]
        return values


@dataclass(frozen=True, kw_only=True)
class MatchingTransform:
    """The matching models' transform, called as FlagAI's and Hugging Face's are.

    Args:
        transform: What is done with each image.
    """

    transform: ClipImageTransform

    def __call__(self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None) -> PixelValues:
        """Prepare images.

        Args:
            images: A PIL image of any mode, or several.
            return_tensors: ``"pt"`` for one tensor in place of a list of arrays.

        Returns:
            ``pixel_values``: a list of float32 arrays (3, size, size), one for each image. A DataLoader batches it.
        """
        several = [images] if isinstance(images, Image.Image) else list(images)
        pixels = [self.transform.pixels(image) for image in several]
        return PixelValues(pixel_values=torch.from_numpy(np.stack(pixels)) if return_tensors == "pt" else pixels)
