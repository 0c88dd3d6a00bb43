"""Which scenes exist, and which are held out."""

from __future__ import annotations

import random

from flagai_altdiff.mini.vocabulary import COLOURS, SHAPES
from flagai_altdiff.mini.world import (
    Scene,
    all_scenes,
    draw_scenes,
    held_out_scenes,
    is_held_out,
    training_scenes,
)


def triple(scene: Scene) -> tuple[str, str, str]:
    return scene.shape, scene.colour, scene.background


def test_held_out_triples_never_appear_in_training() -> None:
    assert not {triple(s) for s in training_scenes()} & {triple(s) for s in held_out_scenes()}
    assert len(training_scenes()) + len(held_out_scenes()) == len(all_scenes()) == 10 * 8 * 7 * 3 * 3


def test_the_split_is_the_published_one() -> None:
    assert len({triple(s) for s in held_out_scenes()}) == 71
    assert is_held_out(Scene(shape="flower", colour="red", background="green")) is False
    assert {s.shape for s in held_out_scenes()} == set(SHAPES)
    assert {s.colour for s in held_out_scenes()} == {s.background for s in held_out_scenes()} == set(COLOURS)


def test_scenes_are_drawn_evenly() -> None:
    scenes = all_scenes()[:10]
    drawn = draw_scenes(scenes, 25, random.Random(0))
    assert len(drawn) == 25
    assert {drawn.count(scene) for scene in scenes} == {2, 3}
