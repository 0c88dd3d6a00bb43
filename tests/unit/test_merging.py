"""Requests of several people in one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flagai_altdiff.merging import count, likeness, merged
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import Sample, draw, prepare
from flagai_altdiff.request import ResolvedRequest

SMALL: dict[str, Any] = {"steps": 3, "height": 64, "width": 64, "sampler": "euler_ancestral"}


def resolved(model: LatentDiffusion, prompt: str, **options: Any) -> ResolvedRequest:
    return prepare(model, prompt, **{**SMALL, **options})[0]


def images(model: LatentDiffusion, request: ResolvedRequest) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(event.image, int) for event in draw(model, request) if isinstance(event, Sample)]


@pytest.mark.fault(62)
def test_everybody_gets_the_images_that_he_would_get_alone(m9: LatentDiffusion) -> None:
    alone = [
        resolved(m9, "a cat", seed=7, images_per_prompt=2),
        resolved(m9, "eine Katze", seed=3, guidance_scale=2.0, negative_prompt="blurry"),
        resolved(m9, "一只猫", seed=4294967295, guidance_scale=9.0),
    ]
    assert len({likeness(request) for request in alone}) == 1
    together = images(m9, merged(alone))
    expected = [image for request in alone for image in images(m9, request)]
    assert len(together) == 4
    for own, image in zip(expected, together, strict=True):
        assert np.abs(own - image).max() <= 1  # convolutions of another batch size round differently
    assert np.abs(together[0] - together[1]).max() > 20


def watched(model: LatentDiffusion, request: ResolvedRequest, drops: dict[int, set[int]]) -> tuple[list[int], Any]:
    """How many rows the UNet saw in each step, and the images by index, where images are dropped after some steps."""
    rows, found, dropped, steps = list[int](), dict[int, np.ndarray[Any, Any]](), set[int](), 0
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        for event in draw(model, request, dropped=dropped):
            if isinstance(event, Sample):
                found[event.index] = np.asarray(event.image, int)
                continue
            steps += 1
            dropped |= drops.get(steps, set())
    finally:
        hook.remove()
    return rows, found


@pytest.mark.fault(62)
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "ddim"])
def test_who_goes_away_is_computed_no_more_and_changes_nobodys_image(m9: LatentDiffusion, sampler: str) -> None:
    own: dict[str, Any] = {"sampler": sampler, "steps": 6, "engine": "eager"}  # the model itself, to be watched
    alone = [
        resolved(m9, "a cat", seed=7, images_per_prompt=2, **own),
        resolved(m9, "a dog", seed=3, guidance_scale=2.0, **own),
        resolved(m9, "一只猫", seed=9, guidance_scale=9.0, **own),
    ]
    rows, found = watched(m9, merged(alone), {2: {0, 1}})
    assert list(found) == [2, 3]
    for request, image in zip(alone[1:], found.values(), strict=True):
        assert np.abs(images(m9, request)[0] - image).max() <= 1
    assert rows[:2] == [8, 8] and rows[2:] == [4] * (len(rows) - 2)  # both sides of guidance
    rows, found = watched(m9, merged(alone), {2: {0, 1}, 3: {2, 3}})
    assert found == {} and len(rows) == 3


@pytest.mark.parametrize("seed_mode", ["batch", "per_image"])
def test_a_batch_that_is_left_out_changes_no_other(m9: LatentDiffusion, seed_mode: str) -> None:
    options: dict[str, Any] = {"seed": 5, "images_per_prompt": 4, "batch_size": 2, "seed_mode": seed_mode}
    request = resolved(m9, "a cat", **options, steps=5, engine="eager")
    whole = images(m9, request)
    rows, found = watched(m9, request, {2: {0, 1}})
    assert list(found) == [2, 3]
    assert all((found[index] == whole[index]).all() for index in found)
    assert len(rows) == 2 + 5


def test_weighted_prompts_of_other_lengths_go_together(m9: LatentDiffusion) -> None:
    long = "a (cat:1.3) BREAK a dog"
    alone = [
        resolved(m9, long, seed=1, prompt_syntax="weighted"),
        resolved(m9, "a cat", seed=1, prompt_syntax="weighted", negative_prompt=long),
        resolved(m9, "a dog", seed=1, prompt_syntax="weighted"),
    ]
    expected = [image for request in alone for image in images(m9, request)]
    for own, image in zip(expected, images(m9, merged(alone)), strict=True):
        assert np.abs(own - image).max() <= 1


@pytest.mark.parametrize(
    "options",
    [{"steps": 4}, {"width": 128}, {"sampler": "ddim"}, {"guidance_scale": 1.0}, {"seamless": "x"}, {"grid": "karras"}],
)
def test_unlike_ones_stay_apart(m9: LatentDiffusion, options: dict[str, Any]) -> None:
    assert likeness(resolved(m9, "a cat")) != likeness(resolved(m9, "a cat", **options))


@pytest.mark.parametrize(
    "options",
    [
        {"seed_mode": "batch"},
        {"fixed_code": True},
        {"variation_strength": 0.2},
        {"iterations": 2},
        {"images_per_prompt": 4, "batch_size": 2},
    ],
)
def test_some_must_be_alone(m9: LatentDiffusion, options: dict[str, Any]) -> None:
    assert likeness(resolved(m9, "a cat", **options)) is None


def test_a_single_request_stays_as_it_is(m9: LatentDiffusion) -> None:
    request = resolved(m9, "a cat", images_per_prompt=3, iterations=2)
    assert merged([request]) is request
    assert count(request) == 6
