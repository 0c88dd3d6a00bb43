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
