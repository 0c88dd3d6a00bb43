"""A matching model gives in transformers what it gives here, whatever its sizes and however its files were written."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AltCLIPConfig, AltCLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flagai_altdiff.clip_images import ClipImageTransform
from flagai_altdiff.matching import find_transform, load_matching_model
from flagai_altdiff.models.altclip import AltCLIP
from tests import tiny
from tests.cost import in_proportion

TOLERANCE = 1e-5
TEXTS = [tiny.CAT, tiny.SENTENCES[5], "", tiny.CASTLE * 20]


@dataclass(frozen=True)
class Shape:
    """Sizes that differ from the tiny model's, and how the files are written."""

    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    width: int = 24
    scale: float = 2.6592
    half: bool = False
    pickled: bool = False
    flagai: bool = False


SHAPES = {
    "patches of 14": Shape(),
    "patches of 32": Shape(vision={"patch_size": 32, "image_size": 64}, pickled=True),
    "a remainder at the edge": Shape(vision={"patch_size": 8, "image_size": 35}),
    "m18": Shape(
        text={"project_dim": 48},
        vision={"hidden_act": "gelu", "num_hidden_layers": 3, "num_attention_heads": 4},
        width=48,
        scale=4.6052,
        flagai=True,
    ),
    "half precision": Shape(text={"num_hidden_layers": 1}, half=True, pickled=True, flagai=True),
    "few positions": Shape(
        text={"max_position_embeddings": 80, "layer_norm_eps": 1e-3}, vision={"layer_norm_eps": 1e-3}
    ),
}


def write(folder: Path, shape: Shape) -> AltCLIPModel:
    """Transformers' model of a shape, saved by transformers, with a tokenizer."""
    text = {**tiny.ALTCLIP_TEXT, "vocab_size": tiny.vocabulary_size(), **shape.text}
    model = AltCLIPModel(
        AltCLIPConfig(
            text_config=text, vision_config={**tiny.CHECKER_SIZES, **shape.vision}, projection_dim=shape.width
        )
    )
    with torch.no_grad():
        tiny.fill(state := model.state_dict(), 7)
        state["logit_scale"].fill_(shape.scale)
    if shape.half:
        model.half()
    model.save_pretrained(folder)
    if shape.pickled:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    if shape.flagai:
        config = json.loads((folder / "config.json").read_text())
        config["model_type"], config["architectures"] = "clip", ["CLIPHF"]
        config["text_config"]["model_type"] = "xlm-roberta"
        (folder / "config.json").write_text(json.dumps(config))
    tiny.write_tokenizer(folder)
    return model.float().eval()


@pytest.fixture(scope="module", params=SHAPES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AltCLIP, AltCLIPModel]:
    folder = tmp_path_factory.mktemp("altclip")
    theirs = write(folder, SHAPES[request.param])
    return load_matching_model(folder), theirs


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


@torch.no_grad()
@pytest.mark.parametrize("padding", [True, "max_length"])
def test_features_logits_and_loss(padding: bool | str, both: tuple[AltCLIP, AltCLIPModel]) -> None:
    ours, theirs = both
    assert ours.tokenizer is not None
    texts = ours.tokenizer(TEXTS, padding=padding, truncation=True, max_length=77, return_tensors="pt")
    batch = {**texts, **ours.transform([noise(44 + i, 33) for i in range(4)], return_tensors="pt")}
    expected, found = theirs(**batch, return_loss=True), ours(**batch)
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(found[name], expected[name])
    close(found["text_model_output"].pooler_output, expected.text_model_output.pooler_output)
    close(found["vision_model_output"].last_hidden_state, expected.vision_model_output.last_hidden_state)
    mask = texts["attention_mask"].clone()
    mask[:, 1] = 0  # positions are counted from the ids, whatever may be seen
    expected = theirs.get_text_features(input_ids=texts["input_ids"], attention_mask=mask).pooler_output
    close(ours.get_text_features(texts["input_ids"], attention_mask=mask), expected)


@pytest.mark.parametrize("size", [(45, 20), (20, 45), (110, 55), (1, 50), (300, 2), (28, 28), (90, 60), (5, 7)])
def test_pixels(size: tuple[int, int]) -> None:
    modes, sides = ("RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB", "I;16"), ((28, 28), (64, 80))
    for mode, (side, shorter) in itertools.product(modes, sides):
        image = noise(*size, mode)
        theirs = CLIPImageProcessorPil(size={"shortest_edge": shorter}, crop_size={"height": side, "width": side})
        expected = np.asarray(theirs(image)["pixel_values"][0])
        np.testing.assert_allclose(ClipImageTransform(size=side, shorter=shorter).pixels(image), expected, atol=1e-6)


def test_preparation_as_a_file_has_it(tmp_path: Path) -> None:
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2] * 3,
    )
    theirs.save_pretrained(tmp_path)
    images = [noise(50, 70), noise(51, 41)]
    found = find_transform(tmp_path)(images)["pixel_values"]
    np.testing.assert_allclose(found, np.asarray(theirs(images)["pixel_values"]), atol=1e-6)


def test_of_a_thread_only_the_middle_is_seen() -> None:
    """All of it, as large as the crop needs it, would be 600 MB."""
    image = Image.fromarray(np.repeat(np.arange(65_000) // 255, 3).astype(np.uint8).reshape(1, -1, 3))
    transform = ClipImageTransform(size=56, mean=(0,) * 3, std=(1,) * 3)
    with in_proportion(1 << 20):
        found = transform.pixels(image) * 255
    assert found.shape == (3, 56, 56) and np.abs(found - 127).max() <= 1
