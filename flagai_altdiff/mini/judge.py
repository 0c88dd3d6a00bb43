"""A small classifier that tells what an image of the embedded model's world shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from flagai_altdiff.mini.batches import as_batch
from flagai_altdiff.mini.things.chosen import THINGS
from flagai_altdiff.mini.things.composing import ThingScene
from flagai_altdiff.mini.things.sprites import STYLES
from flagai_altdiff.mini.vocabulary import COLOURS, POSITIONS, SHAPES, SIZES
from flagai_altdiff.mini.world import Scene

WEIGHTS = Path(__file__).with_name("judge.safetensors")
CODES = tuple(code for codes in THINGS.values() for code in codes)
SEEN: dict[str, tuple[str, ...]] = {
    "what": (*SHAPES, *CODES),
    "colour": COLOURS,
    "background": COLOURS,
    "size": SIZES,
    "position": POSITIONS,
    "style": STYLES,
}
"""What the judge tells of an image -> the answers that it has."""
UNTOLD = -100
"""In the place of an answer where there is none: things have no one colour, shapes no style."""
_WIDTHS = (32, 64, 128, 256)
_SIDES = (128, 128)


class Judge(nn.Module):
    """Convolutions and one linear read-out for each question."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.AvgPool2d(2)]
        channels = 3
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU()]
            channels = width
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 256), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(answers)) for name, answers in SEEN.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, 128, 128) in [-1, 1] -> for each question the answers' logits, (B, answers)."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


@cache
def load_judge() -> Judge:
    """The judge with the weights that come with the package."""
    judge = Judge()
    judge.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return judge.eval()


def looked_at(images: Sequence[Image.Image]) -> Tensor:
    """Images of any size as the judge takes them, (B, 3, 128, 128) in [-1, 1]."""
    return as_batch([image if image.size == _SIDES else image.resize(_SIDES) for image in images])


@torch.no_grad()
def see(judge: Judge, images: Tensor) -> Tensor:
    """What each image shows.

    Args:
        judge: The classifier.
        images: (B, 3, 128, 128) in [-1, 1].

    Returns:
        (B, questions): the most likely answers' numbers, in the order of ``SEEN``.
    """
    chunks = [torch.stack([x.argmax(dim=1) for x in judge(part).values()], dim=1) for part in torch.split(images, 100)]  # type: ignore[no-untyped-call]
    return torch.cat(chunks)


def right_answers(shown: Scene | ThingScene) -> tuple[int, ...]:
    """What the judge should say of a picture, in the order of ``SEEN``; ``UNTOLD`` where there is nothing to say."""
    own = {"background": shown.background, "size": shown.size, "position": shown.position}
    if isinstance(shown, Scene):
        own |= {"what": shown.shape, "colour": shown.colour}
    else:
        own |= {"what": shown.code, "style": shown.style}
    return tuple(answers.index(own[name]) if name in own else UNTOLD for name, answers in SEEN.items())
