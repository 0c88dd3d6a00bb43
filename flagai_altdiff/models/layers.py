"""What several networks have in common."""

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


class LazyEmbedding(nn.Embedding):
    """An embedding that draws no first values on the meta device, where torch would load its compiler for that."""

    def reset_parameters(self) -> None:
        """Draw first values, where there is room for them."""
        if not self.weight.is_meta:
            super().reset_parameters()
