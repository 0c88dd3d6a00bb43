"""Images of the drawn world as the networks see them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.world import Scene


def as_batch(images: Sequence[Image.Image | NDArray[Any]]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W), float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def draw_batch(scenes: Sequence[Scene], rng: random.Random, *, side: int = 128) -> Tensor:
    """Draw scenes as one batch.

    Args:
        scenes: What to draw.
        rng: Source of the variation.
        side: Height and width in px.

    Returns:
        (B, 3, side, side), float32 in [-1, 1].
    """
    return as_batch([draw(scene, rng, side=side) for scene in scenes])
