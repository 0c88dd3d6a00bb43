"""What files say of their making: ours to the same pixels again, other programs' as far as they say enough."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flagai_altdiff import Sample, draw_to_folder
from flagai_altdiff.cli import main
from flagai_altdiff.errors import ImageError, InvalidRequestError
from flagai_altdiff.images import read_texts, save_png
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.output import redraw
from flagai_altdiff.records import read_any
from flagai_altdiff.request import GenerationRequest
from tests import tiny
from tests.cost import in_proportion

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}

A1111 = """a (cat:1.2), masterpiece
in two lines
Negative prompt: lowres, "bad"
Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 4294967295, Size: 512x768, \
Model hash: abc123, Model: "some, model", Variation seed: 5, Variation seed strength: 0.25, Clip skip: 2, \
Denoising strength: 0.4, Hires upscale: 1.5, Hires upscaler: Latent, Version: v1.10.1"""
COMFYUI: dict[str, dict[str, Any]] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 7,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler_ancestral",
            "scheduler": "karras",
            "denoise": 1,
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["8", 0], "conditioning_2": ["8", 0]}},
    "8": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
}
INVOKEAI = {
    "positive_prompt": "a cat",
    "negative_prompt": "",
    "steps": 30,
    "cfg_scale": 7.5,
    "seed": 11,
    "width": 512,
    "height": 512,
    "scheduler": "dpmpp_2m_sde_k",
    "model": {"name": "Deliberate"},
}


def written(path: Path, texts: dict[str, str]) -> Path:
    save_png(Image.new("RGB", (8, 8)), texts, path)
    return path


def test_a1111s_text(tmp_path: Path) -> None:
    record = read_any(written(tmp_path / "a.png", {"parameters": A1111}))
    assert record.program == "A1111" and record.model == "some, model"
    assert record.options == {
        "prompts": ["a (cat:1.2), masterpiece\nin two lines"],
        "negative_prompt": 'lowres, "bad"',
        "steps": 25,
        "seed": 2**32 - 1,
        "guidance_scale": 6.5,
        "prompt_syntax": "weighted",
        "sampler": "dpmpp_2m",
        "grid": "karras",
        "width": 512,
        "height": 768,
        "variation_strength": 0.25,
        "variation_seed": 5,
        "hires": 1.5,
        "hires_strength": 0.4,
        "hires_upscaler": "latent",
    }
    assert record.lost == ("Clip skip: 2",)
    GenerationRequest(**record.options)
    old = A1111.replace("DPM++ 2M, Schedule type: Karras", "DPM++ 2M Karras")
    assert read_any(written(tmp_path / "b.png", {"parameters": old})).options["grid"] == "karras"
    strange = A1111.replace("DPM++ 2M, Schedule type: Karras", "LMS")
    assert "Sampler: LMS (ddim in its place)" in read_any(written(tmp_path / "c.png", {"parameters": strange})).lost


def test_comfyuis_graph_and_invokeais_metadata(tmp_path: Path) -> None:
    comfy = read_any(written(tmp_path / "a.png", {"prompt": json.dumps(COMFYUI)}))
    assert (comfy.program, comfy.model) == ("ComfyUI", "sd15.safetensors")
    assert comfy.options["prompts"] == ["a cat"] and comfy.options["negative_prompt"] == "blurry"
    assert (comfy.options["sampler"], comfy.options["grid"]) == ("euler_ancestral", "karras")
    assert (comfy.options["width"], comfy.options["height"], comfy.options["seed"]) == (512, 640, 7)
    GenerationRequest(**comfy.options)
    invoke = read_any(written(tmp_path / "b.png", {"invokeai_metadata": json.dumps(INVOKEAI)}))
    assert (invoke.program, invoke.model) == ("InvokeAI", "Deliberate")
    assert (invoke.options["sampler"], invoke.options["grid"]) == ("dpmpp_2m_sde", "karras")
    GenerationRequest(**invoke.options)


def test_what_cannot_be_carried_over_is_named(tmp_path: Path) -> None:
    lora = {"class_type": "LoraLoader", "inputs": {"lora_name": "foo.safetensors", "strength_model": 0.8}}
    graph = {**COMFYUI, "9": lora, "3": {**COMFYUI["3"], "inputs": {**COMFYUI["3"]["inputs"], "sampler_name": "res"}}}
    comfy = read_any(written(tmp_path / "a.png", {"prompt": json.dumps(graph)}))
    assert comfy.lost == ("Sampler: res (ddim in its place)", "foo.safetensors: 0.8")
    assert comfy.options["grid"] == "karras"
    own = {**INVOKEAI, "loras": [{"model": {"name": "foo"}, "weight": 0.5}]}
    assert read_any(written(tmp_path / "b.png", {"invokeai_metadata": json.dumps(own)})).lost == ("LoRA: foo: 0.5",)
    other = A1111.replace("Hires upscaler: Latent", "Hires upscaler: ESRGAN").replace("Clip skip: 2", "ENSD: 31337")
    assert read_any(written(tmp_path / "c.png", {"parameters": other})).lost == (
        "ENSD: 31337",
        "Hires upscaler: ESRGAN",
    )


@pytest.mark.fault(45)
@pytest.mark.parametrize("unit", ["1", "a", " ", ",", "a:", '"', "(", "\\(", "<lora:", "a-", "+", "Steps: 1, "])
def test_no_record_costs_more_than_its_length(unit: str, tmp_path: Path) -> None:
    text = unit * (400_000 // len(unit))
    own = {**INVOKEAI, "positive_prompt": text + "x", "negative_prompt": "x" + text}
    for key, hostile in (
        ("parameters", f"a\nSteps: 1, Sampler: Euler, {text}"),
        ("parameters", f"{text}\nSteps: 1, Sampler: {text}, Seed: 1, CFG scale: 1"),
        ("invokeai_metadata", json.dumps(own)),
    ):
        file = written(tmp_path / "a.png", {key: hostile})
        with in_proportion(len(hostile)), suppress(ImageError):
            read_any(file)


@pytest.mark.parametrize("text", ["v1.5 well-known", "1.3 cats", "a (b) c"])
def test_what_has_no_weights_of_invokeais_stays_plain(text: str, tmp_path: Path) -> None:
    own = {**INVOKEAI, "positive_prompt": text}
    options = read_any(written(tmp_path / "a.png", {"invokeai_metadata": json.dumps(own)})).options
    assert (options["prompts"], options["prompt_syntax"]) == ([text], "plain")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("a red++ heart", "a (red:1.21) heart"),
        ("a (big red)1.3 heart, (x)--", "a (big red:1.3) heart, (x:0.81)"),
        ("a [b] (c) d+", r"a \[b\] \(c\) (d:1.1)"),
    ],
)
def test_invokeais_weights_are_a1111s(theirs: str, ours: str, tmp_path: Path) -> None:
    own = {**INVOKEAI, "positive_prompt": theirs, "negative_prompt": "well-known"}
    options = read_any(written(tmp_path / "a.png", {"invokeai_metadata": json.dumps(own)})).options
    assert (options["prompts"], options["negative_prompt"]) == ([ours], "well-known")
    assert options["prompt_syntax"] == "weighted"


@pytest.mark.parametrize("syntax", ["plain", "weighted"])
def test_our_own_without_its_record_says_what_is_lost(syntax: str, m9: LatentDiffusion, tmp_path: Path) -> None:
    """Many programs keep nothing but A1111's text."""
    first = draw_to_folder(m9, "a (red:1.3) cat", tmp_path / "a", seed=3, prompt_syntax=syntax, **SMALL)
    record = read_any(written(tmp_path / "a.png", {"parameters": read_texts(first.paths[0])["parameters"]}))
    assert any("place in a batch" in text for text in record.lost)
    again = draw_to_folder(m9, GenerationRequest(**record.options), tmp_path / "b")
    assert again.images[0].tobytes() == first.images[0].tobytes()


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"parameters": "a cat"},
        {"parameters": "a\nSteps: 3, Sampler: Euler"},
        {"prompt": "[1, 2"},
        {"prompt": json.dumps({"1": {"class_type": "KSampler", "inputs": {"positive": ["1", 0]}}})},
        {"invokeai_metadata": "[]"},
        {"flagai_altdiff": "[]"},
        {"flagai_altdiff": "[" * 100_000},
    ],
)
def test_files_that_say_too_little_are_refused(texts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not say how it was made"):
        read_any(written(tmp_path / "a.png", texts))


@pytest.mark.parametrize("seed_mode", ["batch", "per_image"])
@pytest.mark.parametrize(
    "ways",
    [
        {},
        {"sampler": "euler_ancestral", "grid": "karras", "prompt_syntax": "weighted"},
        {"images_per_prompt": 3, "batch_size": 2, "iterations": 2},
        {"variation_strength": 0.3, "variation_seed": 4, "images_per_prompt": 2},
        {"hires": 2, "hires_strength": 0.5},
    ],
)
def test_our_own_are_drawn_again_to_the_same_pixels(
    seed_mode: str, ways: dict[str, Any], m9: LatentDiffusion, tmp_path: Path
) -> None:
    first = draw_to_folder(m9, [tiny.CAT, tiny.CASTLE], tmp_path / "a", seed=3, seed_mode=seed_mode, **SMALL, **ways)
    for sample in (first.samples[-1], first.samples[len(first.samples) // 2]):
        assert isinstance(sample, Sample) and sample.path is not None
        again = redraw(m9, read_record(sample.path), tmp_path / "b")
        assert [found.index for found in again.samples] == [sample.index]
        assert again.images[0].tobytes() == sample.image.tobytes()


def test_a_picture_that_was_begun_with_must_still_be_there(m9: LatentDiffusion, tmp_path: Path) -> None:
    picture = tmp_path / "in.png"
    Image.linear_gradient("L").convert("RGB").save(picture)
    first = draw_to_folder(m9, tiny.CAT, tmp_path / "a", seed=3, steps=2, init_image=picture, strength=0.6)
    record = read_record(first.paths[0])
    assert redraw(m9, record, tmp_path / "b").images[0].tobytes() == first.images[0].tobytes()
    moved = picture.rename(tmp_path / "moved.png")
    again = redraw(m9, record, tmp_path / "b", pictures={"init_image": moved})
    assert again.images[0].tobytes() == first.images[0].tobytes()
    Image.new("RGB", (256, 256)).save(picture)
    with pytest.raises(ValueError, match="its pixels differ"):
        redraw(m9, record, tmp_path / "b")
    with pytest.raises(InvalidRequestError, match="the very picture of the record"):
        redraw(m9, record, tmp_path / "b", pictures={"init_image": picture})
    with pytest.raises(InvalidRequestError, match="no such picture"):
        redraw(m9, record, tmp_path / "b", pictures={"mask_image": moved})


def test_the_commands(m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["generate", "a cat", "-m", str(m9_folder), "--steps", "2", "-H", "64", "-W", "64", "-n", "2"]
    assert main([*drawn, "--outdir", str(tmp_path / "a"), "--seed", "5", "--no-safety-checker"]) == 0
    file = tmp_path / "a" / "samples" / "00001.png"
    capsys.readouterr()
    assert main(["show", str(file), str(file)]) == 0
    assert "prompt             a cat" in capsys.readouterr().out
    assert main(["show", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["request_seed"] == 5
    again = ["redraw", str(file), "--outdir", str(tmp_path / "b"), "-m", str(m9_folder)]
    assert main(again) == 0
    (saved,) = capsys.readouterr().out.split()
    assert Image.open(saved).tobytes() == Image.open(file).tobytes()
    assert main([*again, "--seed", "9"]) == 0
    (other,) = capsys.readouterr().out.split()
    assert Image.open(other).tobytes() != Image.open(file).tobytes()
    assert main(["show", str(tmp_path / "gone.png"), str(file)]) == 1
    assert "prompt             a cat" in capsys.readouterr().out, "one that is gone keeps nothing of the others"
    grid = str(tmp_path / "a" / "grid-0000.png")
    assert main(["redraw", grid, *again[1:]]) == 1
    out, err = capsys.readouterr()
    assert "it is a grid of several images; name one of them" in err and len(out.split()) == 1
    foreign = written(tmp_path / "a1111.png", {"parameters": A1111.replace("512x768", "64x64").replace("1.5", "2")})
    assert main(["redraw", str(foreign), "--outdir", str(tmp_path / "c")]) == 0
    err = capsys.readouterr().err
    assert "not carried over: Model: some, model (AltDiffusion-mini in its place; -m names another)" in err
    assert main(["tokens", "a (red:1.5) cat BREAK dog", "-m", str(m9_folder)]) == 0
    shown = capsys.readouterr().out
    assert main(["tokens", "a 𓀀", "-m", str(m9_folder)]) == 0
    assert capsys.readouterr().out.count("(unknown)") == 1
    assert "chunk 2 of 2" in shown and "1.500" in shown
    assert main(["tokens", "castle " * 200, "-m", str(m9_folder), "--prompt-syntax", "plain"]) == 0
    assert "lost: " in capsys.readouterr().out
