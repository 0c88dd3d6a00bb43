"""FlagAI's call: its arguments, its files, its random numbers, and errors before anything is drawn or written."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

from flagai_altdiff import GenerationRequest, Predictor, generate
from flagai_altdiff.errors import InvalidRequestError, NotFiniteError, UnknownSamplerError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import GenerationResult
from flagai_altdiff.sampling import SAMPLERS, Step
from flagai_altdiff.sampling.schedule import timestep_grid
from tests import tiny

SMALL: dict[str, Any] = {"n_samples": 2, "ddim_steps": 2, "H": 64, "W": 64}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def predictor(m9: LatentDiffusion) -> Predictor:
    return Predictor(m9)


def draw(predictor: Predictor, prompt: Any = tiny.CAT, **changes: Any) -> GenerationResult:
    return predictor.predict_generate_images(prompt, **{**SMALL, **changes})


def files(folder: str = ".") -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def pixels(result: GenerationResult) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(image).astype(int) for image in result.images]


def test_positional_arguments_are_flagais() -> None:
    parameters = inspect.signature(Predictor.predict_generate_images).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert (
        positional
        == (
            "self prompt outpath n_samples n_rows skip_grid skip_save ddim_steps n_iter plms fixed_code ddim_eta "
            "H W C f scale from_file seed negative_prompt"
        ).split()
    )
    defaults = {p.name: p.default for p in parameters}
    flagai = {
        "outpath": "AltDiffusionOutputs",
        "n_samples": 4,
        "n_rows": 0,
        "n_iter": 1,
        "seed": 34234,
        "ddim_eta": 0.0,
    }
    assert {name: defaults[name] for name in flagai} == flagai


def test_files_are_named_as_flagai_names_them(predictor: Predictor) -> None:
    result = draw(predictor)
    assert files() == [
        "AltDiffusionOutputs/grid-0000.png",
        "AltDiffusionOutputs/samples/00000.png",
        "AltDiffusionOutputs/samples/00001.png",
    ]
    assert [p.name for p in result.paths] == ["00000.png", "00001.png"]
    assert result.grid_path is not None and Image.open(result.grid_path).size == (2 + 2 * 66, 68)
    for path, image in zip(result.paths, result.images, strict=True):
        assert Image.open(path).convert("RGB").tobytes() == image.tobytes()
    draw(predictor, n_samples=1)
    assert files("AltDiffusionOutputs") == [
        "grid-0000.png",
        "grid-0001.png",
        "samples/00000.png",
        "samples/00001.png",
        "samples/00002.png",
    ]
    assert Image.open("AltDiffusionOutputs/grid-0001.png").size == (64, 64)


def test_pictures_depend_on_prompt_negative_prompt_seed_and_scale(predictor: Predictor) -> None:
    base = pixels(draw(predictor))
    assert all((a == b).all() for a, b in zip(base, pixels(draw(predictor)), strict=True))
    assert np.abs(base[0] - base[1]).mean() > 5
    for changes in (
        {"prompt": tiny.CASTLE},
        {"negative_prompt": "bad hands"},
        {"seed": 1},
        {"scale": 2.0},
        {"plms": True},
    ):
        other = pixels(draw(predictor, **{"ddim_steps": 3, **changes}))
        assert np.abs(other[0] - pixels(draw(predictor, ddim_steps=3))[0]).mean() > 1, changes


def test_at_scale_1_the_negative_prompt_has_no_effect(predictor: Predictor) -> None:
    a, b = (draw(predictor, scale=1.0, negative_prompt=text).images[0].tobytes() for text in ("", "bad hands"))
    assert a == b


@pytest.mark.parametrize(("alias", "name", "value"), [("out_path", "outpath", "there"), ("ddim_step", "ddim_steps", 3)])
def test_names_of_flagais_readme_work_too(alias: str, name: str, value: object, predictor: Predictor) -> None:
    seen: list[int] = []
    result = draw(predictor, **{alias: value}, callback=lambda step: seen.append(step.total))
    assert set(seen) == {3 if name == "ddim_steps" else 2} - {3} | (
        {len(timestep_grid(3))} if name == "ddim_steps" else set()
    )
    assert result.paths[0].parts[0] == ("there" if name == "outpath" else "AltDiffusionOutputs")


def test_grid_and_samples_can_be_left_out(predictor: Predictor) -> None:
    assert draw(predictor, skip_grid=True, outpath="a").grid_path is None
    assert files("a") == ["samples/00000.png", "samples/00001.png"]
    assert draw(predictor, skip_save=True, outpath="b").paths == []
    assert files("b") == ["grid-0000.png"]
    assert len(draw(predictor, skip_save=True, skip_grid=True, outpath="c").images) == 2
    assert not Path("c").exists()


def test_n_rows_is_the_number_of_pictures_per_row(predictor: Predictor) -> None:
    result = draw(predictor, n_samples=3, n_rows=2, ddim_steps=1)
    assert result.grid_path is not None and Image.open(result.grid_path).size == (2 + 2 * 66, 2 + 2 * 66)


def test_a_list_draws_n_samples_of_each(predictor: Predictor) -> None:
    result = draw(predictor, [tiny.CAT, tiny.CASTLE])
    assert [s.prompt for s in result.samples] == [tiny.CAT] * 2 + [tiny.CASTLE] * 2
    assert pixels(draw(predictor))[0].tolist() == pixels(result)[0].tolist()


@pytest.mark.fault(49)
def test_a_prompt_file_is_cut_into_batches_and_the_last_may_be_short(predictor: Predictor) -> None:
    Path("p.txt").write_bytes("\ufeffa cat\r\n\r\n一只狗\r\na house\r\n".encode())
    result = draw(predictor, "ignored", from_file="p.txt")
    assert [s.prompt for s in result.samples] == ["a cat", "一只狗", "a house"]
    assert len(result.paths) == 3
    with_list = draw(predictor, ["a cat", "一只狗", "a house"], n_samples=1)
    assert (pixels(with_list)[1] != pixels(result)[1]).any()  # other draws: one row at a time


def test_iterations_go_on_drawing(predictor: Predictor) -> None:
    result = draw(predictor, n_samples=1, n_iter=3)
    assert len(result.paths) == 3
    assert len({image.tobytes() for image in result.images}) == 3
    assert result.images[0].tobytes() == draw(predictor, n_samples=1).images[0].tobytes()


def test_a_fixed_code_starts_every_iteration_alike(predictor: Predictor) -> None:
    result = draw(predictor, n_iter=2, fixed_code=True)
    first, second = pixels(result)[:2], pixels(result)[2:]
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert (first[0] != first[1]).any()


@pytest.fixture
def generators(monkeypatch: pytest.MonkeyPatch) -> list[torch.Generator]:
    """The generators that calls make, in order; they go on counting after the call."""
    made: list[torch.Generator] = []

    class Remembered(torch.Generator):
        def __init__(self, device: torch.device | str = "cpu") -> None:
            made.append(self)

    monkeypatch.setattr(torch, "Generator", Remembered)
    return made


@pytest.mark.parametrize(
    ("changes", "draws"),
    [
        ({}, 1 + 2),
        ({"plms": True}, 2 + 2),
        ({"fixed_code": True}, 1 + 2),
        ({"fixed_code": True, "plms": True}, 1 + 3),
        ({"n_iter": 2}, 2 * (1 + 2)),
        ({"n_iter": 2, "fixed_code": True}, 1 + 2 * 2),
        ({"ddim_eta": 0.7}, 1 + 2),
        ({"scale": 1.0}, 1 + 2),
        ({"ddim_steps": 6}, 1 + 7),
        ({"prompt": [tiny.CAT, tiny.CASTLE]}, 2 * (1 + 2)),
    ],
)
def test_the_generator_is_drawn_from_as_often_as_by_flagai(
    changes: dict[str, Any], draws: int, predictor: Predictor, generators: list[torch.Generator]
) -> None:
    draw(predictor, **{"seed": 77, **changes})
    torch.manual_seed(77)
    for _ in range(draws):
        torch.randn(2, 4, 8, 8)
    assert torch.equal(torch.rand(4, generator=generators[0]), torch.rand(4))


def test_a_short_batch_draws_its_own_rows(predictor: Predictor, generators: list[torch.Generator]) -> None:
    Path("p.txt").write_text("a\nb\nc\n")
    draw(predictor, from_file="p.txt", seed=77)
    torch.manual_seed(77)
    for rows in (2, 2, 2, 1, 1, 1):
        torch.randn(rows, 4, 8, 8)
    assert torch.equal(torch.rand(4, generator=generators[0]), torch.rand(4))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(sampler: str, predictor: Predictor) -> None:
    result = draw(predictor, sampler=sampler, n_samples=1)
    assert result.request.sampler == sampler
    record = json.loads(Image.open(result.paths[0]).text["flagai_altdiff"])  # type: ignore[attr-defined]
    assert record["sampler"] == sampler
    by_flag = draw(predictor, plms=True, n_samples=1)
    assert (by_flag.images[0].tobytes() == result.images[0].tobytes()) == (sampler == "plms")


@pytest.mark.fault(46)
@pytest.mark.parametrize(
    ("size", "drawn"), [({"H": 70}, (64, 64)), ({"W": 71}, (64, 64)), ({"H": 85, "W": 64}, (64, 80))]
)
def test_sizes_are_floored_with_a_warning(
    size: dict[str, int], drawn: tuple[int, int], predictor: Predictor, caplog: pytest.LogCaptureFixture
) -> None:
    result = draw(predictor, **size)
    assert result.images[0].size == drawn
    warning = next(r for r in caplog.records if r.levelno == logging.WARNING and "latent" in r.getMessage())
    assert f"{drawn[0]}x{drawn[1]}" in warning.getMessage()
    assert str(next(iter(size.values()))) in warning.getMessage()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"H": 72}, "H"),
    ({"W": 7}, "W"),
    ({"H": 0}, "H"),
    ({"W": -64}, "W"),
    ({"H": 10**5}, "H"),
    ({"W": 64.0}, "W"),
    ({"H": True}, "H"),
    ({"C": 3}, "C"),
    ({"f": 16}, "f"),
    ({"ddim_steps": 0}, "ddim_steps"),
    ({"ddim_steps": 1001}, "ddim_steps"),
    ({"ddim_steps": 10**400}, "ddim_steps"),
    ({"ddim_step": 0}, "ddim_step"),
    ({"n_samples": 0}, "n_samples"),
    ({"n_samples": 10**6}, "n_samples"),
    ({"n_samples": "2"}, "n_samples"),
    ({"n_rows": -1}, "n_rows"),
    ({"n_rows": 1.5}, "n_rows"),
    ({"n_rows": "2"}, "n_rows"),
    ({"n_iter": 0}, "n_iter"),
    ({"scale": math.nan}, "scale"),
    ({"scale": math.inf}, "scale"),
    ({"scale": -1}, "scale"),
    ({"scale": "7"}, "scale"),
    ({"ddim_eta": 1.5}, "ddim_eta"),
    ({"ddim_eta": 0.5, "plms": True}, "ddim_eta"),
    ({"sampler": "ddim", "plms": True}, "plms"),
    ({"seed": -2}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"seed_mode": "other"}, "seed_mode"),
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 7}, "prompt"),
    ({"prompt": [["a", "b"]]}, "prompt"),
    ({"prompt": b"a cat"}, "prompt"),
    ({"prompt": "half \ud83d"}, "prompt"),
    ({"negative_prompt": 7}, "negative_prompt"),
    ({"outpath": 7}, "outpath"),
    ({"from_file": "no-such-file.txt"}, "from_file"),
    ({"from_file": "."}, "from_file"),
]


@pytest.mark.fault(46)
@pytest.mark.fault(47)
@pytest.mark.parametrize(("changes", "name"), BAD, ids=[f"{n}-{i}" for i, (_, n) in enumerate(BAD)])
def test_bad_arguments_are_named_before_any_folder_exists(
    changes: dict[str, Any], name: str, predictor: Predictor
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(InvalidRequestError) as caught:
        draw(predictor, **changes)
    assert caught.value.field == name
    assert str(caught.value).startswith(f"{name}=")
    assert os.listdir() == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def overflowing(m9: LatentDiffusion) -> LatentDiffusion:
    """A model whose decoder leaves the range of half precision, and nothing else does."""
    model = copy.deepcopy(m9)
    with torch.no_grad():
        model.first_stage_model.decoder.conv_in.weight.mul_(1e5)
    return model


@pytest.mark.fault(51)
def test_a_picture_that_half_precision_cannot_hold_is_decoded_again(
    overflowing: LatentDiffusion, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = draw(Predictor(overflowing))
    assert "float32" not in caplog.text
    with torch.autocast("cpu", torch.float16):
        result = draw(Predictor(overflowing))
    assert "decoding again in float32" in caplog.text
    assert all(np.abs(a - b).mean() < 4 for a, b in zip(pixels(result), pixels(wanted), strict=True))
    caplog.clear()
    overflowing.first_stage_model.half()
    result = draw(Predictor(overflowing))
    assert "decoding again in float32" in caplog.text
    assert all(np.abs(a - b).mean() < 4 for a, b in zip(pixels(result), pixels(wanted), strict=True))


@pytest.mark.fault(51)
def test_what_is_no_picture_in_any_precision_is_an_error(m9: LatentDiffusion, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(m9)
    with torch.no_grad():
        model.first_stage_model.decoder.get_parameter("conv_out.bias").fill_(math.nan)
    with pytest.raises(NotFiniteError, match="weights"):
        draw(Predictor(model))
    assert "decoding again" not in caplog.text
    with torch.no_grad():
        model.model.diffusion_model.get_parameter("out.2.bias").fill_(math.inf)
    with pytest.raises(NotFiniteError, match="guidance scale"):
        draw(Predictor(model))
    assert files() == []


def test_an_unknown_sampler_is_named(predictor: Predictor) -> None:
    with pytest.raises(UnknownSamplerError, match="ddim"):
        draw(predictor, sampler="dddim")
    assert os.listdir() == []


def test_a_prompt_file_of_another_encoding_is_named_with_its_line(predictor: Predictor) -> None:
    Path("p.txt").write_bytes("a cat\n一只戴着帽子的猫\n".encode("gbk"))
    with pytest.raises(InvalidRequestError, match=r"p\.txt.*line 2"):
        draw(predictor, from_file="p.txt")
    assert os.listdir() == ["p.txt"]


@pytest.mark.fault(54)
def test_an_outpath_that_is_a_file(predictor: Predictor, m9: LatentDiffusion) -> None:
    Path("taken").write_text("mine")
    with pytest.raises(OSError, match="taken"):
        draw(predictor, outpath="taken", callback=lambda step: pytest.fail("it drew"))
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize("seed", [-1, None])
def test_a_random_seed_is_recorded_and_draws_the_same_again(seed: int | None, predictor: Predictor) -> None:
    first, second = (draw(predictor, seed=seed, n_samples=1) for _ in range(2))
    assert first.request.seed != second.request.seed
    assert first.seeds == [first.request.seed]
    again = draw(predictor, seed=first.request.seed, n_samples=1)
    assert again.images[0].tobytes() == first.images[0].tobytes()


@pytest.mark.fault(50)
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_seeds_per_image_do_not_depend_on_the_batch(sampler: str, predictor: Predictor) -> None:
    eta = 0.8 if sampler == "ddim" else 0.0
    together = draw(predictor, n_samples=3, seed=5, seed_mode="per_image", sampler=sampler, ddim_eta=eta)
    assert together.seeds == [5, 6, 7]
    for i, seed in enumerate(together.seeds):
        alone = draw(predictor, n_samples=1, seed=seed, seed_mode="per_image", sampler=sampler, ddim_eta=eta)
        assert np.abs(pixels(alone)[0] - pixels(together)[i]).max() <= 1
    by_iteration = draw(predictor, n_samples=1, n_iter=3, seed=5, seed_mode="per_image", sampler=sampler, ddim_eta=eta)
    assert by_iteration.seeds == [5, 6, 7]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(pixels(by_iteration), pixels(together), strict=True))
    assert draw(predictor, n_samples=2, seed=2**32 - 1, seed_mode="per_image").seeds == [2**32 - 1, 0]


@pytest.mark.fault(53)
def test_ctrl_c_keeps_finished_pictures_and_leaves_no_partial_file(predictor: Predictor) -> None:
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if len(seen) == 4:
            raise KeyboardInterrupt

    try:
        draw(predictor, n_iter=3, callback=stop)
        pytest.fail("not interrupted")
    except KeyboardInterrupt:
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert files() == ["AltDiffusionOutputs/samples/00000.png", "AltDiffusionOutputs/samples/00001.png"]
    for name in files():
        Image.open(name).load()
    draw(predictor, n_samples=1)
    assert "AltDiffusionOutputs/samples/00002.png" in files()


def test_a_callback_sees_every_step_and_may_use_gradients(predictor: Predictor) -> None:
    steps: list[Step] = []

    def look(step: Step) -> None:
        assert torch.is_grad_enabled()
        weight = torch.ones(1, requires_grad=True)
        (weight * step.x.clone().sum()).backward()
        steps.append(step)

    draw(predictor, n_samples=1, n_iter=2, ddim_steps=6, callback=look)
    assert [s.index for s in steps] == [*range(7)] * 2
    assert {s.x.shape for s in steps} == {(1, 4, 8, 8)}
    assert {s.total for s in steps} == {7}


@pytest.mark.fault(48)
def test_a_long_prompt_is_reported_with_what_is_lost(predictor: Predictor, caplog: pytest.LogCaptureFixture) -> None:
    draw(predictor, "a cat on a hill " * 30 + "THE END", n_samples=1)
    lines = [r.getMessage() for r in caplog.records if "77 tokens" in r.getMessage()]
    assert len(lines) == 1 and "THE END" in lines[0]
    caplog.clear()
    draw(predictor, "a cat on a hill " * 60_000, n_samples=1, ddim_steps=1)
    (line,) = [r.getMessage() for r in caplog.records if "77 tokens" in r.getMessage()]
    assert "characters have no effect" in line and len(line) < 1000


ODD = ("", "   ", "a\x00b", "line\nline", "((cat:1.5", "👩‍👩‍👧 🐈", "<pad>", "</s> <s> <mask>", "%05d {x}")


@pytest.mark.fault(48)
@pytest.mark.parametrize("prompt", ODD)
def test_odd_prompts_are_drawn(prompt: str, predictor: Predictor) -> None:
    result = draw(predictor, prompt, n_samples=1, ddim_steps=1)
    assert json.loads(Image.open(result.paths[0]).text["flagai_altdiff"])["prompt"] == prompt  # type: ignore[attr-defined]


def test_defaults_come_from_the_models_spec(predictor: Predictor, m9: LatentDiffusion) -> None:
    from dataclasses import replace

    before = m9.spec
    m9.spec = replace(before, height=64, width=80, steps=1, guidance_scale=2.5)
    try:
        result = predictor.predict_generate_images(tiny.CAT, n_samples=1)
    finally:
        m9.spec = before
    request = result.request
    assert (request.height, request.width, request.steps, request.guidance_scale) == (64, 80, 1, 2.5)
    assert result.images[0].size == (80, 64)


def test_generate_gives_the_same_pictures_and_writes_nothing(predictor: Predictor, m9: LatentDiffusion) -> None:
    options: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 34234, "seed_mode": "batch"}
    result = generate(m9, GenerationRequest(prompts=(tiny.CAT,), images_per_prompt=2, guidance_scale=7.5, **options))
    assert os.listdir() == []
    assert result.paths == [] and result.grid_path is None
    assert [i.tobytes() for i in result.images] == [i.tobytes() for i in draw(predictor).images]
    assert result.seconds > 0


def test_a_predictor_needs_a_model(m9: LatentDiffusion) -> None:
    with pytest.raises(TypeError, match="LatentDiffusion"):
        Predictor("AltDiffusion-m9")  # type: ignore[arg-type]
    assert Predictor(m9, m9.tokenizer).tokenizer is m9.tokenizer


@pytest.fixture
def parameterization(m9: LatentDiffusion) -> Iterator[LatentDiffusion]:
    yield m9
    m9.parameterization = "eps"


@pytest.mark.parametrize("kind", ["v", "x0"])
def test_other_parameterizations_draw_other_images(kind: Literal["v", "x0"], parameterization: LatentDiffusion) -> None:
    predictor = Predictor(parameterization)
    base = draw(predictor, n_samples=1).images[0].tobytes()
    parameterization.parameterization = kind
    assert draw(predictor, n_samples=1).images[0].tobytes() != base
