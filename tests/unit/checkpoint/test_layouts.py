"""Every layout that a released or trained model may lie in gives the same model; everything else is named for what it is."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff import GenerationRequest, generate
from flagai_altdiff.checkpoint.layouts import detect
from flagai_altdiff.checkpoint.saving import save_folder, save_single
from flagai_altdiff.errors import CheckpointError, ConfigError, FlagAIAltDiffError, StateDictMismatchError
from flagai_altdiff.loading import load_path
from tests import tiny

TEXT = "cond_stage_model."
POSITION_IDS = f"{TEXT}roberta.embeddings.position_ids"


def lone(folder: Path, name: str, file: str, *, config: bool = False, beside: bool = True) -> Path:
    path = folder / "models" / file
    tiny.write_tokenizer(path.parent if beside else folder / "other-folder")
    path.parent.mkdir(exist_ok=True)
    if file.endswith(".safetensors"):
        save_file(tiny.tiny_state(name), path)
    else:
        torch.save({"state_dict": tiny.tiny_state(name)}, path)
    if config:
        tiny.write_config(path.with_suffix(".yaml"), tiny.VARIANTS[name])
    return path


def safetensors_folder(folder: Path, name: str) -> Path:
    tiny.write_flagai_folder(folder, name)
    (folder / "model.ckpt").unlink()
    save_file(tiny.tiny_state(name), folder / "model.safetensors")
    return folder


def bare_state(folder: Path, name: str) -> Path:
    tiny.write_flagai_folder(folder, name)
    torch.save(tiny.tiny_state(name), folder / "model.ckpt")
    return folder


def old_zipless(folder: Path, name: str) -> Path:
    tiny.write_flagai_folder(folder, name)
    torch.save({"state_dict": tiny.tiny_state(name)}, folder / "model.ckpt", _use_new_zipfile_serialization=False)
    return folder


def after_training(folder: Path, name: str) -> Path:
    """As a trainer leaves it: averaged weights, optimizer states, another average beside the state dict."""
    tiny.write_flagai_folder(folder, name)
    state = dict(tiny.tiny_state(name))
    ema = {"model_ema." + k.replace("model.", "", 1).replace(".", ""): v for k, v in state.items() if k.startswith("model.")}
    extra = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(5, dtype=torch.int)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {
        "state_dict": {**state, **ema, **extra},
        "state_dict_ema": {k: v * 2 for k, v in state.items()},
        "optimizer_states": [optimizer],
        "epoch": 3,
    }
    torch.save(whole, folder / "model.ckpt")
    return folder


def with_pooler(folder: Path, name: str) -> Path:
    state = dict(tiny.tiny_state(name))
    state[f"{TEXT}roberta.pooler.dense.weight"] = torch.randn(128, 128)
    state[f"{TEXT}roberta.pooler.dense.bias"] = torch.randn(128)
    return tiny.write_flagai_folder(folder, name, state)


def without_pooler_and_position_ids(folder: Path, name: str) -> Path:
    state = {k: v for k, v in tiny.tiny_state(name).items() if ".pooler." not in k and k != POSITION_IDS}
    return tiny.write_flagai_folder(folder, name, state)


def tokenizer_json(folder: Path, name: str) -> Path:
    from flagai_altdiff.tokenizer import load_tokenizer

    tiny.write_flagai_folder(folder, name)
    source = folder / "sentencepiece.bpe.model"
    load_tokenizer(source).backend_tokenizer.save(str(folder / "tokenizer.json"))
    source.unlink()
    return folder


def saved_again(folder: Path, name: str) -> Path:
    first = tiny.write_flagai_folder(folder / "first", name)
    save_folder(
        folder / "second", tiny.tiny_config(tiny.VARIANTS[name]), tiny.tiny_state(name), first / "sentencepiece.bpe.model"
    )
    shutil.rmtree(first)
    return folder / "second"


LAYOUTS: dict[str, Callable[[Path, str], Path]] = {
    "FlagAI folder": tiny.write_flagai_folder,
    "safetensors in a FlagAI folder": safetensors_folder,
    "bare state dict": bare_state,
    "legacy pickle": old_zipless,
    "after training": after_training,
    "with a pooler": with_pooler,
    "without pooler and position_ids": without_pooler_and_position_ids,
    "tokenizer.json": tokenizer_json,
    "saved again": saved_again,
    "Hugging Face cache": tiny.write_hub_cache,
    "lone ckpt": lambda folder, name: lone(folder, name, "some model.ckpt"),
    "lone ckpt with yaml": lambda folder, name: lone(folder, name, "m.ckpt", config=True),
    "lone safetensors": lambda folder, name: lone(folder, name, "m.safetensors"),
    "folder of one file": lambda folder, name: lone(folder, name, "m.safetensors").parent,
    "tokenizer in a sibling folder": lambda folder, name: lone(folder, name, "m.ckpt", beside=False),
}


def state_of(path: Path) -> dict[str, Tensor]:
    return dict(load_path(path, safety_checker=False).state_dict())


def assert_same(state: dict[str, Tensor], name: str) -> None:
    expected = {k: v for k, v in tiny.tiny_state(name).items() if ".pooler." not in k}
    state = {k: v for k, v in state.items() if ".pooler." not in k}
    assert set(state) == set(expected)
    assert [k for k, v in expected.items() if not torch.equal(state[k], v)] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(layout: str, variant: str, tmp_path: Path, no_network: None) -> None:
    path = LAYOUTS[layout](tmp_path, variant)
    before = sorted(tmp_path.rglob("*"))
    assert_same(state_of(path), variant)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("layout", ["lone ckpt"])
def test_every_layout_draws_the_same_pictures(layout: str, variant: str, variant_folder: Path, tmp_path: Path) -> None:
    request = GenerationRequest(prompts=(tiny.CAT,), height=64, width=64, steps=1, images_per_prompt=1)
    pictures = [
        generate(load_path(p, safety_checker=False).to("cpu"), request).images[0].tobytes()
        for p in (variant_folder, LAYOUTS[layout](tmp_path, variant))
    ]
    assert pictures[0] == pictures[1]


def test_half_precision_is_widened(variant: str, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny.tiny_state(variant).items()}
    state = state_of(tiny.write_flagai_folder(tmp_path, variant, half))
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in state.items())


def test_another_ref_chooses_another_snapshot(tmp_path: Path) -> None:
    entry = tiny.write_hub_cache(tmp_path, "m9", commit="aaa")
    shutil.copytree(entry / "snapshots" / "aaa", entry / "snapshots" / "bbb", symlinks=True)
    assert detect(entry).folder.name == "aaa"
    (entry / "refs" / "main").write_text("bbb\n")
    assert detect(entry).folder.name == "bbb"
    (entry / "refs" / "main").write_text("../../..")
    with pytest.raises(CheckpointError, match=r"2 snapshots \(aaa, bbb\)"):
        detect(entry)


def broken(tmp_path: Path, name: str = "m9", **changes: Tensor | None) -> Path:
    """A folder whose weights lack the keys that are None and have the others on top."""
    state = {**tiny.tiny_state(name), **{k: v for k, v in changes.items() if v is not None}}
    return tiny.write_flagai_folder(tmp_path, name, {k: v for k, v in state.items() if changes.get(k, v) is not None})


@pytest.mark.fault(35)
def test_keys_that_differ_are_counted_and_named(tmp_path: Path) -> None:
    keys = [k for k in tiny.tiny_state("m9") if k.startswith("model.diffusion_model.out")]
    wrong: dict[str, Tensor | None] = dict.fromkeys(keys)
    wrong |= {f"model.surprise.{i}": torch.ones(1) for i in range(4)}
    wrong["first_stage_model.quant_conv.bias"] = torch.ones(3)
    with pytest.raises(StateDictMismatchError) as caught:
        load_path(broken(tmp_path, **wrong), safety_checker=False)
    message = str(caught.value)
    assert f"{len(keys)} missing keys: {keys[0]}" in message
    assert f"and {len(keys) - 3} more" in message
    assert "4 unexpected keys: model.surprise.0" in message
    assert "1 keys of another shape: first_stage_model.quant_conv.bias [3] instead of [8]" in message
    assert str(tmp_path) in message
    assert caught.value.missing == keys


@pytest.mark.parametrize("key", ["betas", "first_stage_model.decoder.conv_in.weight", f"{TEXT}pre_LN.weight"])
def test_no_key_may_be_missing(key: str, tmp_path: Path) -> None:
    with pytest.raises(StateDictMismatchError, match=re.escape(f"1 missing keys: {key}.")):
        load_path(broken(tmp_path, **{key: None}), safety_checker=False)


@pytest.mark.fault(37)
def test_integers_are_no_weights(tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    with pytest.raises(CheckpointError, match=re.escape(key)):
        load_path(broken(tmp_path, **{key: torch.ones(4, dtype=torch.int64)}), safety_checker=False)


@pytest.mark.fault(36)
@pytest.mark.parametrize(("weights", "config"), [("m9", "m18"), ("m18", "m9")])
def test_weights_of_one_model_with_the_config_of_the_other(weights: str, config: str, tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path, weights)
    tiny.write_config(tmp_path / "config.yaml", tiny.VARIANTS[config])
    with pytest.raises(
        FlagAIAltDiffError, match=rf"the weights have the text encoder of .*{weights}.*the config says"
    ) as caught:
        load_path(tmp_path)
    assert isinstance(caught.value, (ConfigError, CheckpointError))


FOREIGN = {
    "cond_stage_model.transformer.text_model.embeddings.position_ids": r"Stable Diffusion 1\.x",
    "cond_stage_model.model.positional_embedding": r"Stable Diffusion 2\.x",
    "conditioner.embedders.0.transformer.x": "Stable Diffusion XL",
    "text_model.embeddings.word_embeddings.weight": "AltCLIP",
    "lora_unet_down_blocks_0.alpha": "LoRA",
    "cond_stage_model.roberta_encoder.weight": "a UNet without the text encoder",
}


@pytest.mark.fault(36)
@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.parametrize("config", [True, False])
def test_other_models_are_named(key: str, config: bool, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    unet = {k: v for k, v in tiny.tiny_state("m9").items() if k.startswith("model.")}
    save_file({**unet, key: torch.ones(3)}, tmp_path / "model.safetensors")
    if config:
        tiny.write_config(tmp_path / "config.yaml", tiny.M9)
    with pytest.raises(CheckpointError, match=FOREIGN[key]):
        load_path(tmp_path)


ALONE = {
    "lora_unet_down_blocks_0_attentions_0.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attn1.to_q.lora_A.weight": "a LoRA",
    "mid_block.attentions.0.processor.to_q_lora.up.weight": "a LoRA",
    "first_stage_model.encoder.conv_in.weight": r"autoencoder \(VAE\) alone",
    "decoder.mid.block_1.conv1.weight": r"autoencoder \(VAE\) alone",
    "encoder.down_blocks.0.resnets.0.conv1.weight": r"autoencoder \(VAE\) alone",
    "model.diffusion_model.input_blocks.0.0.weight": "a UNet without the text encoder",
    "down_blocks.0.resnets.0.conv1.weight": "the UNet of a diffusers folder",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a diffusion transformer",
    "model_ema.decay": "averaged weights",
    "roberta.embeddings.word_embeddings.weight": "a text encoder without",
    "emb_params": "a textual inversion",
    "vision_model.embeddings.class_embedding": "AltCLIP or CLIP",
    "encoder.layer.0.weight": "no AltDiffusion text encoder",
}


@pytest.mark.fault(36)
@pytest.mark.fault(42)
@pytest.mark.parametrize("key", ALONE)
def test_parts_and_additions_are_named(key: str, tmp_path: Path) -> None:
    save_file({key: torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=ALONE[key]):
        load_path(tmp_path / "model.safetensors")


@pytest.mark.fault(42)
def test_a_pickled_embedding_is_read_without_running_it(tmp_path: Path) -> None:
    data = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(1, 768)}, "name": "x", "step": 1}
    torch.save(data, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="textual inversion"):
        load_path(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "key",
    [
        f"{TEXT}roberta.encoder.layer.999999999.output.dense.bias",
        "model.diffusion_model.input_blocks.999999999.0.op.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.999999999.norm1.weight",
        "first_stage_model.encoder.down.999999999.block.0.norm1.weight",
        "first_stage_model.encoder.down.0.block.999999999.norm1.weight",
    ],
)
def test_a_made_up_number_of_layers_is_refused(key: str, tmp_path: Path) -> None:
    path = lone(tmp_path, "m9", "m.safetensors")
    save_file({**tiny.tiny_state("m9"), key: torch.ones(1)}, path)
    with pytest.raises(FlagAIAltDiffError):
        load_path(path)


@pytest.mark.fault(39)
def test_a_file_of_a_million_layers_is_refused(tmp_path: Path) -> None:
    path = lone(tmp_path, "m9", "m.safetensors")
    layers = {f"{TEXT}roberta.encoder.layer.{i}.output.dense.bias": torch.ones(1) for i in range(3, 2000)}
    save_file({**tiny.tiny_state("m9"), **layers}, path)
    with pytest.raises(ConfigError, match="num_hidden_layers=2000: expected 1 to 100"):
        load_path(path)


def test_half_a_lone_file_is_refused(tmp_path: Path) -> None:
    path = lone(tmp_path, "m9", "m.safetensors")
    save_file({k: v for k, v in tiny.tiny_state("m9").items() if not k.startswith("first_stage_model")}, path)
    with pytest.raises(CheckpointError, match=r"first_stage_model\.encoder\.conv_in\.weight is missing"):
        load_path(path)


@pytest.mark.parametrize("files", [(), ("notes.txt",), ("config.yaml",), ("a.ckpt", "b.ckpt"), ("snapshots/",)])
def test_a_folder_without_a_model_says_what_was_found_and_expected(files: tuple[str, ...], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(CheckpointError) as caught:
        detect(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "snapshots" in str(caught.value)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        detect(tmp_path / "nothing")


def test_a_single_file_is_written_with_its_config_and_tokenizer(variant: str, tmp_path: Path, m9_folder: Path) -> None:
    config = tiny.tiny_config(tiny.VARIANTS[variant])
    path = tmp_path / "new" / "m.safetensors"
    save_single(path, config, tiny.tiny_state(variant), m9_folder / "sentencepiece.bpe.model")
    assert sorted(p.name for p in path.parent.iterdir()) == ["m.safetensors", "m.yaml", "sentencepiece.bpe.model"]
    assert len({p.stat().st_mode & 0o777 for p in path.parent.iterdir()}) == 1
    assert_same(state_of(path), variant)
    with pytest.raises(CheckpointError, match="exists already"):
        save_single(path, config, tiny.tiny_state(variant), m9_folder / "sentencepiece.bpe.model")
    with pytest.raises(CheckpointError, match="safetensors"):
        save_single(path.with_suffix(".ckpt"), config, tiny.tiny_state(variant), m9_folder / "sentencepiece.bpe.model")


def test_saving_writes_all_or_nothing(tmp_path: Path, m9_folder: Path) -> None:
    config, state = tiny.tiny_config(tiny.M9), tiny.tiny_state("m9")
    tokenizer = m9_folder / "sentencepiece.bpe.model"
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        save_folder(tmp_path / "there", config, state, tokenizer)
    with pytest.raises(OSError, match="no-such-file"):
        save_folder(tmp_path / "a" / "new", config, state, tmp_path / "no-such-file")
    assert list((tmp_path / "a").iterdir()) == []
    assert list((tmp_path / "there").iterdir()) == []
