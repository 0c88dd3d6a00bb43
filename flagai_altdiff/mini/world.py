"""The drawn world: what a scene is, which scenes exist and which of them are never trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from flagai_altdiff.mini.vocabulary import COLOURS, POSITIONS, SHAPES, SIZES

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One object on a plain ground.

    Attributes:
        shape: One of ``SHAPES``.
        colour: One of ``COLOURS``.
        background: One of ``COLOURS``, other than ``colour``.
        size: One of ``SIZES``; "medium" is what an unnamed size means.
        position: One of ``POSITIONS``; "centre" is what an unnamed position means.
    """

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "centre"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's shape, colour and background belong to the triples that training never sees.

    The choice is a function of the words alone (their MD5), so it is the same on every machine and in every version.
    """
    triple = f"{scene.shape}-{scene.colour}-{scene.background}".encode()
    return int(hashlib.md5(triple, usedforsecurity=False).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


@cache
def all_scenes() -> tuple[Scene, ...]:
    """Every scene of the world, in a fixed order."""
    return tuple(
        Scene(shape=shape, colour=colour, background=background, size=size, position=position)
        for shape, colour, background, size, position in product(SHAPES, COLOURS, COLOURS, SIZES, POSITIONS)
        if colour != background
    )


@cache
def training_scenes() -> tuple[Scene, ...]:
    """The scenes that training may see."""
    return tuple(scene for scene in all_scenes() if not is_held_out(scene))


@cache
def held_out_scenes() -> tuple[Scene, ...]:
    """The scenes that only measurements see."""
    return tuple(scene for scene in all_scenes() if is_held_out(scene))


def draw_scenes(scenes: Sequence[Scene], count: int, rng: random.Random) -> list[Scene]:
    """Draw scenes so that every one comes up equally often (within one).

    Args:
        scenes: What to draw from.
        count: How many.
        rng: Source of the order.

    Returns:
        ``count`` scenes in random order.
    """
    drawn: list[Scene] = []
    while len(drawn) < count:
        drawn += rng.sample(scenes, min(len(scenes), count - len(drawn)))
    return drawn
