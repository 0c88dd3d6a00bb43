"""load_model and AutoLoader: names and paths, the disk before the network, FlagAI's arguments."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from flagai_altdiff import AutoLoader, GenerationRequest, generate, load_model
from flagai_altdiff.errors import (
    CheckpointError,
    ConfigError,
    HubError,
    InvalidRequestError,
    OfflineError,
    OtherTaskError,
    StateDictMismatchError,
    UnknownModelError,
    UnknownTaskError,
)
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare
from flagai_altdiff.registry import MODELS
from tests import tiny

SMALL = GenerationRequest(prompts=(tiny.CAT,), height=64, width=64, steps=1, images_per_prompt=1)


@pytest.fixture
def model_dir(m9_folder: Path, tmp_path: Path) -> Path:
    """A folder of models that has AltDiffusion-m9."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(m9_folder, folder / "AltDiffusion-m9")
    return folder


def test_the_loaded_model_is_on_the_cpu_in_float32(m9_folder: Path, no_network: None) -> None:
    model = load_model(m9_folder)
    assert model.device == torch.device("cpu")
    assert not model.training
    assert {p.device.type for p in model.state_dict().values()} == {"cpu"}
    assert len(generate(model, SMALL).images) == 1


@pytest.mark.parametrize("name", ["AltDiffusion-m9", "altdiffusion-m9", "ALTDIFFUSION-M9"])
@pytest.mark.parametrize("folder", ["AltDiffusion-m9", "altdiffusion-m9"])
def test_names_and_folders_are_matched_in_any_case(name: str, folder: str, model_dir: Path, no_network: None) -> None:
    (model_dir / "AltDiffusion-m9").rename(model_dir / folder)
    loader = AutoLoader(task_name="text2img", model_name=name, model_dir=str(model_dir))
    assert loader.get_model().spec is MODELS["AltDiffusion-m9"]


def test_every_way_to_write_a_folder(model_dir: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.chdir(model_dir.parent)
    for written in ("checkpoints", "./checkpoints/", f"{model_dir}/", model_dir):
        assert AutoLoader("text2img", "AltDiffusion-m9", written).get_model() is not None
    assert AutoLoader("text2img", "AltDiffusion-m9").get_model() is not None  # ./checkpoints is the default
    for path in ("checkpoints/AltDiffusion-m9/", model_dir / "AltDiffusion-m9" / "model.ckpt"):
        assert load_model(path).spec.name == Path(path).name
    (model_dir / "AltDiffusion-m9").rename(model_dir / "mine")
    assert load_model("mine", "checkpoints").spec.name == "mine"


def test_files_in_the_working_directory(model_dir: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.chdir(model_dir / "AltDiffusion-m9")
    assert load_model("model.ckpt") is not None
    assert load_model(".") is not None
    # The tokenizer is searched beside the folder, whatever its path looks like.
    (model_dir / "tokenizers").mkdir()
    for name in ("sentencepiece.bpe.model", "config.yaml"):
        Path(name).rename(model_dir / "tokenizers" / name)
    assert load_model("model.ckpt") is not None


@pytest.mark.parametrize("lacking", ["preprocessor_config.json", "special_tokens_map.json", "tokenizer_config.json"])
def test_files_that_nothing_needs_are_not_fetched(lacking: str, model_dir: Path, no_network: None) -> None:
    (model_dir / "AltDiffusion-m9" / lacking).unlink()
    assert load_model("AltDiffusion-m9", model_dir) is not None


def test_missing_weights_are_named_when_offline(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_OFFLINE", "1")
    (model_dir / "AltDiffusion-m9" / "model.ckpt").unlink()
    with pytest.raises(OfflineError, match=r"model\.ckpt"):
        load_model("AltDiffusion-m9", model_dir)
    with pytest.raises(HubError, match=r"config\.yaml"):
        load_model("AltDiffusion-m18", model_dir)
    assert sorted(p.name for p in model_dir.iterdir()) == ["AltDiffusion-m9"]


def test_unknown_names(model_dir: Path, no_network: None) -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean 'AltDiffusion-m9'\?") as caught:
        AutoLoader("text2img", "AltDiffusion-m99", model_dir)
    assert "AltCLIP" not in str(caught.value)
    with pytest.raises(UnknownModelError, match=r"Did you mean 'AltCLIP-XLMR-L-m9'\?") as caught:
        AutoLoader("txt_img_matching", "AltCLIP-XLMR-m9", model_dir)
    assert "AltDiffusion" not in str(caught.value)
    with pytest.raises(UnknownTaskError, match=r"Did you mean 'txt_img_matching'\?"):
        AutoLoader("text_img_matching", "AltDiffusion-m9", model_dir)
    other = "AltDiffusion-m9 is a model of another task, 'text2img'. Models for 'txt_img_matching': AltCLIP-mini, "
    with pytest.raises(OtherTaskError, match=re.escape(other)):
        AutoLoader("txt_img_matching", "altdiffusion-M9", model_dir)


def test_a_model_without_tokenizer(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model_dir / "AltDiffusion-m9" / "sentencepiece.bpe.model").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer.*sentencepiece\.bpe\.model"):
        load_model(model_dir / "AltDiffusion-m9")


@pytest.mark.fault(40)
def test_a_broken_tokenizer_is_found_before_the_weights_are_read(model_dir: Path) -> None:
    folder = model_dir / "AltDiffusion-m9"
    (folder / "sentencepiece.bpe.model").write_bytes(b"<html>")
    (folder / "model.ckpt").write_bytes(b"PK\x03\x04 unreadable")
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model is not a readable"):
        load_model(folder)


@pytest.mark.fault(40)
def test_a_tokenizer_with_more_tokens_than_the_encoder_knows(model_dir: Path) -> None:
    folder = model_dir / "AltDiffusion-m9"
    state = dict(tiny.tiny_state("m9"))
    key = "cond_stage_model.roberta.embeddings.word_embeddings.weight"
    state[key] = state[key][:100].clone()
    torch.save(state, folder / "model.ckpt")
    with pytest.raises(CheckpointError, match=rf"{tiny.vocabulary_size()} tokens, but the text encoder knows 100"):
        load_model(folder)


@pytest.mark.fault(40)
@pytest.mark.parametrize("lacking", [70, 100])
def test_a_tokenizer_of_a_smaller_model_is_refused(lacking: int, model_dir: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny.sentencepiece_model())
    del proto.pieces[-lacking:]
    (model_dir / "AltDiffusion-m9" / "sentencepiece.bpe.model").write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match=rf"\d+ tokens, but the text encoder knows {tiny.vocabulary_size()}"):
        load_model(model_dir / "AltDiffusion-m9")


@pytest.mark.fault(40)
def test_the_tokenizer_is_judged_before_the_weights_are_read(model_dir: Path) -> None:
    """The weights are 4 GB of holes, which would cost memory and time if they were read."""
    folder = model_dir / "AltDiffusion-m9"
    (folder / "model.ckpt").unlink()
    state = {k: v for k, v in tiny.tiny_state("m9").items() if "word_embeddings" not in k}
    save_file(state, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, end = json.loads(data[8 : 8 + length]), len(data) - 8 - length
    rows, width = 999_999, 1024
    entry = {"dtype": "F32", "shape": [rows, width], "data_offsets": [end, end + rows * width * 4]}
    header["cond_stage_model.roberta.embeddings.word_embeddings.weight"] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + length :])
        file.truncate(8 + len(text) + end + rows * width * 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"tokens, but the text encoder knows {rows}"):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.fault(36)
@pytest.mark.parametrize(
    ("called", "holds"), [("AltDiffusion-m18", "m9"), ("AltDiffusion-m9", "m18"), ("AltDiffusion", "m18")]
)
@pytest.mark.parametrize("by_path", [True, False])
def test_a_model_under_anothers_name_is_recognised(
    called: str, holds: str, by_path: bool, tmp_path: Path, no_network: None
) -> None:
    tiny.write_flagai_folder(tmp_path / called, holds)
    found = "AltDiffusion-m18" if holds == "m18" else "AltDiffusion or AltDiffusion-m9"
    with pytest.raises(CheckpointError, match=f"is called {called}, but holds {found}"):
        load_model(tmp_path / called if by_path else called, tmp_path)


@pytest.mark.fault(41)
@pytest.mark.parametrize("forbidden", ["", "config.yaml", "model.ckpt", "sentencepiece.bpe.model"])
def test_what_may_not_be_read_is_named(forbidden: str, m9_folder: Path) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        folder = Path(shutil.copytree(m9_folder, Path(root) / "m"))
        for place in (folder.parent, folder, *folder.iterdir()):
            place.chmod(0o755)
        load_path(folder)  # imports all that it needs
        (folder / forbidden).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises((CheckpointError, ConfigError), match="Permission denied") as caught:
                load_path(folder)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert str(folder / forbidden) in str(caught.value)


@pytest.mark.fault(41)
@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "m9/\0/x"])
def test_names_that_no_file_can_have_are_unknown(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError):
        load_model(name, tmp_path)
    with pytest.raises((CheckpointError, ConfigError)):
        load_path(tmp_path / name)


def test_a_neighbours_tokenizer_of_another_vocabulary_is_not_borrowed(model_dir: Path) -> None:
    """Ids of another vocabulary would give pictures of something else without a word."""
    folder = model_dir / "AltDiffusion-m9"
    (folder / "sentencepiece.bpe.model").unlink()
    tiny.write_tokenizer(model_dir / "A-first", size=140)
    with pytest.raises(CheckpointError, match="token"):
        load_model(folder)
    tiny.write_tokenizer(model_dir / "Z-last")
    assert len(load_model(folder).tokenizer or ()) == tiny.vocabulary_size()


@pytest.mark.parametrize("wrong", ["no", 2, None, "True"])
def test_the_safety_checker_argument_is_checked(wrong: object, model_dir: Path) -> None:
    loads: list[Callable[..., object]] = [load_model, functools.partial(AutoLoader, "text2img")]
    for load in loads:
        with pytest.raises(InvalidRequestError, match="safety_checker"):
            load("AltDiffusion-m9", model_dir, safety_checker=wrong)


@pytest.mark.parametrize("device", [None, "cpu", "cpu:0", torch.device("cpu")])
@pytest.mark.parametrize("dtype", [None, "float32", torch.float32, "float16", "torch.bfloat16", torch.float16])
def test_the_cpu_draws_in_float32(
    device: str | torch.device | None, dtype: str | torch.dtype | None, model_dir: Path
) -> None:
    model = load_model("AltDiffusion-m9", str(model_dir), device=device, dtype=dtype)
    assert {v.dtype for v in model.parameters()} == {torch.float32}
    notes = prepare(model, "a cat", height=64, width=64)[1]
    assert [note.kind for note in notes] == ["precision"] * ("16" in str(dtype))


@pytest.mark.parametrize(
    ("option", "value"),
    [("device", v) for v in ("cuda:99", "tpu", "meta", "", "cpu:x", 7.5, ["cpu"])]
    + [("dtype", v) for v in ("int64", "", torch.float64, torch.int8, 16, "nn")],
)
def test_devices_and_types_that_cannot_be_used(option: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=f"{option}=") as caught:
        load_model("AltDiffusion-m9", tmp_path, **{option: value})  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_flagais_signature(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = AutoLoader(
        "text2img", "AltDiffusion-m9", str(model_dir), False, "cuda", torch.float16, True, None, None, True
    )
    model = loader.get_model()
    assert isinstance(model, LatentDiffusion)
    assert model.autocast_dtype is None
    assert loader.get_tokenizer() is model.tokenizer
    assert loader.get_transform() is loader.transform is loader.process
    assert loader.model_name == "AltDiffusion-m9"
    assert loader.get_task_name("text2img") == "text2img"
    assert "has no effect" not in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "dtype"),
    [
        ({}, None),
        ({"fp16": False}, None),
        ({"use_fp16": False}, None),
        ({"fp16": True}, True),
        ({"use_fp16": True}, True),
    ],
)
def test_half_precision_is_an_option(kwargs: dict[str, Any], dtype: object, model_dir: Path) -> None:
    model = AutoLoader("text2img", "AltDiffusion-m9", model_dir, **kwargs).get_model()
    assert model.autocast_dtype == (torch.float16 if dtype else None)
    assert next(model.parameters()).dtype == torch.float32
    assert len(generate(model, SMALL).images) == 1  # and the CPU draws in float32


def test_arguments_without_meaning_are_named_once(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    AutoLoader(
        "text2img",
        "AltDiffusion-m9",
        model_dir,
        qlora_dir="x",
        all_devices=True,
        inference_mode=False,
        surprise=1,
        fp16=False,
    )
    lines = [r for r in caplog.records if "no effect" in r.getMessage()]
    assert len(lines) == 1 and lines[0].levelno == logging.WARNING
    for name in ("qlora_dir", "surprise", "all_devices", "inference_mode"):
        assert name in lines[0].getMessage()
    assert "fp16" not in lines[0].getMessage()


def test_only_download_config_reads_no_weights(model_dir: Path, no_network: None) -> None:
    (model_dir / "AltDiffusion-m9" / "model.ckpt").unlink()
    loader = AutoLoader("text2img", "AltDiffusion-m9", model_dir, only_download_config=True)
    tokenizer = loader.get_tokenizer()
    assert tokenizer is not None and tokenizer("a cat")["input_ids"][0] == 0
    with pytest.raises(CheckpointError, match="only_download_config"):
        loader.get_model()


def test_load_pretrain_params_takes_other_weights(model_dir: Path, tmp_path: Path) -> None:
    loader = AutoLoader("text2img", "AltDiffusion-m9", model_dir)
    model = loader.get_model()
    other = tiny.tiny_state("m9", seed=9)
    torch.save({"state_dict": other}, tmp_path / "other.ckpt")
    before = generate(model, SMALL).images[0].tobytes()
    parameters = dict(model.named_parameters())
    loader.load_pretrain_params(tmp_path / "other.ckpt")
    assert loader.get_model() is model
    assert all(value is parameters[key] for key, value in model.named_parameters())
    assert all(torch.equal(v, other[k]) for k, v in model.state_dict().items())
    assert generate(model, SMALL).images[0].tobytes() != before
    torch.save(tiny.tiny_state("m18"), tmp_path / "m18.ckpt")
    with pytest.raises(StateDictMismatchError):
        loader.load_pretrain_params(str(tmp_path / "m18.ckpt"))


def test_loading_leaves_nothing_behind(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_dir.parent)
    state = torch.random.get_rng_state()
    before = sorted(model_dir.parent.rglob("*"))
    environment = dict(os.environ)
    AutoLoader("text2img", "AltDiffusion-m9", model_dir)
    assert sorted(model_dir.parent.rglob("*")) == before
    assert dict(os.environ) == environment
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_changed_model_does_not_write_into_its_file(model_dir: Path) -> None:
    path = model_dir / "AltDiffusion-m9" / "model.ckpt"
    before = path.read_bytes()
    model = load_model(model_dir / "AltDiffusion-m9")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    del model
    assert path.read_bytes() == before
