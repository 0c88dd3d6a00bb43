"""Folders in diffusers' layout: reading their configs, finding their weights, writing them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagai_altdiff.checkpoint.diffusers_folder import (
    is_diffusers_folder,
    read_config,
    read_weights,
    weight_files,
    write_folder,
)
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import CheckpointError, ConfigError
from flagai_altdiff.models import build_model

NO_WEIGHTS: Mapping[str, Mapping[str, Tensor]] = {"unet": {}, "vae": {}, "text_encoder": {}}
M9 = LatentDiffusionConfig(cond_stage=TextEncoderConfig(has_pooler=False))
M18 = LatentDiffusionConfig(
    unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
    cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
)
TINY = LatentDiffusionConfig(
    unet=UNetConfig(
        model_channels=8, channel_mult=(1, 2), attention_resolutions=(2,), norm_groups=4, num_heads=2, context_dim=8
    ),
    first_stage=AutoencoderConfig(ch=8, ch_mult=(1, 2), resolution=64, norm_groups=4),
    cond_stage=TextEncoderConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9, project_dim=8
    ),
)

RELEASED_M9: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "AltDiffusionPipeline",
        "_diffusers_version": "0.8.0.dev0",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"],
        "tokenizer": ["transformers", "XLMRobertaTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.8.0.dev0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.8.0.dev0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder/config.json": {
        "architectures": ["RobertaSeriesModelWithTransformation"],
        "classifier_dropout": None,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "learn_encoder": False,
        "max_position_embeddings": 514,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "output_past": True,
        "pad_token_id": 1,
        "pooler_fn": "cls",
        "position_embedding_type": "absolute",
        "project_dim": 768,
        "type_vocab_size": 1,
        "use_attention_mask": True,
        "vocab_size": 250002,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    },
}


def released(folder: Path, **changes: Mapping[str, Any]) -> Path:
    """A folder with the released m9 configs; ``changes`` are fields by part (``unet={...}``)."""
    for name, values in RELEASED_M9.items():
        part = name.partition("/")[0].removesuffix(".json")
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**values, **changes.get(part, {})}))
    return folder


def test_the_released_configs_are_read(tmp_path: Path) -> None:
    assert is_diffusers_folder(released(tmp_path))
    assert read_config(tmp_path) == M9


def test_another_folder_is_not_taken_for_one(tmp_path: Path) -> None:
    assert not is_diffusers_folder(tmp_path)
    assert not is_diffusers_folder(tmp_path / "absent")


def test_the_m18_fields_are_read(tmp_path: Path) -> None:
    released(
        tmp_path,
        unet={
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "upcast_attention": False,
        },
        text_encoder={"project_dim": 1024, "has_pre_transformation": True},
    )
    assert read_config(tmp_path) == M18


@pytest.mark.parametrize(
    "index",
    [
        {"feature_extractor": [None, None], "safety_checker": [None, None]},
        {"feature_extractor": None, "safety_checker": None, "tokenizer": None},
        {"_class_name": "AltDiffusionImg2ImgPipeline"},
        {"_class_name": "StableDiffusionPipeline", "text_encoder": ["modeling", "XLMRobertaSeriesModel"]},
    ],
)
def test_indexes_of_derived_folders_are_accepted(tmp_path: Path, index: dict[str, Any]) -> None:
    assert read_config(released(tmp_path, model_index=index)) == M9


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"attention_head_dim": 8}, (8, None)),
        ({"attention_head_dim": 4}, (4, None)),
        ({"attention_head_dim": [5, 10, 20, 20]}, (None, 64)),
        ({"attention_head_dim": [8, 8, 8, 8]}, (8, None)),
        ({"attention_head_dim": 8, "num_attention_heads": 10}, (10, None)),
        ({"attention_head_dim": 8, "num_attention_heads": None}, (8, None)),
    ],
)
def test_attention_head_dim_means_heads(
    tmp_path: Path, fields: dict[str, Any], heads: tuple[int | None, int | None]
) -> None:
    unet = read_config(released(tmp_path, unet=fields)).unet
    assert (unet.num_heads, unet.num_head_channels) == heads


def test_block_types_say_where_the_unet_attends(tmp_path: Path) -> None:
    fields = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    assert read_config(released(tmp_path, unet=fields)).unet.attention_resolutions == (8, 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prediction_type": "v_prediction"}, {"parameterization": "v"}),
        ({"prediction_type": "sample"}, {"parameterization": "x0"}),
        ({"beta_schedule": "linear"}, {"beta_schedule": "sqrt_linear"}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "cosine"}),
        (
            {"_class_name": "DDIMScheduler", "beta_end": 0.02, "num_train_timesteps": 500},
            {"linear_end": 0.02, "timesteps": 500},
        ),
    ],
)
def test_the_scheduler_gives_the_training_schedule(
    tmp_path: Path, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert read_config(released(tmp_path, scheduler=fields)) == replace(M9, **expected)


def test_the_scaling_factor_is_read(tmp_path: Path) -> None:
    assert read_config(released(tmp_path, vae={"scaling_factor": 0.5})).scale_factor == 0.5


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model_index", "_class_name", "StableDiffusionXLPipeline"),
        ("model_index", "text_encoder", ["transformers", "CLIPTextModel"]),
        ("model_index", "unet", [None, None]),
        ("model_index", "vae", "os.system"),
        ("unet", "_class_name", "UNet3DConditionModel"),
        ("unet", "addition_embed_type", "text_time"),
        ("unet", "flip_sin_to_cos", False),
        ("unet", "norm_eps", 1e-6),
        ("unet", "only_cross_attention", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "attention_head_dim", [5, 10, 20, 21]),
        ("unet", "attention_head_dim", [8]),
        ("unet", "attention_head_dim", "8"),
        ("unet", "block_out_channels", [320, 480]),
        ("unet", "block_out_channels", [320] * 17),
        ("unet", "block_out_channels", []),
        ("unet", "down_block_types", ["SimpleCrossAttnDownBlock2D"] * 4),
        ("unet", "up_block_types", ["CrossAttnUpBlock2D"] * 4),
        ("unet", "layers_per_block", [1, 2, 2, 2]),
        ("unet", "cross_attention_dim", -1),
        ("unet", "cross_attention_dim", 10**9),
        ("unet", "in_channels", True),
        ("unet", "use_linear_projection", "yes"),
        ("vae", "_class_name", "AsymmetricAutoencoderKL"),
        ("vae", "latents_mean", [0.0]),
        ("vae", "use_quant_conv", False),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "scaling_factor", 10**400),
        ("scheduler", "beta_end", float("inf")),
        ("text_encoder", "architectures", ["CLIPTextModel"]),
        ("text_encoder", "hidden_act", "quick_gelu"),
        ("text_encoder", "has_pre_transformation", 1),
        ("scheduler", "trained_betas", [0.1]),
        ("scheduler", "rescale_betas_zero_snr", True),
        ("scheduler", "prediction_type", "flow"),
        ("scheduler", "beta_schedule", ["linear"]),
    ],
)
def test_what_the_model_cannot_express_is_refused(tmp_path: Path, part: str, field: str, value: object) -> None:
    released(tmp_path, **{part: {field: value}})
    with pytest.raises(ConfigError, match=field) as caught:
        read_config(tmp_path)
    names = {"model_index": "model_index.json", "scheduler": "scheduler_config.json"}
    assert names.get(part, f"{part}/config.json") in str(caught.value).replace("\\", "/")


def test_sizes_that_do_not_go_together_are_refused_with_the_file(tmp_path: Path) -> None:
    released(tmp_path, unet={"norm_num_groups": 7})
    with pytest.raises(ConfigError, match=r"unet.config\.json: .*norm groups"):
        read_config(tmp_path)
    released(tmp_path, unet={"cross_attention_dim": 512})
    with pytest.raises(ConfigError, match="context_dim is 512"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, '"' + "x" * (1 << 20) + '"', "\x00"])
def test_files_that_are_not_small_json_objects_are_refused(tmp_path: Path, text: str) -> None:
    released(tmp_path)
    (tmp_path / "vae" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"vae.config\.json"):
        read_config(tmp_path)


@pytest.mark.fault(36)
def test_stable_diffusion_is_named(tmp_path: Path) -> None:
    released(
        tmp_path,
        model_index={"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]},
    )
    with pytest.raises(ConfigError, match="this is Stable Diffusion, not AltDiffusion"):
        read_config(tmp_path)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_map", {"AutoModel": "modeling.Evil"}),
        ("trust_remote_code", True),
        ("custom_pipelines", {"a": 1}),
        ("_target_", "os.system"),
    ],
)
@pytest.mark.parametrize("part", ["model_index", "unet", "vae", "text_encoder", "scheduler"])
def test_a_config_that_asks_for_code_is_refused(part: str, field: str, value: object, tmp_path: Path) -> None:
    released(tmp_path, **{part: {field: value}})
    with pytest.raises(ConfigError, match=f"{field} asks for code"):
        read_config(tmp_path)


@pytest.mark.fault(39)
@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_encoder", "hidden_size", 10**9),
        ("text_encoder", "hidden_size", 999_936),
        ("text_encoder", "num_hidden_layers", 1_000_000),
        ("text_encoder", "vocab_size", 10**9),
        ("unet", "layers_per_block", 1_000_000),
        ("unet", "block_out_channels", [32, 32_000, 64_000, 960_000]),
        ("unet", "transformer_layers_per_block", 101),
        ("vae", "block_out_channels", [999_936] * 4),
        ("vae", "layers_per_block", 101),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    part: str, field: str, value: object, tmp_path: Path
) -> None:
    released(tmp_path, **{part: {field: value}})
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    released(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match=r"scheduler_config\.json"):
        read_config(tmp_path)


ORDER = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
]


@pytest.mark.parametrize("best", range(len(ORDER)))
def test_the_best_weights_are_chosen(tmp_path: Path, best: int) -> None:
    (tmp_path / "unet").mkdir()
    for name in [*ORDER[best:], "diffusion_pytorch_model.non_ema.safetensors"]:
        (tmp_path / "unet" / name).write_bytes(b"x")
    assert weight_files(tmp_path, "unet") == [tmp_path / "unet" / ORDER[best]]


@pytest.mark.parametrize(
    ("index", "shards"),
    [
        (
            "diffusion_pytorch_model.safetensors.index.json",
            ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"],
        ),
        ("pytorch_model.bin.index.json", ["b-00001-of-00001.bin"]),
        ("diffusion_pytorch_model.safetensors.index.fp16.json", ["c.fp16-00001-of-00001.safetensors"]),
        ("model.fp16.safetensors.index.json", ["d.fp16-00001-of-00001.safetensors"]),
    ],
)
def test_shards_are_found_once_each(tmp_path: Path, index: str, shards: list[str]) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    for shard in shards:
        (folder / shard).touch()
    (folder / index).write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(shards * 2)}}))
    assert weight_files(tmp_path, "unet") == [folder / shard for shard in shards]


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "shard",
    [
        "../vae/x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "x.bin",
        "",
        7,
    ],
)
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: object) -> None:
    for folder in ("unet", "unet/sub", "vae"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.safetensors").touch()
    (tmp_path / "unet" / "x.bin").touch()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="refused"):
        weight_files(tmp_path, "unet")


@pytest.mark.fault(34)
@pytest.mark.parametrize(
    "shard",
    [
        ["x.safetensors"],
        {"a": "x.safetensors"},
        None,
        1.5,
        "a" * 300 + ".safetensors",
        "é" * 130 + ".safetensors",
        "\x1b[31m.safetensors",
        "a\0.safetensors",
        "\ud800.safetensors",
        "a\n.safetensors",
        "C:/x.safetensors",
    ],
)
def test_a_shard_whose_name_no_file_can_have_is_refused(tmp_path: Path, shard: object) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"v": "x.safetensors", "w": shard}}))
    (tmp_path / "unet" / "x.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is not the name of a \.safetensors file in .*; refused") as caught:
        weight_files(tmp_path, "unet")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


ONE, TWO = "x-1.safetensors", "x-2.safetensors"


def sharded(folder: Path, shards: Mapping[str, Sequence[str]], weight_map: Mapping[str, str], prefix: str = "") -> Path:
    (folder / "unet").mkdir()
    for i, (name, keys) in enumerate(shards.items()):
        save_file({prefix + key: torch.full((2,), float(i)) for key in keys}, folder / "unet" / name)
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {prefix + k: v for k, v in weight_map.items()}}))
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_shards_are_read_as_one(tmp_path: Path, prefix: str) -> None:
    sharded(tmp_path, {ONE: ["a", "b", "more"], TWO: ["c"]}, {"a": ONE, "b": ONE, "c": TWO}, prefix)
    state = read_weights(tmp_path, "unet")
    assert {key: value[0].item() for key, value in state.items()} == {"a": 0, "b": 0, "more": 0, "c": 1}


@pytest.mark.fault(141)
def test_a_weight_in_two_shards_is_an_error_that_names_both(tmp_path: Path) -> None:
    sharded(tmp_path, {ONE: ["a", "b"], TWO: ["b", "c"]}, {"a": ONE, "b": ONE, "c": TWO})
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors and x-1\.safetensors both have b, and nothing tells"):
        read_weights(tmp_path, "unet")


@pytest.mark.fault(141)
@pytest.mark.parametrize("weight_map", [{"a": ONE, "b": TWO, "c": TWO}, {"a": ONE, "b": ONE, "c": TWO, "d": TWO}])
def test_a_weight_that_is_not_where_the_index_says_is_an_error(tmp_path: Path, weight_map: dict[str, str]) -> None:
    sharded(tmp_path, {ONE: ["a", "b"], TWO: ["c"]}, weight_map)
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors has no [bd], which its index places there"):
        read_weights(tmp_path, "unet")


@pytest.mark.fault(141)
@pytest.mark.parametrize(
    "names",
    [
        ("model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"),
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.fp16.bin", "pytorch_model.bin.index.fp16.json"),
    ],
)
def test_two_answers_to_which_weights_are_meant_are_an_error(tmp_path: Path, names: tuple[str, str]) -> None:
    (tmp_path / "unet").mkdir()
    for name in names:
        (tmp_path / "unet" / name).write_text(json.dumps({"weight_map": {"w": ONE}}))
    (tmp_path / "unet" / ONE).touch()
    with pytest.raises(CheckpointError, match=r".* and .*, and nothing tells which are the weights") as caught:
        weight_files(tmp_path, "unet")
    assert all(name in str(caught.value) for name in names)


@pytest.mark.fault(143)
def test_a_pipe_is_no_weights(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    os.mkfifo(tmp_path / "unet" / "model.safetensors")
    (tmp_path / "unet" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": ONE}}))
    os.mkfifo(tmp_path / "unet" / ONE)
    with pytest.raises(CheckpointError, match=r"x-1\.safetensors is missing"):
        weight_files(tmp_path, "unet")


@pytest.mark.fault(34)
@pytest.mark.parametrize("weight_map", [{}, None, ["x.safetensors"]])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map"):
        weight_files(tmp_path, "unet")


@pytest.mark.fault(34)
def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "x-00001-of-00001.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x-00001-of-00001\.safetensors is missing"):
        weight_files(tmp_path, "unet")


def test_a_part_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vae has no weights"):
        weight_files(tmp_path, "vae")


@pytest.mark.parametrize(
    "config",
    [
        M9,
        M18,
        TINY,
        replace(TINY, parameterization="v", scale_factor=0.3, timesteps=500),
        replace(TINY, parameterization="x0", beta_schedule="sqrt_linear"),
        replace(TINY, beta_schedule="cosine"),
        replace(TINY, first_stage=replace(TINY.first_stage, attn_resolutions=(32,))),
        replace(
            TINY,
            unet=replace(TINY.unet, attention_resolutions=(), transformer_depth=2, num_heads=None, num_head_channels=2),
        ),
    ],
)
def test_a_written_config_reads_back_equal(tmp_path: Path, config: LatentDiffusionConfig) -> None:
    write_folder(tmp_path / "out", config, NO_WEIGHTS, [])
    assert read_config(tmp_path / "out") == config


def test_a_written_folder_is_like_the_released_ones(tmp_path: Path) -> None:
    write_folder(tmp_path / "out", M9, NO_WEIGHTS, [])
    for name, values in RELEASED_M9.items():
        written = json.loads((tmp_path / "out" / name).read_text())
        expected = {k: v for k, v in values.items() if k not in ("classifier_dropout", "output_past")}
        if name == "model_index.json":
            expected |= {"feature_extractor": [None, None], "safety_checker": [None, None], "tokenizer": [None, None]}
            # The released classes are none that diffusers still opens.
            expected |= {"_class_name": "StableDiffusionPipeline"}
            expected |= {"text_encoder": ["flagai_altdiff", "MultilingualRobertaEncoder"]}
        assert expected.items() <= written.items(), name


def test_weights_and_tokenizer_are_written(tmp_path: Path) -> None:
    tokenizer = tmp_path / "sentencepiece.bpe.model"
    tokenizer.write_bytes(b"pieces")
    state = build_model(TINY).state_dict()
    parts = to_diffusers(state, TINY)
    write_folder(tmp_path / "new" / "out", TINY, parts, [tokenizer])
    folder = tmp_path / "new" / "out"
    assert (folder / "tokenizer" / tokenizer.name).read_bytes() == b"pieces"
    assert json.loads((folder / "model_index.json").read_text())["tokenizer"] == ["transformers", "XLMRobertaTokenizer"]
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == 64
    for part, tensors in parts.items():
        (file,) = weight_files(folder, part)
        read = load_file(file)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_an_existing_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="exists"):
        write_folder(tmp_path, TINY, NO_WEIGHTS, [])


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="absent"):
        write_folder(tmp_path / "out", TINY, NO_WEIGHTS, [tmp_path / "absent.model"])
    assert list(tmp_path.iterdir()) == []


def test_weights_of_no_part_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model_ema"):
        write_folder(tmp_path / "out", TINY, {**NO_WEIGHTS, "unknown": {"model_ema.x": torch.zeros(1)}}, [])


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (replace(TINY, unet=replace(TINY.unet, channel_mult=(2, 4))), "channel_mult"),
        (replace(TINY, first_stage=replace(TINY.first_stage, ch_mult=(2, 4))), "ch_mult"),
        (replace(TINY, first_stage=replace(TINY.first_stage, z_channels=8)), "z_channels"),
        (replace(TINY, beta_schedule="sqrt"), "beta_schedule"),
        (replace(TINY, beta_schedule="cosine", cosine_s=0.1), "cosine_s"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path: Path, config: LatentDiffusionConfig, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        write_folder(tmp_path / "out", config, NO_WEIGHTS, [])
    assert list(tmp_path.iterdir()) == []
