"""The Inception network of FID and Inception score: TensorFlow's of 2015, under the keys of its PyTorch weights.

Its quirks are those of the original graph: average pools that leave the border out, a maximum pool in the last block.
torch-fidelity's own module would bring torchvision along, whose builds must match torch's; the network is all we need.

**Source**: Szegedy et al. 2015 (arXiv 1512.00567); Heusel et al. 2017 (arXiv 1706.08500).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES, CLASSES = 2048, 1008
_SIDE = 299

_Kernel = int | tuple[int, int]


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, channels: int, width: int, kernel: _Kernel = 1, stride: int = 1, *, padded: bool = True) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded else 0
        self.conv = nn.Conv2d(channels, width, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions; the last branch begins with a pool.

    A subclass names its convolutions as the weights do, and lists the chains.
    """

    chains: Sequence[Sequence[str]]
    pool = staticmethod(_mean_pool)

    def _add(self, name: str, channels: int, width: int, kernel: _Kernel = 1, stride: int = 1) -> int:
        self.add_module(name, _Conv(channels, width, kernel, stride, padded=stride == 1))
        return width

    def _walk(self, x: Tensor, chain: Sequence[str]) -> Tensor:
        for name in chain:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        found = [self._walk(x, chain) for chain in self.chains]
        return torch.cat([*found, self.get_submodule("branch_pool")(self.pool(x))], dim=1)


class _A(_Mixed):
    chains = (
        ("branch1x1",),
        ("branch5x5_1", "branch5x5_2"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    )

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self._add("branch1x1", channels, 64)
        self._add("branch5x5_2", self._add("branch5x5_1", channels, 48), 64, 5)
        self._add(
            "branch3x3dbl_3", self._add("branch3x3dbl_2", self._add("branch3x3dbl_1", channels, 64), 96, 3), 96, 3
        )
        self._add("branch_pool", channels, pooled)


class _C(_Mixed):
    chains = (
        ("branch1x1",),
        tuple(f"branch7x7_{i}" for i in range(1, 4)),
        tuple(f"branch7x7dbl_{i}" for i in range(1, 6)),
    )

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self._add("branch1x1", channels, 192)
        self._add("branch_pool", channels, 192)
        row, column = (1, 7), (7, 1)
        chains: dict[str, tuple[_Kernel, ...]] = {
            "branch7x7": (1, row, column),
            "branch7x7dbl": (1, column, row, column, row),
        }
        for name, kernels in chains.items():
            width = channels
            for i, kernel in enumerate(kernels, 1):
                width = self._add(f"{name}_{i}", width, 192 if i == len(kernels) else inner, kernel)


class _Reduction(_Mixed):
    """Halves the sides; its pool has no convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*(self._walk(x, chain) for chain in self.chains), F.max_pool2d(x, 3, stride=2)], dim=1)


class _B(_Reduction):
    chains = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._add("branch3x3", channels, 384, 3, 2)
        width = self._add("branch3x3dbl_2", self._add("branch3x3dbl_1", channels, 64), 96, 3)
        self._add("branch3x3dbl_3", width, 96, 3, 2)


class _D(_Reduction):
    chains = (("branch3x3_1", "branch3x3_2"), tuple(f"branch7x7x3_{i}" for i in range(1, 5)))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._add("branch3x3_2", self._add("branch3x3_1", channels, 192), 320, 3, 2)
        kernels: tuple[_Kernel, ...] = (1, (1, 7), (7, 1))
        for i, kernel in enumerate(kernels, 1):
            channels = self._add(f"branch7x7x3_{i}", channels, 192, kernel)
        self._add("branch7x7x3_4", channels, 192, 3, 2)


class _E(_Mixed):
    """Two of its branches end in a fork."""

    chains = (
        ("branch1x1",),
        ("branch3x3_1", "branch3x3_2a"),
        ("branch3x3_1", "branch3x3_2b"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
        ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
    )

    def __init__(self, channels: int, *, last: bool = False) -> None:
        super().__init__()
        self.pool = _max_pool if last else _mean_pool
        self._add("branch1x1", channels, 320)
        self._add("branch3x3_1", channels, 384)
        self._add("branch3x3dbl_2", self._add("branch3x3dbl_1", channels, 448), 384, 3)
        for stem in ("branch3x3_2", "branch3x3dbl_3"):
            self._add(f"{stem}a", 384, 384, (1, 3))
            self._add(f"{stem}b", 384, 384, (3, 1))
        self._add("branch_pool", channels, 192)


class Inception(nn.Module):
    """Images -> features and the classes' logits."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _A(192, 32), _A(256, 64), _A(288, 64)
        self.Mixed_6a = _B(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_C(768, w) for w in (128, 160, 160, 192))
        self.Mixed_7a = _D(768)
        self.Mixed_7b, self.Mixed_7c = _E(1280), _E(2048, last=True)
        self.fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) uint8 -> features (B, 2048), and logits (B, 1008) without bias, as the score has them."""
        x = (_resized(pixels.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T


def _resized(x: Tensor) -> Tensor:
    """Bilinear to 299 px with TensorFlow 1's grid, on which the first pixels lie on each other, not the corners."""
    height, width = (_weights(length).to(x) for length in x.shape[-2:])
    return height @ x @ width.T


def _weights(length: int) -> Tensor:
    """(299, length): of which pixels each new one is made."""
    place = torch.arange(_SIDE) * (length / _SIDE)
    low = place.long().clamp(max=length - 1)
    high, share = (low + 1).clamp(max=length - 1), place - low
    rows = torch.arange(_SIDE)
    weights = torch.zeros(_SIDE, length)
    weights[rows, low] += 1 - share
    weights[rows, high] += share
    return weights
