"""Every layout that a model may lie in gives the same model; everything else is named for what it is."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagai_altdiff import GenerationRequest, generate, load_model
from flagai_altdiff.checkpoint.layouts import detect
from flagai_altdiff.checkpoint.saving import save_folder, save_single
from flagai_altdiff.checkpoint.structure import check_counts, complete_config, counts, fill_unread, infer_config
from flagai_altdiff.checkpoint.weights import assign
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError, ConfigError, FlagAIAltDiffError, StateDictMismatchError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import build_model
from flagai_altdiff.sampling.schedule import schedule_buffers
from tests import tiny
from tests.cost import in_proportion

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
    ema = {
        "model_ema." + k.replace("model.", "", 1).replace(".", ""): v
        for k, v in state.items()
        if k.startswith("model.")
    }
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
    load_tokenizer(source).to_transformers().backend_tokenizer.save(str(folder / "tokenizer.json"))
    source.unlink()
    return folder


def saved_again(folder: Path, name: str) -> Path:
    first = tiny.write_flagai_folder(folder / "first", name)
    save_folder(
        folder / "second",
        tiny.tiny_config(tiny.VARIANTS[name]),
        tiny.tiny_state(name),
        first / "sentencepiece.bpe.model",
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
    request = GenerationRequest(prompts=(tiny.CAT,), height=64, width=64, steps=1, seed=7)
    pictures = [
        generate(load_path(p, safety_checker=False).to("cpu"), request).images[0].tobytes()
        for p in (variant_folder, LAYOUTS[layout](tmp_path, variant))
    ]
    assert pictures[0] == pictures[1]


def test_half_precision_is_widened(variant: str, tmp_path: Path) -> None:
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny.tiny_state(variant).items()}
    state = state_of(tiny.write_flagai_folder(tmp_path, variant, half))
    assert {v.dtype for v in state.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in state.items() if "." in k)


def test_another_ref_chooses_another_snapshot(tmp_path: Path) -> None:
    entry = tiny.write_hub_cache(tmp_path, "m9", commit="aaa")
    shutil.copytree(entry / "snapshots" / "aaa", entry / "snapshots" / "bbb", symlinks=True)
    assert detect(entry).folder.name == "aaa"
    (entry / "refs" / "main").write_text("bbb\n")
    assert detect(entry).folder.name == "bbb"
    (entry / "refs" / "main").write_text("../../..")
    with pytest.raises(CheckpointError, match=r"2 snapshots \(aaa, bbb\)"):
        detect(entry)


def broken(tmp_path: Path, name: str, changes: Mapping[str, Tensor | None]) -> Path:
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
        load_path(broken(tmp_path, "m9", wrong), safety_checker=False)
    message = str(caught.value)
    assert f"{len(keys)} missing keys: {keys[0]}" in message
    assert f"and {len(keys) - 3} more" in message
    assert "4 unexpected keys: model.surprise.0" in message
    assert "1 keys of another shape: first_stage_model.quant_conv.bias [3] instead of [8]" in message
    assert str(tmp_path) in message
    assert caught.value.missing == keys


@pytest.mark.parametrize(
    ("name", "key"), [("m9", "first_stage_model.decoder.conv_in.weight"), ("m18", f"{TEXT}pre_LN.weight")]
)
def test_no_weight_may_be_missing(name: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(StateDictMismatchError, match=re.escape(f"1 missing keys: {key}.")):
        load_path(broken(tmp_path, name, {key: None}), safety_checker=False)


SCHEDULE = [key for key in tiny.tiny_state("m9") if "." not in key]
ROUNDED = {
    "half": lambda v: v.half(),
    "bfloat16": lambda v: v.bfloat16(),
    "float64": lambda v: v.double(),
}
NONSENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "half and back": lambda v: v.half().float(),
    "NaN": lambda v: torch.full_like(v, float("nan")),
    "infinity": lambda v: torch.full_like(v, float("inf")),
    "zeros": torch.zeros_like,
    "integers": lambda v: v.long(),
    "booleans": lambda v: v.bool(),
    "another length": lambda v: v[:500].flip(0),
    "a number": lambda v: v.sum(),
    "another schedule": lambda v: v * 1.01,
    "one wrong": lambda v: v.index_fill(0, torch.tensor([700]), 0.5),
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "schedule" in r.getMessage()]


@pytest.mark.fault(114)
@pytest.mark.parametrize("kind", ["none", *ROUNDED, *NONSENSE])
@pytest.mark.parametrize("config", [True, False])
def test_the_schedule_is_the_configs(kind: str, config: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change: Callable[[Tensor], Tensor] | None = {**ROUNDED, **NONSENSE}.get(kind)
    state = {k: v for k, v in tiny.tiny_state("m9").items() if k not in SCHEDULE}
    if change is not None:
        state |= {k: change(tiny.tiny_state("m9")[k]) for k in SCHEDULE}
    if kind == "another schedule":
        state["betas"] = torch.linspace(0.1, 0.9, 1000).flip(0)  # no schedule that a config could say
    folder = tiny.write_flagai_folder(tmp_path, "m9", state)
    if not config:
        (folder / "config.yaml").unlink()
    assert_same(state_of(folder), "m9")
    said = warnings_of(caplog)
    assert len(said) == (kind in NONSENSE)
    assert all("betas" in text and "config" in text for text in said)


@pytest.mark.fault(114)
def test_one_schedule_buffer_may_be_missing_and_another_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_same(state_of(broken(tmp_path, "m9", {"betas": None, "alphas_cumprod": torch.zeros(1000)})), "m9")
    assert "(alphas_cumprod)" in warnings_of(caplog)[0]


@pytest.mark.parametrize(("start", "end", "steps", "power"), [(0.0001, 0.02, 500, 1.0), (0.002, 0.03, 1000, 0.5)])
def test_a_lone_file_tells_its_schedule(
    start: float, end: float, steps: int, power: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    betas = torch.linspace(start**power, end**power, steps, dtype=torch.float64) ** (1 / power)
    path = lone(tmp_path, "m9", "m.ckpt")
    torch.save({**tiny.tiny_state("m9"), **schedule_buffers(betas)}, path)
    model = load_path(path, safety_checker=False)
    assert (model.config.timesteps, model.config.linear_start, model.config.linear_end) == (steps, start, end)
    assert torch.allclose(model.betas, betas.float(), rtol=1e-6)
    assert warnings_of(caplog) == []


INERT: dict[str, Tensor] = {
    "logvar": torch.zeros(1000),
    "scale_factor": torch.tensor(0.18215),
    "lvlb_weights": torch.full((1000,), float("nan")),
    "posterior_variance": torch.zeros(1000, dtype=torch.int64),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "first_stage_model.loss.discriminator.main.0.weight": torch.full((3,), float("inf")),
    "first_stage_model.model_ema.decay": torch.tensor(0.9),
    "model_ema.decay": torch.tensor(float("nan")),
    "model_ema.diffusion_modelout0weight": torch.ones(2, dtype=torch.int8),
    "logit_scale": torch.tensor(2.6),
    f"{TEXT}logit_scale": torch.tensor(2, dtype=torch.int64),
    f"{TEXT}roberta.pooler.dense.weight": torch.full((3, 5), float("nan")),
    f"{TEXT}roberta.embeddings.token_type_ids": torch.zeros(1, 514),
    POSITION_IDS: torch.arange(514.0)[None].bfloat16(),
}


@pytest.mark.parametrize("key", INERT)
@pytest.mark.parametrize("config", [True, False])
def test_what_nothing_reads_is_never_a_reason_to_refuse(key: str, config: bool, tmp_path: Path) -> None:
    folder = broken(tmp_path, "m18", {key: INERT[key]})
    if not config:
        (folder / "config.yaml").unlink()
    assert_same(state_of(folder), "m18")


@pytest.mark.fault(114)
def test_every_buffer_in_half_and_averages_beside(
    variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {k: v.half() for k, v in {**tiny.tiny_state(variant), **INERT}.items()}
    state |= {
        f"{TEXT}roberta.pooler.dense.weight": torch.ones(128, 128),
        f"{TEXT}roberta.pooler.dense.bias": torch.ones(128),
    }
    loaded = state_of(tiny.write_flagai_folder(tmp_path, variant, state))
    assert torch.equal(loaded[POSITION_IDS], torch.arange(514)[None])
    assert torch.equal(loaded["betas"], tiny.tiny_state(variant)["betas"])


def test_a_norm_that_the_read_out_does_not_use_may_be_missing(tmp_path: Path) -> None:
    state = state_of(broken(tmp_path, "m9", {f"{TEXT}pre_LN.weight": None, f"{TEXT}pre_LN.bias": None}))
    assert state[f"{TEXT}pre_LN.weight"].unique().tolist() == [1.0]


def test_a_diffusers_folder_may_lack_what_nothing_reads(m9_folder: Path, tmp_path: Path) -> None:
    convert(m9_folder, tmp_path / "d", "diffusers")
    path = tmp_path / "d" / "text_encoder" / "model.safetensors"
    text = {k: v for k, v in load_file(path).items() if "position_ids" not in k and "pre_LN" not in k}
    save_file({**text, "logit_scale": torch.ones(())}, path)
    assert load_path(tmp_path / "d", safety_checker=False) is not None


@pytest.mark.fault(37)
def test_integers_are_no_weights(tmp_path: Path) -> None:
    key = "model.diffusion_model.out.2.bias"
    with pytest.raises(CheckpointError, match=re.escape(key)):
        load_path(broken(tmp_path, "m9", {key: torch.ones(4, dtype=torch.int64)}), safety_checker=False)


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
    with pytest.raises(ConfigError, match="num_hidden_layers=2000: expected at most 48"):
        load_path(path)


def deep_config(part: str, **sizes: object) -> dict[str, Any]:
    data = tiny.config_data(tiny.M9)
    params = data["model"]["params"][f"{part}_config"]["params"]
    params.get("ddconfig", params).update(sizes)
    return data


DEEP: dict[str, dict[str, Any]] = {
    "160,000 transformers": deep_config(
        "unet",
        num_res_blocks=100,
        channel_mult=[1] * 16,
        transformer_depth=100,
        attention_resolutions=[2**i for i in range(16)],
    ),
    "3,000 blocks": deep_config("unet", num_res_blocks=100, channel_mult=[1] * 16),
    "100 transformers in each": deep_config("unet", transformer_depth=100),
    "3,000 blocks of the autoencoder": deep_config("first_stage", num_res_blocks=100, ch_mult=[1] * 16),
}


@pytest.mark.fault(140)
@pytest.mark.parametrize("name", DEEP)
def test_a_config_of_more_blocks_than_weights_costs_nothing(name: str, tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path, "m9")
    (tmp_path / "config.yaml").write_text(json.dumps(DEEP[name]))
    refusals = r"describes a model of over \d+ weights .*there are \d+|should have at most 8 items|make [\d,]+ layers"
    with in_proportion(0), pytest.raises((CheckpointError, ConfigError), match=refusals):
        load_path(tmp_path, safety_checker=False)


@pytest.mark.fault(140)
def test_a_diffusers_config_of_more_blocks_than_weights_costs_nothing(m9_folder: Path, tmp_path: Path) -> None:
    convert(m9_folder, tmp_path / "d", "diffusers")
    config = json.loads((tmp_path / "d" / "unet" / "config.json").read_text())
    levels = {"block_out_channels": [32] * 16, "layers_per_block": 100, "transformer_layers_per_block": 100}
    kinds = {"down_block_types": ["CrossAttnDownBlock2D"] * 16, "up_block_types": ["CrossAttnUpBlock2D"] * 16}
    (tmp_path / "d" / "unet" / "config.json").write_text(json.dumps({**config, **levels, **kinds}))
    refusals = r"describes a model of over \d+ weights|1 to 8 integers|at most 8 items|make [\d,]+ layers"
    with in_proportion(0), pytest.raises((CheckpointError, ConfigError), match=refusals):
        load_path(tmp_path / "d", safety_checker=False)


@pytest.mark.fault(140)
def test_a_lone_file_of_many_blocks_costs_no_more_than_its_size(tmp_path: Path) -> None:
    """A few hundred keys whose numbers, multiplied, are hundreds of thousands of blocks."""
    path = lone(tmp_path, "m9", "m.safetensors")
    unet = "model.diffusion_model."
    made = {f"{unet}middle_block.1.transformer_blocks.{i}.x": torch.ones(1) for i in range(100)}
    for i in range(1, 15):
        made |= {f"{unet}input_blocks.{101 * i}.0.op.weight": torch.ones(1)}
    blocks = (f"{unet}input_blocks.{i}.0.out_layers.3.weight" for i in range(1, 1515) if i % 101)
    made |= {name: torch.ones(32, 1, 1, 1) for name in blocks}
    save_file({**tiny.tiny_state("m9"), **made}, path)
    refusals = "describes a model of over|at most 8 items"
    with in_proportion(0), pytest.raises((CheckpointError, ConfigError), match=refusals):
        load_path(path, safety_checker=False)


@pytest.mark.fault(140)
def test_a_large_model_is_built_before_it_is_said_what_it_lacks(tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path, "m9")
    (tmp_path / "config.yaml").write_text(json.dumps(deep_config("unet", num_res_blocks=4, channel_mult=[1, 1, 2, 2])))
    with in_proportion(0), pytest.raises(StateDictMismatchError, match=r"\d+ missing keys"):
        load_path(tmp_path, safety_checker=False)


@pytest.mark.fault(140)
@pytest.mark.parametrize("config", [True, False])
def test_a_wide_text_encoder_costs_no_more_than_its_size(config: bool, tmp_path: Path) -> None:
    """XLM-R's pooler is a square that files may lack: of 65,536 rows, it would take 17 GB."""
    words = f"{TEXT}roberta.embeddings.word_embeddings.weight"
    pooler = f"{TEXT}roberta.pooler.dense.weight"
    wide = {words: torch.ones(tiny.vocabulary_size(), 1 << 16, dtype=torch.int8), pooler: torch.ones(1)}
    folder = broken(tmp_path, "m9", wide)
    if not config:
        (folder / "config.yaml").unlink()
    with in_proportion((folder / "model.ckpt").stat().st_size), pytest.raises(FlagAIAltDiffError):
        load_path(folder, safety_checker=False)


SIZED = (
    f"{TEXT}roberta.embeddings.word_embeddings.weight",
    f"{TEXT}roberta.embeddings.position_embeddings.weight",
    f"{TEXT}roberta.encoder.layer.0.intermediate.dense.weight",
    f"{TEXT}transformation.weight",
    "model.diffusion_model.input_blocks.0.0.weight",
    "model.diffusion_model.input_blocks.1.0.out_layers.3.weight",
    "model.diffusion_model.middle_block.1.proj_in.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.out.2.weight",
    "first_stage_model.encoder.conv_in.weight",
    "first_stage_model.encoder.down.1.block.0.conv2.weight",
    "first_stage_model.post_quant_conv.weight",
)
SHAPES = ((), (0,), (3,), (0, 0), (0, 5), (1, 1), (3, 70_000), (2, 0, 3, 3), (1, 1, 1, 1), (2, 2, 2), (1, 1, 1, 1, 1))


@pytest.mark.fault(142)
@pytest.mark.parametrize("key", SIZED)
def test_a_tensor_that_tells_a_size_may_have_any_shape(key: str) -> None:
    for shape in SHAPES:
        state = {**tiny.tiny_state("m9"), key: torch.ones(shape, dtype=torch.int8)}
        with pytest.raises(FlagAIAltDiffError, match=r"^m\.ckpt"):
            check_shapes(state)


def check_shapes(state: Mapping[str, Tensor]) -> None:
    config = complete_config(infer_config(state, "m.ckpt"), state, "m.ckpt")
    check_counts(config, counts(state), "m.ckpt")
    fill_unread(config.cond_stage, state)
    with torch.device("meta"):
        model = build_model(config)
    assign(model, state, "m.ckpt")


@pytest.mark.fault(142)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_every_type_of_fraction_is_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    keys = ("cond_stage_model.pre_LN.weight", f"{TEXT}roberta.pooler.dense.weight", "betas", "alphas_cumprod")
    state = {**tiny.tiny_state("m9"), f"{TEXT}roberta.pooler.dense.weight": torch.ones(128, 128)}
    save_file({**state, **{key: state[key].to(dtype) for key in keys}}, lone(tmp_path, "m9", "m.safetensors"))
    model = load_path(tmp_path / "models" / "m.safetensors", safety_checker=False)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.fault(114)
def test_a_long_table_is_no_schedule_and_no_reason_to_refuse(tmp_path: Path) -> None:
    path = lone(tmp_path, "m9", "m.safetensors")
    betas = torch.linspace(0.0001, 0.02, 200_000, dtype=torch.float64)
    save_file({**tiny.tiny_state("m9"), "betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}, path)
    assert load_path(path, safety_checker=False).num_timesteps == 1000


@pytest.mark.fault(144)
def test_keys_of_weights_are_shown_escaped_and_short(tmp_path: Path) -> None:
    odd = {f"\x1b[31m{i}" + "\u202e" * 900 + ".x": torch.ones(1) for i in range(9)}
    for state in (odd, {**tiny.tiny_state("m9"), **odd}):
        path = lone(tmp_path, "m9", "m.safetensors")
        save_file(state, path)
        with pytest.raises(CheckpointError) as caught:
            load_path(path, safety_checker=False)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 4000


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
        detect(tmp_path).require()
    assert str(tmp_path) in str(caught.value)
    assert "snapshots" in str(caught.value)


JUNK = ("._model.ckpt", "._model.safetensors", ".model.ckpt", "._config.yaml", "._sentencepiece.bpe.model", ".DS_Store")


@pytest.mark.fault(116)
@pytest.mark.parametrize(
    "layout", ["FlagAI folder", "lone ckpt", "folder of one file", "tokenizer.json", "Hugging Face cache"]
)
def test_hidden_files_are_never_a_part_of_a_model(layout: str, tmp_path: Path, no_network: None) -> None:
    path = LAYOUTS[layout](tmp_path / "model", "m9")
    for place in {folder for folder in (tmp_path / "model").rglob("*") if folder.is_dir()} | {tmp_path / "model"}:
        for name in JUNK:
            (place / name).write_bytes(b"\0\5\x16\7 Mac OS X")
    (tmp_path / "model" / ".Trash" / "tokenizer").mkdir(parents=True)
    assert_same(state_of(path), "m9")


@pytest.mark.parametrize("hidden", JUNK[:3])
def test_a_folder_of_hidden_weights_holds_none(hidden: str, tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path, "m9")
    (tmp_path / "model.ckpt").rename(tmp_path / hidden)
    with pytest.raises(CheckpointError, match="holds no model"):
        load_path(tmp_path)


@pytest.mark.parametrize("config", [True, False])
def test_a_choice_between_files_of_weights_is_the_users(config: bool, tmp_path: Path, no_network: None) -> None:
    tiny.write_flagai_folder(tmp_path / "AltDiffusion-m9", "m9")
    folder = tmp_path / "AltDiffusion-m9"
    (folder / "model.ckpt").rename(folder / "one.ckpt")
    shutil.copy(folder / "one.ckpt", folder / "two.pt")
    (folder / "._zero.ckpt").touch()
    (folder / "empty.bin").touch()
    if not config:
        (folder / "config.yaml").unlink()
    for load in (
        lambda: load_path(folder),
        lambda: load_model("AltDiffusion-m9", tmp_path),
        lambda: load_model(folder),
    ):
        with pytest.raises(CheckpointError, match=r"2 files of weights \(one\.ckpt, two\.pt\)") as caught:
            load()
        assert str(folder / "one.ckpt") in str(caught.value)
    assert_same(state_of(folder / "two.pt"), "m9")


@pytest.mark.parametrize("newer", ["model.safetensors", "model.ckpt"])
def test_of_two_known_names_one_is_taken_and_said(newer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder may have both by conversion; but a model saved beside the old one should not be lost sight of."""
    tiny.write_flagai_folder(tmp_path, "m9", tiny.tiny_state("m9", seed=3))
    save_file(tiny.tiny_state("m9"), tmp_path / "model.safetensors")
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "dreambooth_model.ckpt")
    for name in ("model.safetensors", "model.ckpt", "dreambooth_model.ckpt"):
        os.utime(tmp_path / name, (1, 2 if name == newer else 1))
    caplog.set_level(logging.INFO, "flagai_altdiff")
    assert_same(state_of(tmp_path), "m9")
    (record,) = [r for r in caplog.records if "taking model.safetensors" in r.getMessage()]
    assert record.levelname == ("INFO" if newer == "model.safetensors" else "WARNING")
    assert ("although model.ckpt is newer" in record.getMessage()) is (newer == "model.ckpt")


@pytest.mark.parametrize("wrapper", ["module", "model_state_dict", "state_dict of module", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_what_trainers_wrap_around_is_taken_off(wrapper: str, prefix: str, tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    data: dict[str, Any] = {prefix + key: value for key, value in tiny.tiny_state("m9").items()}
    for name in wrapper.split(" of "):
        data = {name: data, "iteration": 5, "rng": torch.get_rng_state()}
    torch.save(data, folder / "model.ckpt")
    assert load_path(folder, safety_checker=False).num_timesteps == 1000


def test_a_file_of_a_folder_has_the_folders_config(tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    assert detect(folder / "model.ckpt").config == folder / "config.yaml"
    (folder / "model.yaml").write_text((folder / "config.yaml").read_text())
    assert detect(folder / "model.ckpt").config == folder / "model.yaml"


@pytest.mark.parametrize("value", [torch.full((128, 128), torch.nan), torch.ones(128, 128).long(), torch.ones(3, 3)])
def test_weights_that_nothing_reads_are_no_reason_to_refuse(value: torch.Tensor, tmp_path: Path) -> None:
    state = dict(tiny.tiny_state("m9"))
    state["cond_stage_model.roberta.pooler.dense.weight"] = value
    state["cond_stage_model.pre_LN.weight"] = torch.full((128,), torch.nan)
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9", state)
    assert len(generate(load_path(folder, safety_checker=False), "a cat", steps=1, height=64, width=64).images) == 1


def test_a_loop_of_links_is_no_safety_checker(tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    (folder / "safety_checker").symlink_to("safety_checker")
    assert detect(folder).safety_checker is None


@pytest.mark.fault(116)
def test_an_empty_file_is_no_weights(tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path, "m9")
    (tmp_path / "model.safetensors").touch()
    assert_same(state_of(tmp_path), "m9")


def test_half_a_diffusers_folder_says_what_it_lacks(m9_folder: Path, tmp_path: Path) -> None:
    convert(m9_folder, tmp_path / "d", "diffusers")
    weights = tmp_path / "d" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("._" + weights.name))
    with pytest.raises(CheckpointError, match=r"lacks vae/\*\.safetensors"):
        load_path(tmp_path / "d")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        detect(tmp_path / "nothing").require()


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
    with pytest.raises(CheckpointError, match="no-such-file"):
        save_folder(tmp_path / "a" / "new", config, state, tmp_path / "no-such-file")
    assert not (tmp_path / "a").exists()
    assert list((tmp_path / "there").iterdir()) == []
