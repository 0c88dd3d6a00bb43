"""What a saved picture knows about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from flagai_altdiff import Predictor
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from tests import tiny

IMITATION = 'a cat\nNegative prompt: none\nSteps: 1, Sampler: Euler, Seed: 666, Size: 1x1\n{"seed": 666, "prompt": "x"}'


def saved(model: LatentDiffusion, folder: Path, prompt: str, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "n_samples": 1,
        "ddim_steps": 1,
        "H": 64,
        "W": 64,
        "outpath": folder,
        "skip_grid": True,
    }
    return Predictor(model).predict_generate_images(prompt, **{**arguments, **changes}).paths[0]


def texts(path: Path) -> dict[str, str]:
    with Image.open(path) as image:
        image.load()
        found: dict[str, str] = image.text  # type: ignore[attr-defined]
    return found


def record(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(texts(path)["flagai_altdiff"])
    return data


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "prompt", [tiny.CAT, tiny.SENTENCES[5], tiny.SENTENCES[6], IMITATION, "👩‍👩‍👧", "a\x00b", "\u202eabc"]
)
def test_any_prompt_survives(prompt: str, m9: LatentDiffusion, tmp_path: Path) -> None:
    path = saved(m9, tmp_path, prompt, negative_prompt=prompt, seed=41)
    assert record(path)["prompt"] == prompt
    assert record(path)["negative_prompt"] == prompt
    assert record(path)["seed"] == 41
    assert texts(path)["parameters"].startswith(prompt)


def test_texts_are_international_chunks(m9: LatentDiffusion, tmp_path: Path) -> None:
    path = saved(m9, tmp_path, tiny.SENTENCES[5])
    data = path.read_bytes()
    assert b"iTXt" in data and b"tEXt" not in data
    assert tiny.SENTENCES[5].encode() in data
    assert all(isinstance(v, PngImagePlugin.iTXt) for v in texts(path).values())


@pytest.mark.fault(50)
def test_the_record_has_all_that_draws_the_picture_again(m9: LatentDiffusion, tmp_path: Path) -> None:
    settings = {"seed": 5, "scale": 3.0, "ddim_eta": 0.5, "ddim_steps": 2, "seed_mode": "per_image"}
    path = saved(m9, tmp_path, tiny.CAT, negative_prompt="bad", **settings)
    known = record(path)
    again = saved(
        m9,
        tmp_path,
        known["prompt"],
        seed=known["seed"],
        negative_prompt=known["negative_prompt"],
        scale=known["guidance_scale"],
        ddim_eta=known["eta"],
        ddim_steps=known["steps"],
        seed_mode=known["seed_mode"],
        sampler=known["sampler"],
        H=known["height"],
        W=known["width"],
    )
    assert Image.open(again).tobytes() == Image.open(path).tobytes()
    assert known["safety"] == "unchecked"
    assert known["version"] and "prompts" not in known


def test_each_picture_has_its_own_prompt_seed_and_number(m9: LatentDiffusion, tmp_path: Path) -> None:
    size = {"H": 64, "W": 64}
    arguments: dict[str, Any] = {"n_samples": 1, "ddim_steps": 1, "outpath": tmp_path, "seed": 9, **size}
    arguments["seed_mode"] = "per_image"
    result = Predictor(m9).predict_generate_images([tiny.CAT, tiny.CASTLE], **arguments)
    found = [record(p) for p in result.paths]
    assert [r["prompt"] for r in found] == [tiny.CAT, tiny.CASTLE]
    assert [r["seed"] for r in found] == [9, 10]
    assert [r["index"] for r in found] == [0, 1]
    assert {r["request_seed"] for r in found} == {9}


def test_parameters_have_the_form_that_other_tools_read(m9: LatentDiffusion, tmp_path: Path) -> None:
    lines = texts(saved(m9, tmp_path, tiny.CAT, negative_prompt="bad", seed=7, scale=7.5))["parameters"].split("\n")
    assert lines[:2] == [tiny.CAT, "Negative prompt: bad"]
    assert lines[2].startswith("Steps: 1, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 64x64")


def test_a_megabyte_of_prompt_leaves_a_file_that_opens(m9: LatentDiffusion, tmp_path: Path) -> None:
    """Readers refuse text chunks of more than a mebibyte."""
    prompt = "a cat 猫 " * 110_000
    try:
        path = saved(m9, tmp_path, prompt)
    except InvalidRequestError:
        assert list(tmp_path.iterdir()) == []
    else:
        assert texts(path)["parameters"]
