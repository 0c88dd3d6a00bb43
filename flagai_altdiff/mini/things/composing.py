"""A thing on a plain ground: what there is to say of it, which combinations are held out, how it is put together."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flagai_altdiff.mini.drawing import CENTRE_OF_POSITION, MARGIN, RGB, jittered
from flagai_altdiff.mini.things.sprites import STYLES
from flagai_altdiff.mini.vocabulary import COLOURS, POSITIONS, SIZES

WIDTH_OF_SIZE = {"small": 0.46, "medium": 0.7, "large": 0.88}
"""Longer side of a thing, as a share of the image's."""
_OTHER_STYLE, _OTHER_SIZE, _OTHER_POSITION = 0.2, 0.15, 0.15
_GROUNDS_HELD_OUT, _STYLES_HELD_OUT = 10, 5
"""One in so many."""


@dataclass(frozen=True, kw_only=True)
class ThingScene:
    """A thing on a ground.

    Attributes:
        code: Of the thing.
        background: One of ``COLOURS``.
        size: One of ``SIZES``; "medium" is what an unnamed size means.
        position: One of ``POSITIONS``; "centre" is what an unnamed position means.
        style: One of ``STYLES``; "solid" is what an unnamed style means.
    """

    code: str
    background: str
    size: str = "medium"
    position: str = "centre"
    style: str = "solid"

    @property
    def is_held_out(self) -> bool:
        """Whether training never sees this thing on this ground, or in this style; a function of the words alone."""
        return self.ground_is_held_out or self.style_is_held_out

    @property
    def ground_is_held_out(self) -> bool:
        """Whether training never sees this thing on this ground."""
        return _one_in(f"{self.code}-{self.background}", _GROUNDS_HELD_OUT)

    @property
    def style_is_held_out(self) -> bool:
        """Whether training never sees this thing in this style."""
        return self.style != "solid" and _one_in(f"{self.code}-{self.style}", _STYLES_HELD_OUT)


def _one_in(text: str, count: int) -> bool:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16) % count == 0


def random_scene(code: str, rng: random.Random, *, held_out: bool = False) -> ThingScene:
    """A scene with a thing; one that training may see, unless ``held_out`` ones are welcome."""
    while True:
        size, position = "medium", "centre"
        if rng.random() < _OTHER_SIZE:
            size = rng.choice(("small", "large"))
        if size != "large" and rng.random() < _OTHER_POSITION:
            position = rng.choice(("left", "right"))
        style = rng.choice(STYLES[1:]) if rng.random() < _OTHER_STYLE else STYLES[0]
        scene = ThingScene(code=code, background=rng.choice(COLOURS), size=size, position=position, style=style)
        if held_out or not scene.is_held_out:
            return scene


def compose(sprite: Image.Image, scene: ThingScene, rng: random.Random, *, side: int = 128) -> NDArray[np.uint8]:
    """Put a thing on its ground; colour, size and place vary a little from image to image.

    Args:
        sprite: RGBA, of the scene's style.
        scene: What to put together.
        rng: Source of the variation.
        side: Height and width in px.

    Returns:
        The image, (side, side, 3).
    """
    width = (WIDTH_OF_SIZE[scene.size] + rng.uniform(-0.03, 0.03)) * side
    scale = width / max(sprite.size)
    small = sprite.resize((max(1, round(sprite.width * scale)), max(1, round(sprite.height * scale))), _FILTER)
    room = side * (1 - 2 * MARGIN) - small.width
    x = side * MARGIN + CENTRE_OF_POSITION[scene.position] * room + rng.uniform(-0.02, 0.02) * side
    y = (side - small.height) / 2 + rng.uniform(-0.03, 0.03) * side
    canvas = Image.new("RGBA", (side, side), (*jittered(RGB[scene.background], rng).round().astype(int).tolist(), 255))
    layer = Image.new("RGBA", canvas.size)
    layer.paste(small, (round(x), round(y)))
    canvas.alpha_composite(layer)
    return np.asarray(canvas.convert("RGB"))


_FILTER = Image.Resampling.LANCZOS
assert set(WIDTH_OF_SIZE) == set(SIZES) and set(CENTRE_OF_POSITION) == set(POSITIONS)
