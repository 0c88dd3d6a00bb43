"""The safety checker: the released file's keys, its verdicts, and what becomes of a flagged picture."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor

from flagai_altdiff import Predictor, load_model
from flagai_altdiff.clip_images import ClipImageTransform
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.registry import MODELS
from flagai_altdiff.safety import CheckerNetwork, SafetyChecker, load_safety_checker
from tests import tiny

CPU = torch.device("cpu")
NEVER, ALWAYS = 1.5, -1.5
SMALL: dict[str, Any] = {"n_samples": 2, "ddim_steps": 1, "H": 64, "W": 64}


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_released_file_is_read(safetensors: bool, tmp_path: Path) -> None:
    checker = load_safety_checker(tiny.write_safety_checker(tmp_path, NEVER, safetensors=safetensors))
    own = checker.network.state_dict()
    released = {k: v for k, v in tiny.checker_state(NEVER).items() if not k.endswith("position_ids")}
    assert len(own) == len(released)
    assert sorted(float(v.sum()) for v in own.values()) == pytest.approx(
        sorted(float(v.sum()) for v in released.values())
    )
    assert checker.transform.size == 28
    assert not checker.network.training


def test_concepts_are_thresholds_on_the_cosine(tmp_path: Path) -> None:
    checker = load_safety_checker(tiny.write_safety_checker(tmp_path, NEVER))
    images = [noise(i) for i in range(4)]
    network: CheckerNetwork = checker.network
    with torch.no_grad():
        pixels = torch.stack([checker.transform(i) for i in images])
        embeds = network.visual_projection(network.vision_model(pixels).pooler_output)
        cosines = F.cosine_similarity(embeds[:, None], network.concept_embeds[None], dim=-1)
    highest = cosines.max(dim=1).values
    order = highest.argsort()
    limit = float(highest[order[1:3]].mean())
    assert highest[order[2]] - highest[order[1]] > 0.002
    network.concept_embeds_weights.data.fill_(limit)
    assert checker.check(images, CPU) == [bool(h > limit) for h in highest]
    # A special-care concept in sight makes the others stricter by 0.01.
    network.concept_embeds_weights.data.fill_(float(highest.max()) + 0.005)
    assert checker.check(images, CPU) == [False] * 4
    network.special_care_embeds_weights.data.fill_(-2.0)
    assert any(checker.check(images, CPU))


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (28, 28), (512, 512), (768, 512), (75, 151), (13, 200), (1, 1)])
def test_pictures_are_prepared_as_clip_prepares_them(size: tuple[int, int]) -> None:
    image = noise(1, size)
    expected = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})(
        image, return_tensors="pt"
    )
    ours = ClipImageTransform(size=28)(image)
    assert ours.shape == (3, 28, 28) and ours.dtype == torch.float32
    assert (ours - expected["pixel_values"][0]).abs().mean() < 0.02


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_any_mode_is_prepared(mode: str) -> None:
    image = Image.new(mode, (33, 44)) if mode == "I;16" else noise(2).convert(mode)
    assert ClipImageTransform(size=28)(image).shape == (3, 28, 28)


@pytest.fixture
def model_dir(m9_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(m9_folder, tmp_path / "checkpoints" / "AltDiffusion-m9")
    return tmp_path / "checkpoints"


PLACES = ("SafetyChecker", "AltDiffusion-m9/SafetyChecker", "AltDiffusion-m9/safety_checker")


@pytest.mark.fault(55)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wanted", ["auto", True])
def test_a_flagged_picture_is_black_and_said_to_be(
    place: str, wanted: bool | str, model_dir: Path, no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.write_safety_checker(model_dir / place, ALWAYS)
    model = load_model("AltDiffusion-m9", model_dir, safety_checker=wanted)
    assert isinstance(model.safety_checker, SafetyChecker)
    result = Predictor(model).predict_generate_images(tiny.CAT, outpath=model_dir.parent / "out", **SMALL)
    assert result.safety == ["flagged", "flagged"]
    assert [image.getextrema() for image in result.images] == [((0, 0),) * 3] * 2
    assert result.images[0].size == (64, 64)
    for path in (*result.paths, result.grid_path):
        assert path is not None and Image.open(path).convert("RGB").getextrema() == ((0, 0),) * 3
    saved = Image.open(result.paths[0])
    assert json.loads(saved.text["flagai_altdiff"])["safety"] == "flagged"  # type: ignore[attr-defined]
    assert len([r for r in caplog.records if "flagged" in r.getMessage() and r.levelno == logging.WARNING]) == 2


def test_a_safe_picture_is_left_alone(model_dir: Path) -> None:
    plain = Predictor(load_model("AltDiffusion-m9", model_dir, safety_checker=False))
    before = plain.predict_generate_images(tiny.CAT, outpath=model_dir.parent / "a", **SMALL)
    tiny.write_safety_checker(model_dir / "SafetyChecker", NEVER)
    checked = Predictor(load_model("AltDiffusion-m9", model_dir))
    after = checked.predict_generate_images(tiny.CAT, outpath=model_dir.parent / "b", **SMALL)
    assert before.safety == ["unchecked"] * 2 and after.safety == ["safe"] * 2
    assert [i.tobytes() for i in before.images] == [i.tobytes() for i in after.images]
    assert json.loads(Image.open(after.paths[0]).text["flagai_altdiff"])["safety"] == "safe"  # type: ignore[attr-defined]


@pytest.mark.fault(55)
def test_auto_without_a_checker_warns_and_true_refuses(
    model_dir: Path, no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert load_model("AltDiffusion-m9", model_dir).safety_checker is None
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "NOT checked" in r.getMessage()]
    assert len(warnings) == 1 and str(model_dir) in warnings[0].getMessage()
    with pytest.raises(CheckpointError, match="safety_checker=True"):
        load_model("AltDiffusion-m9", model_dir, safety_checker=True)
    caplog.clear()
    assert load_model("AltDiffusion-m9", model_dir, safety_checker=False).safety_checker is None
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_false_leaves_a_checker_that_is_there_alone(model_dir: Path) -> None:
    tiny.write_safety_checker(model_dir / "SafetyChecker", ALWAYS)
    assert load_model("AltDiffusion-m9", model_dir, safety_checker=False).safety_checker is None


def test_the_checker_is_no_part_of_the_model(model_dir: Path) -> None:
    tiny.write_safety_checker(model_dir / "SafetyChecker", NEVER)
    model = load_model("AltDiffusion-m9", model_dir)
    assert set(model.state_dict()) == set(tiny.tiny_state("m9"))
    assert MODELS["AltDiffusion-m9"].needs_safety_checker


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"vision_config": 7}', '{"vision_config": {"hidden_size": "x"}}', "{nope"]
)
def test_a_broken_config_is_named(text: str, tmp_path: Path) -> None:
    folder = tiny.write_safety_checker(tmp_path, NEVER)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=str(folder)):
        load_safety_checker(folder)


@pytest.mark.fault(39)
@pytest.mark.parametrize("field", [*tiny.CHECKER_SIZES, "projection_dim"])
@pytest.mark.parametrize("value", [10**9, 999_999, -1, "7", None])
def test_sizes_of_a_checker_are_believed_when_its_weights_have_them(field: str, value: object, tmp_path: Path) -> None:
    folder = tiny.write_safety_checker(tmp_path, NEVER)
    config = json.loads((folder / "config.json").read_text())
    (config if field == "projection_dim" else config["vision_config"])[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    before = peak_memory()
    with pytest.raises(CheckpointError, match=str(folder)):
        load_safety_checker(folder)
    assert peak_memory() - before < 200 << 20


def peak_memory() -> int:
    """Most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


LIGHT = """
import sys
from flagai_altdiff.clip_images import ClipImageTransform
from PIL import Image
assert ClipImageTransform()(Image.new("RGB", (64, 32))).shape == (3, 224, 224)
assert "transformers" not in sys.modules
"""


def test_preparing_an_image_needs_no_transformers(script_environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, env=script_environment, timeout=120)


def test_half_a_checker_is_named(model_dir: Path) -> None:
    folder = tiny.write_safety_checker(model_dir / "SafetyChecker", NEVER)
    state = tiny.checker_state(NEVER)
    del state["concept_embeds"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="1 missing keys: concept_embeds"):
        load_model("AltDiffusion-m9", model_dir)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no pytorch_model"):
        load_safety_checker(folder)
