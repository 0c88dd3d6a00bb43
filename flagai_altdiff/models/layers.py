"""What the UNet and the autoencoder have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Upsample(nn.Module):
    """Nearest neighbour and a convolution: twice the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
