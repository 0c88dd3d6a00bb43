"""Draws scenes as images."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flagai_altdiff.mini.world import Scene

RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 44),
    "green": (44, 158, 66),
    "blue": (40, 82, 214),
    "yellow": (246, 212, 44),
    "purple": (140, 58, 188),
    "orange": (246, 132, 26),
    "white": (244, 244, 244),
    "black": (24, 24, 24),
}
WIDTH_OF_SIZE = {"small": 0.42, "medium": 0.54, "large": 0.66}
CENTRE_OF_POSITION = {"left": 0.0, "centre": 0.5, "right": 1.0}
MARGIN = 0.04
SUPERSAMPLING = 4

Points = list[tuple[float, float]]
Mask = Callable[["Canvas"], None]


class Canvas:
    """A mask in which an object is drawn; coordinates are -1 to 1 over the object's width, y down."""

    def __init__(self, side: int, x: float, y: float, radius: float) -> None:
        self.image = Image.new("L", (side, side), 0)
        self._draw = ImageDraw.Draw(self.image)
        self._x, self._y, self._radius = x, y, radius

    def polygon(self, points: Points, *, ink: int = 255) -> None:
        """Fill a polygon; ink 0 cuts it out."""
        self._draw.polygon([(self._x + px * self._radius, self._y + py * self._radius) for px, py in points], fill=ink)

    def disc(self, x: float, y: float, radius: float, *, ink: int = 255) -> None:
        """Fill a disc; ink 0 cuts it out."""
        cx, cy, r = self._x + x * self._radius, self._y + y * self._radius, radius * self._radius
        self._draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=ink)


def circle(canvas: Canvas) -> None:
    """A disc."""
    canvas.disc(0, 0, 1)


def square(canvas: Canvas) -> None:
    """A square."""
    canvas.polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)])


def triangle(canvas: Canvas) -> None:
    """A triangle that stands on its side."""
    canvas.polygon([(0, -0.95), (1, 0.85), (-1, 0.85)])


def star(canvas: Canvas) -> None:
    """A star with five points."""
    radii = (1.05, 0.42)
    canvas.polygon(
        [(radii[i % 2] * math.sin(i * math.pi / 5), 0.06 - radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)]
    )


def heart(canvas: Canvas) -> None:
    """A heart, a curve of sines."""
    steps = (2 * math.pi * i / 60 for i in range(60))
    canvas.polygon(
        [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15 - 0.1,
            )
            for t in steps
        ]
    )


def cross(canvas: Canvas) -> None:
    """A cross with arms of equal length."""
    canvas.polygon([(-0.32, -1), (0.32, -1), (0.32, 1), (-0.32, 1)])
    canvas.polygon([(-1, -0.32), (1, -0.32), (1, 0.32), (-1, 0.32)])


def ring(canvas: Canvas) -> None:
    """A disc with a large round hole."""
    canvas.disc(0, 0, 1)
    canvas.disc(0, 0, 0.58, ink=0)


def crescent(canvas: Canvas) -> None:
    """A waxing moon turned to the left: a disc with a disc cut out."""
    canvas.disc(0, 0, 1)
    canvas.disc(0.48, -0.12, 0.8, ink=0)


def flower(canvas: Canvas) -> None:
    """Five round petals around a small hole."""
    for i in range(5):
        angle = 2 * math.pi * i / 5
        canvas.disc(0.62 * math.sin(angle), -0.62 * math.cos(angle), 0.4)
    canvas.disc(0, 0, 0.5)
    canvas.disc(0, 0, 0.24, ink=0)


def house(canvas: Canvas) -> None:
    """A gable, walls, and a door that is cut out."""
    canvas.polygon([(0, -1), (1, -0.12), (-1, -0.12)])
    canvas.polygon([(-0.74, -0.15), (0.74, -0.15), (0.74, 0.95), (-0.74, 0.95)])
    canvas.polygon([(-0.22, 0.3), (0.22, 0.3), (0.22, 0.96), (-0.22, 0.96)], ink=0)


OUTLINES: dict[str, Mask] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
    "ring": ring,
    "crescent": crescent,
    "flower": flower,
    "house": house,
}


def draw(scene: Scene, rng: random.Random, *, side: int = 128) -> NDArray[np.uint8]:
    """Draw a scene.

    Colour, size and place vary a little from image to image.

    Args:
        scene: What to draw.
        rng: Source of the variation.
        side: Height and width in px.

    Returns:
        The image, (side, side, 3).
    """
    width = WIDTH_OF_SIZE[scene.size] + rng.uniform(-0.02, 0.02)
    radius = width / 2
    x = MARGIN + radius + CENTRE_OF_POSITION[scene.position] * (1 - width - 2 * MARGIN) + rng.uniform(-0.02, 0.02)
    y = 0.5 + rng.uniform(-0.03, 0.03)
    fine = side * SUPERSAMPLING
    canvas = Canvas(fine, x * fine, y * fine, radius * fine)
    OUTLINES[scene.shape](canvas)
    mask = np.asarray(canvas.image.reduce(SUPERSAMPLING), dtype=np.float32)[..., None] / 255
    ink, ground = (jittered(RGB[name], rng) for name in (scene.colour, scene.background))
    return np.rint(ground + mask * (ink - ground)).astype(np.uint8)


def jittered(rgb: tuple[int, int, int], rng: random.Random) -> NDArray[np.float32]:
    """A colour close to the given one."""
    return np.array([min(255, max(0, channel + rng.uniform(-8, 8))) for channel in rgb], dtype=np.float32)
