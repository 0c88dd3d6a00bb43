"""The renderer and the judge: what is drawn is what is seen."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from flagai_altdiff.mini.batches import as_batch
from flagai_altdiff.mini.drawing import RGB, draw
from flagai_altdiff.mini.judge import UNTOLD, load_judge, right_answers, see
from flagai_altdiff.mini.vocabulary import POSITIONS, SHAPES, SIZES
from flagai_altdiff.mini.world import Scene, all_scenes


def object_columns(scene: Scene, side: int = 128) -> tuple[int, int]:
    image = draw(scene, random.Random(0), side=side).astype(int)
    different = np.abs(image - image[0, 0]).sum(axis=2).max(axis=0) > 100
    columns = np.flatnonzero(different)
    return int(columns[0]), int(columns[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_objects_lie_inside_the_image_at_their_place(shape: str, size: str) -> None:
    centres = []
    for position in POSITIONS:
        left, right = object_columns(
            Scene(shape=shape, colour="black", background="white", size=size, position=position)
        )
        assert 0 < left < right < 127
        centres.append((left + right) / 2)
    assert centres == sorted(centres)
    assert centres[2] - centres[0] > 25


def test_sizes_differ() -> None:
    spans = [object_columns(Scene(shape="square", colour="red", background="white", size=size)) for size in SIZES]
    widths = [right - left for left, right in spans]
    assert widths[0] + 8 < widths[1] < widths[2] - 8


def test_colours_are_near_their_names() -> None:
    scene = Scene(shape="circle", colour="orange", background="blue", size="large")
    image = draw(scene, random.Random(1)).astype(int)
    assert np.abs(image[64, 64] - RGB["orange"]).max() <= 9
    assert np.abs(image[1, 1] - RGB["blue"]).max() <= 9


def test_a_seed_gives_one_image() -> None:
    scene = all_scenes()[1234]
    assert (draw(scene, random.Random(3)) == draw(scene, random.Random(3))).all()
    assert (draw(scene, random.Random(3)) != draw(scene, random.Random(4))).any()


def test_batches_are_scaled_for_the_model() -> None:
    image = draw(all_scenes()[0], random.Random(0), side=64)
    batch = as_batch([image, image])
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == torch.float32
    assert np.allclose((batch[0].permute(1, 2, 0).numpy() + 1) * 127.5, image, atol=1e-3)


def test_the_judge_sees_what_was_drawn() -> None:
    rng = random.Random(7)
    scenes = rng.sample(all_scenes(), 200)
    seen = see(load_judge(), as_batch([draw(scene, rng) for scene in scenes]))
    wanted = torch.tensor([right_answers(scene) for scene in scenes])
    assert ((seen == wanted) | (wanted == UNTOLD)).all(dim=1).sum() >= 196
