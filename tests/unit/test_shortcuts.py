"""Less work, for another picture: how much is left out, of whom it is remembered, and that it can be drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flagai_altdiff import draw_to_folder, generate
from flagai_altdiff.engine import EagerEngine, PackedEngine
from flagai_altdiff.merging import likeness, merged
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.shortcuts import InnerMaps
from flagai_altdiff.output import redraw
from flagai_altdiff.pipeline import Sample, draw, prepare
from flagai_altdiff.records import read_any
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 10, "seed": 1}
ENGINES: dict[str, Callable[[LatentDiffusion], EagerEngine]] = {"eager": EagerEngine, "packed": PackedEngine}
LESS: dict[str, dict[str, Any]] = {
    "cache": {"cache_interval": 3},
    "interval": {"guidance_interval": "0.2-0.7"},
    "tokens": {"token_merging": 0.5},
    "all": {"cache_interval": 2, "guidance_interval": "0.2-0.7", "token_merging": 0.25},
}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def seen_by(engine: str, model: LatentDiffusion, part: str) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what a part of the UNet that an engine runs is given."""
    found: list[tuple[int, ...]] = []
    unet = ENGINES[engine](model).model.model.diffusion_model

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(tuple(inputs[0].shape))

    hook = unet.get_submodule(part).register_forward_pre_hook(look)
    try:
        yield found
    finally:
        hook.remove()


def pixels(model: LatentDiffusion, prompt: Any = tiny.CAT, **options: Any) -> list[Any]:
    return [np.asarray(image, int) for image in generate(model, prompt, **{**SMALL, **options}).images]


@pytest.mark.parametrize(("interval", "computed"), [(1, 10), (3, 4), (10, 1), (1000, 1)])
def test_the_inner_blocks_are_computed_in_one_of_so_many_steps(
    interval: int, computed: int, engine: str, m9: LatentDiffusion
) -> None:
    with seen_by(engine, m9, "middle_block") as inner, seen_by(engine, m9, "out.2") as outer:
        pixels(m9, cache_interval=interval, engine=engine)
        assert len(inner) == computed and len(outer) == 10
        assert {shape[0] for shape in outer} == {2}, "both sides of guidance"
        pixels(m9, cache_interval=interval, engine=engine, guidance_scale=1.0)
        assert len(inner) == 2 * computed, "nothing is left of another picture"
        assert {shape[0] for shape in outer[10:]} == {1}


def test_every_window_and_every_pass_has_maps_of_its_own(engine: str, m9: LatentDiffusion) -> None:
    with seen_by(engine, m9, "middle_block") as inner:
        pixels(m9, width=160, window=64, window_overlap=32, cache_interval=1000, engine=engine)
        assert len(inner) == 4, "one for each window"
        pixels(m9, hires=2, hires_strength=0.5, cache_interval=1000, engine=engine)
        assert len(inner) == 6, "one for each pass"
        pixels(m9, [tiny.CAT, "a " * 90], prompt_syntax="weighted", cache_interval=1000, engine=engine, batch_size=2)
        assert len(inner) == 8, "one for each length of prompts"


@pytest.mark.parametrize("sampler", ["heun", "dpm2", "dpmpp_sde", "plms"])
def test_a_sampler_that_asks_twice_has_no_more_maps(sampler: str, m9: LatentDiffusion) -> None:
    with seen_by("eager", m9, "middle_block") as inner, seen_by("eager", m9, "out.2") as asked:
        pixels(m9, sampler=sampler, cache_interval=2, engine="eager")
    assert len(asked) >= 11
    assert len(inner) <= len(asked) / 2 + 1


def maps(interval: int) -> tuple[InnerMaps, Callable[..., Tensor], list[int]]:
    kept, computed = InnerMaps(interval), list[int]()

    def ask(t: float, rows: tuple[int, ...], sides: int = 1, group: int = 77) -> Tensor:
        kept.turn_to(t)

        def compute() -> Tensor:
            computed.append(int(t))
            return torch.tensor([100.0 * t + 10 * side + row for side in range(sides) for row in rows])

        return kept.of(group, rows)(sides * len(rows), compute)

    return kept, ask, computed


def test_timesteps_are_counted_and_not_calls() -> None:
    _, ask, computed = maps(2)
    for t in (9, 8, 8, 7, 7, 6, 6, 5):  # as Heun asks
        ask(t, (0,))
    assert computed == [9, 7, 5]
    _, ask, computed = maps(1)
    for t in (9, 8, 8, 7):
        ask(t, (0,))
    assert computed == [9, 8, 8, 7], "without caching nothing is known, not even of the same timestep"


def test_rows_find_their_own_maps() -> None:
    _, ask, computed = maps(5)
    assert ask(9, (0, 1, 2), sides=2).tolist() == [900, 901, 902, 910, 911, 912]
    assert ask(8, (0, 2), sides=2).tolist() == [900, 902, 910, 912], "somebody has gone"
    assert ask(7, (1,)).tolist() == [911], "without guidance: the side of the prompts"
    assert computed == [9]
    assert ask(7, (0, 1), group=154).tolist() == [700, 701], "another length of prompts"
    _, ask, computed = maps(5)
    ask(9, (0, 1))
    assert ask(8, (0, 1), sides=2).tolist() == [800, 801, 810, 811], "guidance begins"
    assert computed == [9, 8]


@pytest.mark.parametrize(("interval", "guided"), [("0-0.5", 5), ("0.3-1", 7), ("0.2-0.4", 2), ("", 10)])
def test_guidance_costs_half_where_there_is_none(interval: str, guided: int, engine: str, m9: LatentDiffusion) -> None:
    with seen_by(engine, m9, "out.2") as seen:
        pixels(m9, guidance_interval=interval, engine=engine, images_per_prompt=2)
    rows = [shape[0] for shape in seen]
    assert sorted(rows) == [2] * (10 - guided) + [4] * guided
    assert rows[0] == (4 if interval in ("0-0.5", "") else 2)


@pytest.mark.parametrize(("share", "left"), [(0.0, 64), (0.25, 48), (0.5, 32), (0.75, 16)])
def test_so_many_tokens_look_at_each_other(share: float, left: int, engine: str, m9: LatentDiffusion) -> None:
    outer = "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
    inner = "middle_block.1.transformer_blocks.0.attn1.to_out.0"
    with seen_by(engine, m9, outer) as seen, seen_by(engine, m9, inner) as deep:
        pixels(m9, token_merging=share, engine=engine, steps=2)
    assert {shape[1] for shape in seen} == {left}
    assert {shape[1] for shape in deep} == {16}, "where maps are small all tokens stay"


@pytest.mark.parametrize("way", LESS)
def test_it_is_another_picture_and_the_same_again(way: str, engine: str, model: LatentDiffusion) -> None:
    (plain,), (first,), (again,) = (pixels(model, engine=engine, **less) for less in ({}, LESS[way], LESS[way]))
    assert (first == again).all()
    assert np.abs(first - plain).mean() > 0
    (packed,) = pixels(model, engine="packed" if engine == "eager" else "eager", **LESS[way])
    if "token_merging" not in LESS[way]:  # rounding chooses among tokens that are nearly as alike
        assert np.abs(first - packed).max() <= 2


WAYS: dict[str, dict[str, Any]] = {
    "picture": {"init_image": Image.new("RGB", (64, 64), "red"), "strength": 0.6},
    "mask": {"init_image": Image.new("RGB", (64, 64), "red"), "mask_image": "0,0,32,64", "strength": 1},
    "passes": {"hires": 2, "hires_strength": 0.5},
    "windows": {"width": 128, "window": 64, "window_overlap": 32},
    "seamless": {"seamless": "x"},
    "unguided": {"guidance_scale": 1.0, "guidance_interval": ""},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_goes_with_every_way_to_draw(way: str, engine: str, m9: LatentDiffusion) -> None:
    engine = "eager" if way == "seamless" else engine
    options = {"engine": engine, **LESS["all"], **WAYS[way]}
    assert all((a == b).all() for a, b in zip(pixels(m9, **options), pixels(m9, **options), strict=True))


@pytest.mark.parametrize("way", ["cache", "interval", "all"])
def test_company_changes_nobodys_picture(way: str, m9: LatentDiffusion) -> None:
    less = LESS[way] | {"token_merging": 0.0}
    alone = [
        prepare(m9, text, **SMALL, **less, guidance_scale=scale, engine="eager")[0]
        for text, scale in ((tiny.CAT, 3.0), (tiny.CASTLE, 7.0), ("", 2.0))
    ]
    assert len({likeness(request) for request in alone}) == 1
    dropped: set[int] = set()
    found: dict[int, Any] = {}
    for event in draw(m9, merged(alone), dropped=dropped):
        if isinstance(event, Sample):
            found[event.index] = np.asarray(event.image, int)
        elif event.index == 3:
            dropped.add(1)  # who goes away between two computations of the inner blocks
    assert found.keys() == {0, 2}
    for index, image in found.items():
        (own,) = (np.asarray(event.image, int) for event in draw(m9, alone[index]) if isinstance(event, Sample))
        assert np.abs(own - image).max() <= 1


@pytest.mark.parametrize("way", LESS)
def test_other_work_is_another_kind_of_request(way: str, m9: LatentDiffusion) -> None:
    requests = [prepare(m9, tiny.CAT, **SMALL, **less)[0] for less in ({}, LESS[way])]
    assert len({likeness(request) for request in requests}) == 2


@pytest.mark.parametrize("way", LESS)
def test_records_say_it_and_redraw_repeats_it(way: str, m9: LatentDiffusion, tmp_path: Path) -> None:
    result = draw_to_folder(m9, tiny.CAT, tmp_path / "first", **SMALL, **LESS[way])
    record = read_record(result.paths[0])
    for name in ("cache_interval", "guidance_interval", "token_merging"):
        assert record.get(name) == LESS[way].get(name)
    again = redraw(m9, record, tmp_path / "again")
    assert again.images[0].tobytes() == result.images[0].tobytes()
    if way == "tokens":
        with Image.open(result.paths[0]) as file:
            assert "Token merging ratio: 0.5" in file.info["parameters"]
    assert read_any(result.paths[0]).options.get("token_merging") == LESS[way].get("token_merging")


def test_what_scripts_put_in_place_of_a_unet_is_asked_as_ever(
    m9: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, asked = m9.apply_model, list[int]()

    def apply_model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        asked.append(len(x))
        return own(x, t, cond)

    monkeypatch.setattr(m9, "apply_model", apply_model)
    pixels(m9, engine="eager", steps=2)
    assert asked == [2, 2]
