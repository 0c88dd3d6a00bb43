"""Learnt words and other autoencoders: files of every layout, what they change, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flagai_altdiff import add_embedding, generate, use_vae
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.chunks import chunks
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError, InvalidRequestError
from flagai_altdiff.loading import load_path
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.output import draw_to_folder
from flagai_altdiff.request import Output
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 1}


@pytest.fixture
def model(m9_folder: Path) -> LatentDiffusion:
    loaded = load_path(m9_folder)
    loaded.safety_checker = None
    return loaded


def vectors(model: LatentDiffusion, count: int = 2) -> torch.Tensor:
    width = model.config.cond_stage.hidden_size
    return 3 * torch.randn(count, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("layout", ["a1111", "diffusers", "safetensors", "named"])
def test_a_learnt_word_is_read_from_every_layout(layout: str, model: LatentDiffusion, tmp_path: Path) -> None:
    values, path = vectors(model), tmp_path / "sphinx.pt"
    if layout == "a1111":
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": values}, "name": "x", "step": 3}, path)
    elif layout == "diffusers":
        torch.save({"<sphinx>": values[0]}, path)
    elif layout == "safetensors":
        path = tmp_path / "sphinx.safetensors"
        save_file({"emb_params": values}, path)
    else:
        save_file({"emb_params": values}, path := tmp_path / "other.safetensors")
    tokenizer = model.text_tokenizer
    assert tokenizer is not None
    before = {text: tokenizer.ids([text]) for text in tiny.SENTENCES}
    size = len(tokenizer)
    word = add_embedding(model, path, "sphinx" if layout == "named" else "")
    assert word == ("<sphinx>" if layout == "diffusers" else "sphinx")
    count = 1 if layout == "diffusers" else 2
    assert model.text_tokenizer is not None
    found = model.text_tokenizer.encode(f"a photo of {word} at night")
    assert [i for i in found.ids if i >= size] == list(range(size, size + count))
    text = f"a photo of {word} at night"
    assert [text[a:b] for (a, b), i in zip(found.spans, found.ids, strict=True) if i >= size] == [word] * count
    assert {text: model.text_tokenizer.ids([text]) for text in tiny.SENTENCES} == before
    table = model.cond_stage_model.roberta.embeddings.word_embeddings
    torch.testing.assert_close(table.weight[size:], values[:count])
    images = [generate(model, prompt, **SMALL).images[0].tobytes() for prompt in (f"a {word}", "a ")]
    assert images[0] != images[1]
    assert chunks(model.text_tokenizer, f"({word}:1.4) cat")[0].weights[:count] == pytest.approx((1.4,) * count)


@pytest.mark.fault(42)
def test_words_that_do_not_fit_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "w.safetensors")
        parts = model.parts
        with pytest.raises(CheckpointError, match=message):
            add_embedding(model, tmp_path / "w.safetensors")
        assert model.parts == parts

    refused({"emb_params": torch.zeros(2, 768)}, "vectors of width 768, but this model's text encoder has .* for CLIP")
    refused({"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}, "expected the vectors of one word, found a, b")
    refused({"emb_params": torch.full((1, 3), float("nan"))}, "broken")
    refused({"emb_params": torch.zeros(200, 3)}, "1 to 75 vectors")
    save_file({"emb_params": vectors(model)}, tmp_path / "w.safetensors")
    add_embedding(model, tmp_path / "w.safetensors")
    with pytest.raises(InvalidRequestError, match="'w' is known already"):
        add_embedding(model, tmp_path / "w.safetensors")


@pytest.mark.parametrize("layout", ["ldm", "whole", "diffusers", "folder"])
def test_an_autoencoder_is_read_from_every_layout(
    layout: str, model: LatentDiffusion, m9_folder: Path, tmp_path: Path
) -> None:
    other = load_path(m9_folder)
    with torch.no_grad():
        for weight in other.first_stage_model.parameters():
            weight.mul_(1.1)
    own = {key: value.contiguous() for key, value in other.first_stage_model.state_dict().items()}
    path = tmp_path / "vae.safetensors"
    if layout == "ldm":
        save_file({**own, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, path)
    elif layout == "whole":
        save_file({f"first_stage_model.{key}": value for key, value in own.items()}, path)
    elif layout == "diffusers":
        parts = to_diffusers(other.state_dict(), other.config)
        save_file({key: value.contiguous() for key, value in parts["vae"].items()}, path)
    else:
        other_folder = tmp_path / "flagai"
        other_folder.mkdir()
        torch.save({"state_dict": other.state_dict()}, other_folder / "model.ckpt")
        for name in ("config.yaml", "sentencepiece.bpe.model"):
            (other_folder / name).write_bytes((m9_folder / name).read_bytes())
        convert(other_folder, tmp_path / "diffusers", "diffusers")
        path = tmp_path / "diffusers" / "vae"
    before = generate(model, tiny.CAT, **SMALL).images[0].tobytes()
    use_vae(model, path)
    for key, value in model.first_stage_model.state_dict().items():
        torch.testing.assert_close(value, own[key])
    assert generate(model, tiny.CAT, **SMALL).images[0].tobytes() != before
    assert [part.kind for part in model.parts] == ["vae"]


@pytest.mark.fault(42)
def test_autoencoders_that_do_not_fit_are_refused(model: LatentDiffusion, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in model.first_stage_model.state_dict().items()}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"encoder.conv_in.weight": torch.zeros(3, 3)}, tmp_path / "b.safetensors")
    for name, message in (("a", "is no autoencoder"), ("b", "encoder.conv_in")):
        with pytest.raises(CheckpointError, match=message):
            use_vae(model, tmp_path / f"{name}.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.first_stage_model.state_dict().items())


def test_parts_are_recorded_and_tell_runs_apart(model: LatentDiffusion, tmp_path: Path) -> None:
    first = draw_to_folder(model, tiny.CAT, tmp_path / "out", **SMALL)
    save_file({"emb_params": vectors(model)}, tmp_path / "sphinx.safetensors")
    add_embedding(model, tmp_path / "sphinx.safetensors")
    second = draw_to_folder(model, tiny.CAT, Output(folder=tmp_path / "out", resume=True), **SMALL)
    assert second.paths != first.paths
    record = read_record(second.paths[0])
    assert record["parts"][0]["kind"] == "embedding" and record["parts"][0]["name"] == "sphinx"
