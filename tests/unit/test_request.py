"""GenerationRequest: every option once, every value outside its range refused with the nearest one that works."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, UnknownSamplerError
from flagai_altdiff.request import MAX_SEED, SAMPLER_NAMES, GenerationRequest, Option, option_of, parse_prompt_file

RANGES = {f.name: option_of(f.name) for f in fields(GenerationRequest) if option_of(f.name).minimum is not None}


def request(**changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompts": ("a cat",), **changes})


def integer(name: str) -> bool:
    return name not in ("guidance_scale", "eta")


def test_every_field_has_an_option() -> None:
    for f in fields(GenerationRequest):
        option = f.metadata["option"]
        assert isinstance(option, Option)
        assert option.help.endswith(".")
        assert option.legacy
    assert len(RANGES) == 9


@pytest.mark.parametrize("name", RANGES)
def test_both_ends_of_a_range_are_valid(name: str) -> None:
    option = RANGES[name]
    for value in (option.minimum, option.maximum):
        assert getattr(request(**{name: value}), name) == value


@pytest.mark.parametrize("name", RANGES)
def test_values_beside_a_range_are_refused_with_the_nearest(name: str) -> None:
    option = RANGES[name]
    assert option.minimum is not None and option.maximum is not None
    step = 1 if integer(name) else 0.001
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


@pytest.mark.parametrize("name", [n for n in RANGES if integer(n)])
def test_whole_numbers_are_not_rounded(name: str) -> None:
    with pytest.raises(InvalidRequestError, match="whole number"):
        request(**{name: 16.5})


@pytest.mark.parametrize("name", ["iterations", "images_per_prompt", "eta"])
def test_none_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(InvalidRequestError):
        request(**{name: None})


@pytest.mark.parametrize("prompts", [(), ("a", 7), (None,), (b"a",), None, 7, (["a", "b"],)])
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
    assert all(name in str(caught.value) for name in SAMPLER_NAMES)
    assert isinstance(caught.value, FlagAIAltDiffError)


def test_seed_modes() -> None:
    assert request(seed_mode="per_image").seed_mode == "per_image"
    with pytest.raises(InvalidRequestError, match="batch, per_image"):
        request(seed_mode="other")


@pytest.mark.parametrize("sampler", [s for s in SAMPLER_NAMES if s != "ddim"])
def test_only_ddim_takes_an_eta(sampler: str) -> None:
    assert request(sampler="ddim", eta=1.0).eta == 1.0
    with pytest.raises(InvalidRequestError, match=sampler.upper()) as caught:
        request(sampler=sampler, eta=0.5)
    assert caught.value.field == "eta"


def test_errors_are_value_errors_and_short() -> None:
    with pytest.raises(ValueError, match=r"\.\.\.") as caught:
        request(images_per_prompt="9" * 1000)
    assert len(str(caught.value)) < 300


def test_a_models_defaults_fill_the_gaps_only() -> None:
    defaults = {"height": 128, "width": 64, "steps": 20, "guidance_scale": 3.0}
    filled = request(width=256).with_defaults(**defaults)
    assert (filled.height, filled.width, filled.steps, filled.guidance_scale) == (128, 256, 20, 3.0)
    assert request(steps=7, guidance_scale=0).with_defaults(**defaults).guidance_scale == 0


@pytest.mark.parametrize("seed", [None, -1])
def test_a_random_seed_is_drawn_and_recorded(seed: int | None) -> None:
    defaults = {"height": 64, "width": 64, "steps": 20, "guidance_scale": 3.0}
    seeds = {request(seed=seed).with_defaults(**defaults).seed for _ in range(4)}
    assert len(seeds) > 1
    assert all(isinstance(s, int) and 0 <= s <= MAX_SEED for s in seeds)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(8, 8192), downsampling=st.sampled_from([4, 8]), halvings=st.integers(0, 3))
def test_sizes_are_floored_to_what_the_model_draws(size: int, downsampling: int, halvings: int) -> None:
    unit, cells = downsampling * 2**halvings, size // downsampling
    asked = replace(request(), height=size, width=8192)
    if cells and cells % 2**halvings == 0:
        assert asked.fitted(downsampling, halvings).height == cells * downsampling
        return
    with pytest.raises(InvalidRequestError) as caught:
        asked.fitted(downsampling, halvings)
    assert caught.value.field == "height"
    near = [int(word) for word in caught.value.expected.split("nearest is ")[1].split(" or ")]
    assert near and all(n > 0 and n % unit == 0 and abs(n - size) < unit + downsampling for n in near)


def test_batches_are_those_of_flagai() -> None:
    one = request(images_per_prompt=3, iterations=2)
    assert list(one.batches()) == [("a cat",) * 3] * 2
    two = request(prompts=("a", "b"), images_per_prompt=2)
    assert list(two.batches()) == [("a", "a"), ("b", "b")]
    lines = request(prompts=tuple("abcde"), images_per_prompt=1, batch_size=2)
    assert list(lines.batches()) == [("a", "b"), ("c", "d"), ("e",)]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), per_prompt=st.integers(1, 4), size=st.integers(1, 6) | st.none(), iterations=st.integers(1, 3))
def test_batches_lose_no_picture(n: int, per_prompt: int, size: int | None, iterations: int) -> None:
    prompts = tuple(str(i) for i in range(n))
    batches = list(request(prompts=prompts, images_per_prompt=per_prompt, batch_size=size, iterations=iterations).batches())
    rows = [p for p in prompts for _ in range(per_prompt)]
    assert [p for batch in batches for p in batch] == rows * iterations
    assert all(0 < len(batch) <= (size or per_prompt) for batch in batches)


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"a cat\r\na dog", ["a cat", "a dog"]),
        (b"\xef\xbb\xbfa cat\n", ["a cat"]),
        (b"\n\na cat\n  \n\t\na dog\n\n", ["a cat", "a dog"]),
        ("一只猫\nقطة\n".encode(), ["一只猫", "قطة"]),
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
        ("a cat\r\n一只猫\r\n".encode("utf-16"), ["a cat", "一只猫"]),
        (b"\xfe\xff" + "قطة".encode("utf-16-be"), ["قطة"]),
    ],
)
def test_prompt_files(data: bytes, prompts: list[str]) -> None:
    assert parse_prompt_file(data, "p.txt") == prompts


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("data", "line", "encoding"),
    [
        ("a cat\n一只戴着帽子的猫\n".encode("gbk"), "line 2 ", "GB18030"),
        ("a\nb\n\n帽子\n".encode("gbk"), "line 4 ", "GB18030"),
        ("a cat\n".encode("utf-16-le"), "NUL ", "UTF-16LE"),
        ("a cat\n".encode("utf-16-be"), "NUL ", "UTF-16BE"),
        (b"a\xff", "line 1 ", "ISO-8859-1"),
        ("a cat\nun corazón rojo\n".encode("latin-1"), "line 2 ", "ISO-8859-1"),
        (b"\xff\xfea\0b", "line 1 ", "UTF-16LE"),
    ],
)
def test_a_prompt_file_of_another_encoding_is_refused_with_its_line(data: bytes, line: str, encoding: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"{line}.*iconv -f {encoding} -t UTF-8 p\.txt > p\.utf8\.txt$") as caught:
        parse_prompt_file(data, "p.txt")
    assert caught.value.field == "from_file"
    assert "p.txt" in str(caught.value)


@pytest.mark.fault(49)
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_a_prompt_file_without_prompts_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="no prompt"):
        parse_prompt_file(data, "p.txt")
