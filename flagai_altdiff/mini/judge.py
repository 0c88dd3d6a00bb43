"""A small classifier that tells what an image of the drawn world shows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flagai_altdiff.mini.world import ATTRIBUTES, Scene

WEIGHTS = Path(__file__).with_name("judge.safetensors")
WIDTHS = (24, 48, 96, 128)


class Judge(nn.Module):
    """Convolutions and one linear read-out for each attribute of a scene."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        channels = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 128), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(classes)) for name, classes in ATTRIBUTES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, 128, 128) in [-1, 1] -> for each attribute logits (B, classes)."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


@cache
def load_judge() -> Judge:
    """The judge with the weights that come with the package."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval()


@torch.no_grad()
def see(judge: Judge, images: Tensor) -> list[Scene]:
    """What each image shows.

    Args:
        judge: The classifier.
        images: (B, 3, 128, 128) in [-1, 1].

    Returns:
        The most likely scene of each image.
    """
    chosen = {name: logits.argmax(dim=1).tolist() for name, logits in judge(images).items()}
    return [
        Scene(**{name: ATTRIBUTES[name][number] for name, number in zip(chosen, numbers, strict=True)})
        for numbers in zip(*chosen.values(), strict=True)
    ]
