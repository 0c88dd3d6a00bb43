"""Folders in diffusers' layout: their configs, their weight files, and how to write one.

The class names in ``model_index.json`` are compared, never imported: the released folders name a library
(``alt_diffusion``) that no version of diffusers resolves any more.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.checkpoint.diffusers_keys import PREFIXES
from flagai_altdiff.checkpoint.json_config import ConfigFile, build, load_json
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import CheckpointError, ConfigError
from flagai_altdiff.files import grant_usual_mode

PIPELINES = ("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline", "StableDiffusionPipeline")
"""Pipeline classes whose folders may hold an AltDiffusion model."""

_INDEX = "model_index.json"


def is_diffusers_folder(folder: Path) -> bool:
    """Whether ``folder`` has diffusers' layout; :func:`read_config` tells whether it is a model of ours."""
    return (folder / _INDEX).is_file()


def read_config(folder: Path) -> LatentDiffusionConfig:
    """Config of the model in a diffusers folder.

    Args:
        folder: With ``model_index.json`` and the folders ``unet``, ``vae``, ``text_encoder`` and ``scheduler``.

    Returns:
        The config. The read-out of the text encoder follows ``has_pre_transformation``, as diffusers does.

    Raises:
        ConfigError: A file is missing or unreadable, or says something that AltDiffusion's parts cannot express; the
            message names file and field.
    """
    _check_index(load_json(folder / _INDEX))
    unet = load_json(folder / "unet" / "config.json")
    vae = load_json(folder / "vae" / "config.json")
    scheduler = load_json(folder / "scheduler" / "scheduler_config.json")
    scheduler.check({"trained_betas": None, "rescale_betas_zero_snr": False})
    return build(
        folder,
        LatentDiffusionConfig,
        unet=_read_unet(unet),
        first_stage=_read_autoencoder(vae),
        cond_stage=_read_text_encoder(load_json(folder / "text_encoder" / "config.json")),
        timesteps=scheduler.integer("num_train_timesteps", 1000),
        linear_start=scheduler.number("beta_start", 0.0001),
        linear_end=scheduler.number("beta_end", 0.02),
        beta_schedule=scheduler.choice("beta_schedule", _BETA_SCHEDULES, "linear"),
        parameterization=scheduler.choice("prediction_type", _PREDICTION_TYPES, "epsilon"),
        image_size=unet.integer("sample_size", 64),
        scale_factor=vae.number("scaling_factor", 0.18215),
    )


def weight_files(folder: Path, part: str) -> list[Path]:
    """Files that hold the weights of one part.

    Full precision goes before half, safetensors before pickles, one file before shards.

    Args:
        folder: The diffusers folder.
        part: ``unet``, ``vae``, ``text_encoder`` or another of its folders.

    Raises:
        CheckpointError: There are none, or an index names a shard that is missing or outside the part's folder.
    """
    for variant in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                whole = folder / part / f"{stem}{variant}{suffix}"
                if whole.is_file():
                    return [whole]
                for index in {f"{whole.name}.index.json", f"{stem}{suffix}.index{variant}.json"}:
                    if (folder / part / index).is_file():
                        return _shards(folder / part / index, suffix)
    raise CheckpointError(
        f"{folder / part} has no weights; expected diffusion_pytorch_model.safetensors, model.safetensors, "
        "pytorch_model.bin or their .fp16 or sharded forms. Was the download complete?"
    )


def write_folder(
    target: Path,
    config: LatentDiffusionConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer_files: Iterable[Path],
    *,
    weights: Literal["safetensors", "bin"] = "safetensors",
) -> None:
    """Write a model as a diffusers folder like the released ones; it appears whole or not at all.

    Args:
        target: The folder to create; must not exist.
        config: The model's config.
        parts: ``unet``, ``vae`` and ``text_encoder`` -> name -> weight, as ``to_diffusers`` gives them (without weights of
            another kind, for example averaged ones).
        tokenizer_files: Files of the XLM-R tokenizer, to be copied.
        weights: File format of the weights.

    Raises:
        CheckpointError: ``target`` exists, or ``parts`` is not exactly these three.
        ConfigError: diffusers' classes cannot express the config.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists; give another folder, or remove it first.")
    if set(parts) != set(PREFIXES):
        names = [f"{part}: {key}" for part in sorted(set(parts) - set(PREFIXES)) for key in list(parts[part])[:3]]
        raise CheckpointError(f"expected the parts {', '.join(PREFIXES)}, got {', '.join(parts)} {names or ''}".strip() + ".")
    tokenizer_files = list(tokenizer_files)
    configs = {
        _INDEX: _index(_scheduler_class(config), has_tokenizer=bool(tokenizer_files)),
        "unet/config.json": _unet_fields(config.unet, config.image_size),
        "vae/config.json": _autoencoder_fields(config.first_stage, config.scale_factor),
        "text_encoder/config.json": _text_encoder_fields(config.cond_stage),
        "scheduler/scheduler_config.json": _scheduler_fields(config),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        for name, fields in configs.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for part, tensors in parts.items():
            _save(partial / part, tensors, weights)
        for file in tokenizer_files:
            (partial / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(file, partial / "tokenizer" / file.name)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_index(index: ConfigFile) -> None:
    if index.fields.get("_class_name") not in PIPELINES:
        raise index.error("_class_name", " or ".join(PIPELINES))
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "Roberta")):
        entry = index.fields.get(part)
        kind = entry[-1] if isinstance(entry, list) and entry else None
        if not isinstance(kind, str) or name not in kind:
            if isinstance(kind, str) and kind.startswith("CLIP"):
                raise ConfigError(f"{index.path}: its text_encoder is {kind}: this is Stable Diffusion, not AltDiffusion.")
            raise index.error(part, f"a class named {name}" if part != "text_encoder" else "a Roberta class")


_BETA_SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
_PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# Fields that must have the one value that AltDiffusion's modules are built for, and fields that change nothing here.
_UNET_FIXED = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
}
_UNET_READ = (
    "in_channels out_channels block_out_channels layers_per_block down_block_types up_block_types attention_head_dim "
    "num_attention_heads use_linear_projection cross_attention_dim transformer_layers_per_block norm_num_groups"
).split()
_UNET_INERT = "sample_size dropout upcast_attention addition_embed_type_num_heads".split()
_VAE_FIXED = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
_VAE_READ = (
    "in_channels out_channels latent_channels block_out_channels layers_per_block down_block_types up_block_types "
    "norm_num_groups sample_size scaling_factor"
).split()
_VAE_INERT = ["force_upcast"]
_TEXT_FIXED = {
    "hidden_act": "gelu",
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "position_embedding_type": "absolute",
    "use_attention_mask": True,
}


def _read_unet(file: ConfigFile) -> UNetConfig:
    _check_class(file, "UNet2DConditionModel")
    file.check(_UNET_FIXED, [*_UNET_READ, *_UNET_INERT])
    width, mults = _widths(file, (320, 640, 1280, 1280))
    attends = _attention_levels(file, len(mults), "CrossAttn", "DownBlock2D", "UpBlock2D")
    num_heads, num_head_channels = _heads(file, [width * mult for mult in mults])
    return build(
        file.path,
        UNetConfig,
        in_channels=file.integer("in_channels", 4),
        out_channels=file.integer("out_channels", 4),
        model_channels=width,
        attention_resolutions=tuple(2**level for level in reversed(range(len(mults))) if attends[level]),
        num_res_blocks=file.uniform("layers_per_block", 2),
        channel_mult=mults,
        num_heads=num_heads,
        num_head_channels=num_head_channels,
        use_linear_in_transformer=file.flag("use_linear_projection"),
        context_dim=file.integer("cross_attention_dim", 1280),
        transformer_depth=file.uniform("transformer_layers_per_block", 1),
        norm_groups=file.integer("norm_num_groups", 32),
    )


def _read_autoencoder(file: ConfigFile) -> AutoencoderConfig:
    _check_class(file, "AutoencoderKL")
    file.check(_VAE_FIXED, [*_VAE_READ, *_VAE_INERT])
    ch, mults = _widths(file, (64,))
    attends = _attention_levels(file, len(mults), "Attn", "DownEncoderBlock2D", "UpDecoderBlock2D")
    resolution = file.integer("sample_size", 32)
    sides = [resolution // 2**level for level in range(len(mults))]
    attn_resolutions = tuple(side for side, has in zip(sides, attends, strict=True) if has)
    if [side in attn_resolutions for side in sides] != attends:
        raise file.error("sample_size", f"at least {2 ** len(mults)}, to tell the levels with attention from the others")
    channels = file.integer("latent_channels", 4)
    return build(
        file.path,
        AutoencoderConfig,
        embed_dim=channels,
        z_channels=channels,
        resolution=resolution,
        in_channels=file.integer("in_channels", 3),
        out_ch=file.integer("out_channels", 3),
        ch=ch,
        ch_mult=mults,
        num_res_blocks=file.uniform("layers_per_block", 1),
        attn_resolutions=attn_resolutions,
        norm_groups=file.integer("norm_num_groups", 32),
    )


def _read_text_encoder(file: ConfigFile) -> TextEncoderConfig:
    names = file.fields.get("architectures") or ["Roberta"]
    if not isinstance(names, list) or "Roberta" not in str(names[0]):
        raise file.error("architectures", "a Roberta class")
    file.check(_TEXT_FIXED)
    # What a file leaves out has the value that transformers' XLMRobertaConfig gives it, not XLM-R large's.
    return build(
        file.path,
        TextEncoderConfig,
        hidden_size=file.integer("hidden_size", 768),
        num_hidden_layers=file.integer("num_hidden_layers", 12),
        num_attention_heads=file.integer("num_attention_heads", 12),
        intermediate_size=file.integer("intermediate_size", 3072),
        vocab_size=file.integer("vocab_size", 30522),
        max_position_embeddings=file.integer("max_position_embeddings", 512),
        layer_norm_eps=file.number("layer_norm_eps", 1e-12),
        project_dim=file.integer("project_dim", 512),
        has_pre_transformation=file.flag("has_pre_transformation"),
        has_pooler=file.flag("has_pooler"),
    )


def _check_class(file: ConfigFile, name: str) -> None:
    if file.fields.get("_class_name", name) != name:
        raise file.error("_class_name", name)


def _widths(file: ConfigFile, default: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(width of the first level, width of every level in units of it)."""
    widths = file.integers("block_out_channels", default)
    if any(width % widths[0] for width in widths):
        raise file.error("block_out_channels", "multiples of the first width")
    return widths[0], tuple(width // widths[0] for width in widths)


def _attention_levels(file: ConfigFile, levels: int, mark: str, down: str, up: str) -> list[bool]:
    """Which levels attend (their block's name begins with ``mark``), from the finest; both halves must agree."""
    halves = []
    for field, name in (("down_block_types", down), ("up_block_types", up)):
        kinds = file.fields.get(field)
        if not isinstance(kinds, list) or len(kinds) != levels or not all(kind in (name, mark + name) for kind in kinds):
            raise file.error(field, f"{levels} times {mark + name} or {name}")
        halves.append([kind != name for kind in kinds])
    if halves[0] != halves[1][::-1]:
        raise file.error("up_block_types", "attention at the levels where down_block_types has it")
    return halves[0]


def _heads(file: ConfigFile, widths: Sequence[int]) -> tuple[int | None, int | None]:
    """(number of heads, None) or (None, channels per head). The field's name misleads: it has always held heads."""
    field = "attention_head_dim" if file.fields.get("num_attention_heads") is None else "num_attention_heads"
    if not isinstance(file.fields.get(field), list):
        return file.integer(field, 8), None
    heads = file.integers(field, ())
    if len(heads) == len(widths):
        head_channels = {width / count for width, count in zip(widths, heads, strict=True)}
        if len(head_channels) == 1 and (channels := head_channels.pop()).is_integer():
            return None, int(channels)
        if len(set(heads)) == 1:
            return heads[0], None
    raise file.error(field, f"one number of heads, or one for each of {len(widths)} levels with equally wide heads")


def _shards(index: Path, suffix: str) -> list[Path]:
    file = load_json(index)
    names = file.fields.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map is missing; it says which shard holds which weight.")
    shards = []
    for name in sorted(map(str, set(names.values()))):
        # Links are normal (the hub's cache is made of them), so the name is judged, not where it leads.
        if name != PureWindowsPath(name).name or name.startswith("..") or not name.endswith(suffix):
            raise CheckpointError(f"{index}: shard {name!r} is not the name of a {suffix} file in {index.parent}; refused.")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.parent / name} is missing, but {index.name} lists it. Was the download complete?")
        shards.append(index.parent / name)
    return shards


def _save(folder: Path, tensors: Mapping[str, Tensor], weights: Literal["safetensors", "bin"]) -> None:
    is_text = folder.name == "text_encoder"
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if weights == "safetensors":
        stem = "model" if is_text else "diffusion_pytorch_model"
        save_file(contiguous, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        grant_usual_mode(folder / f"{stem}.safetensors")
    else:
        stem = "pytorch_model" if is_text else "diffusion_pytorch_model"
        torch.save(contiguous, folder / f"{stem}.bin")


_DIFFUSERS_VERSION = "0.8.0.dev0"  # what the released folders say; diffusers reads nothing from it


def _index(scheduler_class: str, has_tokenizer: bool) -> dict[str, object]:
    return {
        "_class_name": "AltDiffusionPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"],
        "tokenizer": ["transformers", "XLMRobertaTokenizer"] if has_tokenizer else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_fields(config: UNetConfig, sample_size: int) -> dict[str, object]:
    _check_first_width("channel_mult", config.channel_mult)
    widths = [config.model_channels * mult for mult in config.channel_mult]
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "act_fn": "silu",
        "attention_head_dim": config.num_heads or [config.heads(width) for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": config.norm_groups,
        "only_cross_attention": False,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "transformer_layers_per_block": config.transformer_depth,
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "use_linear_projection": config.use_linear_in_transformer,
    }


def _autoencoder_fields(config: AutoencoderConfig, scale_factor: float) -> dict[str, object]:
    _check_first_width("ch_mult", config.ch_mult)
    if config.z_channels != config.embed_dim:
        raise ConfigError(f"z_channels={config.z_channels} and embed_dim={config.embed_dim} differ; diffusers has one number.")
    attends = [config.resolution // 2**level in config.attn_resolutions for level in range(len(config.ch_mult))]
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": [config.ch * mult for mult in config.ch_mult],
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        "in_channels": config.in_channels,
        "latent_channels": config.embed_dim,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "out_channels": config.out_ch,
        "sample_size": config.resolution,
        "scaling_factor": scale_factor,
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
    }


def _text_encoder_fields(config: TextEncoderConfig) -> dict[str, object]:
    return {
        "architectures": ["RobertaSeriesModelWithTransformation"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "has_pooler": config.has_pooler,
        "has_pre_transformation": config.has_pre_transformation,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "learn_encoder": False,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": "xlm-roberta",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": 1,
        "pooler_fn": "cls",
        "position_embedding_type": "absolute",
        "project_dim": config.project_dim,
        "type_vocab_size": 1,
        "use_attention_mask": True,
        "vocab_size": config.vocab_size,
    }


def _scheduler_fields(config: LatentDiffusionConfig) -> dict[str, object]:
    schedules = {ours: theirs for theirs, ours in _BETA_SCHEDULES.items()}
    cosine_s = LatentDiffusionConfig.cosine_s
    if config.beta_schedule not in schedules or (config.beta_schedule == "cosine" and config.cosine_s != cosine_s):
        raise ConfigError(
            f"beta_schedule={config.beta_schedule!r}, cosine_s={config.cosine_s}: diffusers has only "
            f"{', '.join(schedules)}, with cosine_s={cosine_s}."
        )
    return {
        "_class_name": _scheduler_class(config),
        "_diffusers_version": _DIFFUSERS_VERSION,
        "beta_end": config.linear_end,
        "beta_schedule": schedules[config.beta_schedule],
        "beta_start": config.linear_start,
        "clip_sample": False,
        "num_train_timesteps": config.timesteps,
        "prediction_type": {ours: theirs for theirs, ours in _PREDICTION_TYPES.items()}[config.parameterization],
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def _scheduler_class(config: LatentDiffusionConfig) -> str:
    return "DDIMScheduler" if config.parameterization == "x0" else "PNDMScheduler"  # PNDM knows eps and v only


def _check_first_width(field: str, mults: Sequence[int]) -> None:
    if mults[0] != 1:
        raise ConfigError(f"{field}={list(mults)}: diffusers' networks begin at the width of their first level (1).")
