"""Images of the drawn world as the networks see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor


def as_batch(images: Sequence[Image.Image | NDArray[Any]]) -> Tensor:
    """RGB images of one size -> (B, 3, H, W), float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
