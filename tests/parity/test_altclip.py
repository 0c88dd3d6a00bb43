"""A matching model gives in transformers what it gives here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AltCLIPModel

from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.models.altclip import AltCLIP
from tests import tiny

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[AltCLIP, AltCLIPModel]:
    folder = tiny.write_altclip_folder(tmp_path_factory.mktemp("altclip"), "huggingface", safetensors=True)
    return load_matching_model(folder), AltCLIPModel.from_pretrained(folder).eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.no_grad()
def test_features_logits_and_loss(both: tuple[AltCLIP, AltCLIPModel]) -> None:
    ours, theirs = both
    assert ours.tokenizer is not None
    pixels = np.random.default_rng(1).integers(0, 256, (3, 33, 44, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    batch = {
        **ours.tokenizer([tiny.CAT, tiny.SENTENCES[5], ""], padding=True, return_tensors="pt"),
        **ours.transform(images, return_tensors="pt"),
    }
    expected, found = theirs(**batch, return_loss=True), ours(**batch)
    for name in ("loss", "logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(found[name], expected[name])
    close(found["text_model_output"].pooler_output, expected.text_model_output.pooler_output)
    close(found["vision_model_output"].last_hidden_state, expected.vision_model_output.last_hidden_state)
