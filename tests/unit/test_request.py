"""GenerationRequest: every option once, every value outside its range refused with the nearest one that works."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, UnknownSamplerError
from flagai_altdiff.options import options_of
from flagai_altdiff.request import MAX_SEED, OPTIONS, GenerationRequest, Output, ResolvedRequest
from flagai_altdiff.sampling import SAMPLERS

RANGES = {name: o for name, o in options_of(GenerationRequest).items() if o.minimum is not None}
DEFAULTS: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "steps": 20,
    "guidance_scale": 3.0,
    "downsampling": 8,
    "halvings": 1,
}


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompts": ("a cat",), **changes})


NEEDED: dict[str, dict[str, Any]] = {
    "strength": {"init_image": Image.new("RGB", (8, 8))},
    "window_overlap": {"window": 8192},
    "variation_seed": {"variation_strength": 0.0},
    "mask_feather": {"init_image": Image.new("RGB", (8, 8)), "outpaint": "left=8"},
    "mask_padding": {
        "init_image": Image.new("RGB", (8, 8)),
        "mask_image": "0,0,4,4",
        "mask_full_resolution": True,
    },
    "hires_strength": {"hires": 2},
}
"""Options without which others have no meaning."""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mask", "mask_image"), ("cfg_scale", "guidance_scale"), ("prompt", "prompts"), ("ddim_steps", "steps")],
)
def test_other_names_of_options_are_understood_in_errors(typed: str, meant: str) -> None:
    other: dict[str, Any] = {typed: "x"}
    with pytest.raises(InvalidRequestError, match=f"did you mean '{meant}'"):
        GenerationRequest(**other)


@pytest.mark.parametrize(
    ("picture", "usual", "size"),
    [((2000, 1500), 128, (128, 96)), ((2000, 1500), 512, (576, 448)), ((3000, 1000), 128, (192, 64))],
)
def test_a_large_picture_keeps_its_proportions(picture: tuple[int, int], usual: int, size: tuple[int, int]) -> None:
    halvings = 2 if usual == 128 else 3
    found = request(init_image=Image.new("RGB", picture)).resolve(
        height=usual, width=usual, steps=20, guidance_scale=2.0, downsampling=8, halvings=halvings
    )
    assert (found.width, found.height) == size


def test_every_field_is_an_option() -> None:
    for cls in (GenerationRequest, Output):
        assert list(options_of(cls)) == [f.name for f in fields(cls)]
    for option in OPTIONS.values():
        assert option.help and option.flagai
        assert all(flag.startswith("-") for flag in option.flags)
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert len(RANGES) == 20


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_valid(name: str) -> None:
    option = RANGES[name]
    for value in (option.minimum, option.maximum):
        assert getattr(request(**{name: value}, **NEEDED.get(name, {})), name) == value


@pytest.mark.parametrize("name", RANGES)
def test_values_beside_a_range_are_refused_with_the_nearest(name: str) -> None:
    option = RANGES[name]
    assert option.minimum is not None and option.maximum is not None
    step = 1 if RANGES[name].whole else 0.001
    for value, nearest in ((option.minimum - step, option.minimum), (option.maximum + step, option.maximum)):
        if name == "seed" and value == -1:
            continue
        with pytest.raises(InvalidRequestError, match=name) as caught:
            request(**{name: value})
        assert caught.value.field == name
        assert caught.value.value == value
        assert f"the nearest is {nearest}" in str(caught.value)


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, False, "5", b"5", [5], 5j])
def test_what_is_no_finite_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request(**{name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("name", RANGES)
def test_numbers_beyond_floating_point_are_refused(name: str) -> None:
    for value in (10**400, -(10**400)):
        with pytest.raises(InvalidRequestError, match=name):
            request(**{name: value})


@pytest.mark.parametrize("name", [n for n in RANGES if RANGES[n].whole])
def test_whole_numbers_are_not_rounded(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="whole number"):
        request(**{name: 16.5})


@pytest.mark.parametrize("name", ["iterations", "images_per_prompt", "eta"])
def test_none_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        request(**{name: None})


@pytest.mark.parametrize("prompts", [(), ("a", 7), (None,), (b"a",), None, 7, (["a", "b"],), {"a"}, iter("a")])
def test_prompts_must_be_texts(prompts: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request(prompts=prompts)
    assert caught.value.field == "prompts"


def test_prompts_become_a_tuple() -> None:
    prompts = ["a cat", "a dog"]
    made = request(prompts=prompts)
    prompts.clear()
    assert made.prompts == ("a cat", "a dog")
    assert request(prompts="a cat").prompts == ("a cat",)
    assert hash(made) != hash(request())


@pytest.mark.fault(48)
@pytest.mark.parametrize("name", ["prompts", "negative_prompt"])
def test_half_an_emoji_is_refused(name: str) -> None:
    text = "a cat \ud83d"
    with pytest.raises(InvalidRequestError, match="surrogate") as caught:
        request(**{name: (text,) if name == "prompts" else text})
    assert caught.value.field == name
    str(caught.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("text", ["", "   ", "a\x00b", "a\nb", "👩‍👩‍👧", "عربي", "x" * 100_000, "Steps: 3, Seed: 7"])
def test_odd_texts_are_prompts(text: str) -> None:
    assert request(prompts=(text,), negative_prompt=text).prompts == (text,)


def test_an_unknown_sampler_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownSamplerError, match="Did you mean 'plms'") as caught:
        request(sampler="plsm")
    assert all(name in str(caught.value) for name in SAMPLERS)
    assert isinstance(caught.value, FlagAIAltDiffError)


def test_seed_modes() -> None:
    assert request(seed_mode="per_image").seed_mode == "per_image"
    with pytest.raises(InvalidRequestError, match="batch, per_image"):
        request(seed_mode="other")


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "ddim"])
def test_only_ddim_takes_an_eta(sampler: str) -> None:
    assert request(sampler="ddim", eta=1.0).eta == 1.0
    with pytest.raises(InvalidRequestError, match=sampler.upper()) as caught:
        request(sampler=sampler, eta=0.5)
    assert caught.value.field == "eta"


def test_errors_are_value_errors_and_short() -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as caught:
        request(images_per_prompt="9" * 1000)
    assert len(str(caught.value)) < 300


@pytest.mark.fault(121)
def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    made = request(
        height=np.int64(64), steps=torch.tensor(7), seed=np.uint32(9), guidance_scale=np.float32(2.5), eta=np.array(0.5)
    )
    assert (made.height, made.steps, made.seed, made.guidance_scale, made.eta) == (64, 7, 9, 2.5, 0.5)
    assert all(type(v) in (int, float) for v in (made.height, made.steps, made.seed, made.guidance_scale, made.eta))
    for bad in (np.array([64]), torch.ones(2), np.bool_(True), np.float64("nan"), np.str_("64")):
        with pytest.raises(InvalidRequestError):
            request(height=bad)


def test_no_negative_prompt_is_an_empty_one() -> None:
    assert request(negative_prompt=None).negative_prompt == ""


@pytest.mark.parametrize(
    ("typed", "meant"), [("n_samples", "images_per_prompt"), ("scale", "guidance_scale"), ("H", "height")]
)
def test_flagais_names_are_answered_with_ours(typed: str, meant: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"did you mean '{meant}'"):
        request(**{typed: 4})


def test_a_misspelt_option_is_answered_with_the_nearest() -> None:
    with pytest.raises(InvalidRequestError, match="did you mean 'steps'") as caught:
        request(step=20)
    assert caught.value.field == "step"
    with pytest.raises(InvalidRequestError, match="must be given"):
        GenerationRequest()  # type: ignore[call-arg]


def test_a_request_is_hashable_printable_and_json() -> None:
    one = request(seed=7, steps=5)
    assert {one, replace(one)} == {one}
    assert "steps=5" in repr(one)
    data = json.loads(json.dumps(one.as_json()))
    assert GenerationRequest(**data) == one
    schema = TypeAdapter(GenerationRequest).json_schema()
    height = schema["properties"]["height"]
    assert height["description"] == "Height of an image."
    assert {"minimum": 8, "maximum": 8192, "type": "integer"} in height["anyOf"]
    assert schema["properties"]["sampler"]["enum"] == list(SAMPLERS)


def test_a_request_holds_pictures_by_their_pixels(tmp_path: Path) -> None:
    image = Image.radial_gradient("L").convert("RGB")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png")
    one, other = (request(init_image=tmp_path / name, strength=0.5) for name in ("a.png", "b.png"))
    assert one == other == request(init_image=image, strength=0.5) and hash(one) == hash(other)
    assert len(repr(one)) < 1000
    data = json.loads(json.dumps(one.as_json()))
    assert data["init_image"]["name"] == str(tmp_path / "a.png") and len(data["init_image"]["sha256"]) == 64
    assert GenerationRequest(**data) == one
    Image.new("RGB", (256, 256)).save(tmp_path / "a.png")
    with pytest.raises(InvalidRequestError, match="its pixels differ"):
        GenerationRequest(**data)


def test_a_models_defaults_fill_the_gaps_only() -> None:
    filled = request(width=256).resolve(**{**DEFAULTS, "height": 128})
    assert isinstance(filled, ResolvedRequest)
    assert (filled.height, filled.width, filled.steps, filled.guidance_scale) == (128, 256, 20, 3.0)
    assert request(steps=7, guidance_scale=0).resolve(**DEFAULTS).guidance_scale == 0
    assert filled.resolve(**DEFAULTS) == filled
    assert request(images_per_prompt=3).resolve(**DEFAULTS).batch_size == 3


@pytest.mark.parametrize("seed", [None, -1])
def test_a_random_seed_is_drawn_and_recorded(seed: int | None) -> None:
    seeds = {request(seed=seed).resolve(**DEFAULTS).seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(isinstance(s, int) and 0 <= s <= MAX_SEED for s in seeds)


def test_seeds_of_images() -> None:
    each = request(seed=MAX_SEED, seed_mode="per_image").resolve(**DEFAULTS)
    assert [each.seed_of(i) for i in range(3)] == [MAX_SEED, 0, 1]
    assert [replace(each, seed_mode="batch").seed_of(i) for i in range(3)] == [MAX_SEED] * 3


@settings(max_examples=60, deadline=None)
@given(size=st.integers(8, 8192), downsampling=st.sampled_from([4, 8]), halvings=st.integers(0, 3))
def test_sizes_are_floored_to_what_the_model_draws(size: int, downsampling: int, halvings: int) -> None:
    unit, cells = downsampling * 2**halvings, size // downsampling
    asked = replace(request(), height=size, width=8192)
    model: dict[str, Any] = {**DEFAULTS, "downsampling": downsampling, "halvings": halvings}
    if cells and cells % 2**halvings == 0:
        assert asked.resolve(**model).height == cells * downsampling
        return
    with pytest.raises(InvalidRequestError) as caught:
        asked.resolve(**model)
    assert caught.value.field == "height"
    near = [int(word) for word in caught.value.expected.split("nearest is ")[1].split(" or ")]
    assert near and all(n > 0 and n % unit == 0 and abs(n - size) < unit + downsampling for n in near)


def batches(**changes: Any) -> list[tuple[str, ...]]:
    return [batch.prompts for batch in request(**changes).resolve(**DEFAULTS).batches()]


def test_batches_are_those_of_flagai() -> None:
    assert batches(images_per_prompt=3, iterations=2) == [("a cat",) * 3] * 2
    assert batches(prompts=("a", "b"), images_per_prompt=2) == [("a", "a"), ("b", "b")]
    lines = {"prompts": tuple("abcde"), "images_per_prompt": 1, "batch_size": 2}
    assert batches(**lines) == [("a", "b"), ("c", "d"), ("e",)]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5), per_prompt=st.integers(1, 4), size=st.integers(1, 6) | st.none(), iterations=st.integers(1, 3)
)
def test_batches_lose_no_image(n: int, per_prompt: int, size: int | None, iterations: int) -> None:
    prompts = tuple(str(i) for i in range(n))
    asked = request(prompts=prompts, images_per_prompt=per_prompt, batch_size=size, iterations=iterations)
    made = list(asked.resolve(**DEFAULTS).batches())
    rows = [p for p in prompts for _ in range(per_prompt)]
    assert [p for batch in made for p in batch.prompts] == rows * iterations
    assert [i for batch in made for i in batch.indices] == list(range(len(rows) * iterations))
    assert all(0 < len(batch) <= (size or per_prompt) for batch in made)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("0.1-0.8", "0.1-0.8"), (" .10 - 0.80", "0.1-0.8"), ((0, 0.5), "0-0.5"), ("0-1", ""), ("", ""), (None, "")],
)
def test_a_part_of_the_way_is_written_in_one_way(typed: object, meant: str) -> None:
    found = request(guidance_interval=typed)
    assert found.guidance_interval == meant
    assert found.as_json().get("guidance_interval", "") == meant
    assert found.resolve(**DEFAULTS).guided_part == tuple(map(float, (meant or "0-1").split("-")))


@pytest.mark.parametrize(
    "typed", ["0.8-0.1", "0.5-0.5", "0.5", "0-1.1", "-0.1-0.5", "a-b", "nan-1", 0.5, (0, 2), [0.1]]
)
def test_what_is_no_part_of_the_way_is_refused(typed: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        request(guidance_interval=typed)
    assert caught.value.field == "guidance_interval"


def test_a_part_with_guidance_needs_guidance() -> None:
    with pytest.raises(InvalidRequestError, match="no effect with a guidance scale of 1"):
        request(guidance_interval="0.1-0.8", guidance_scale=1)
