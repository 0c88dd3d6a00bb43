"""Folders in diffusers' layout: their configs, their weight files, and how to write one.

The class names in ``model_index.json`` are compared, never imported: the released folders name a library
(``alt_diffusion``) that no version of diffusers resolves any more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from torch import Tensor

from flagai_altdiff.checkpoint.diffusers_keys import PREFIXES
from flagai_altdiff.checkpoint.json_config import ConfigFile, build, load_json
from flagai_altdiff.checkpoint.reading import bare, read_tensors
from flagai_altdiff.checkpoint.saving import Check, copy_files, unfinished_model, write_safetensors
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import CheckpointError, ConfigError, printable, shown
from flagai_altdiff.model_files import DIFFUSERS_INDEX

PIPELINES = ("AltDiffusionPipeline", "AltDiffusionImg2ImgPipeline", "StableDiffusionPipeline")
"""Pipeline classes whose folders may hold an AltDiffusion model."""
_README = """# AltDiffusion for diffusers

    import flagai_altdiff  # has the text encoder, which diffusers has not
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained("this folder")
    pipeline("a cat").images[0].save("cat.png")

flagai_altdiff itself opens the folder as well: `altdiff generate "a cat" -m "this folder"`.
"""
_TOKENIZER = {"model_max_length": 77, "tokenizer_class": "XLMRobertaTokenizer"}
_MAX_NAME_BYTES = 255
"""Of a file, on every common file system."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether ``folder`` has diffusers' layout; :func:`read_config` tells whether it is a model of ours."""
    return (folder / DIFFUSERS_INDEX).is_file()


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
    _check_index(load_json(folder / DIFFUSERS_INDEX))
    unet = load_json(folder / "unet" / "config.json")
    vae = load_json(folder / "vae" / "config.json")
    scheduler = load_json(folder / "scheduler" / "scheduler_config.json")
    return build(
        folder,
        LatentDiffusionConfig,
        unet=_read_unet(unet),
        first_stage=_read_autoencoder(vae),
        cond_stage=_read_text_encoder(load_json(folder / "text_encoder" / "config.json")),
        **_SCHEDULER.read(scheduler),
        image_size=unet.integer("sample_size", 64),
        scale_factor=vae.number("scaling_factor", 0.18215),
    )


def weight_files(folder: Path, part: str) -> list[Path]:
    """Files that hold the weights of one part.

    Full precision goes before half, safetensors before pickles.

    Args:
        folder: The diffusers folder.
        part: ``unet``, ``vae``, ``text_encoder`` or another of its folders.

    Raises:
        CheckpointError: There are none, two answers to which they are, or an index names a shard that is missing or
            outside the part's folder.
    """
    return list(_choose_weights(folder / part))


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights of one part, by diffusers' names.

    Args:
        folder: The diffusers folder.
        part: As in :func:`weight_files`.

    Raises:
        CheckpointError: As in :func:`weight_files`; or a file cannot be read, two shards have a weight of one name, or
            one lacks a weight that the index places there.
    """
    state: dict[str, Tensor] = {}
    places: dict[str, Path] = {}
    for file, promised in _choose_weights(folder / part).items():
        tensors = read_tensors(file)
        if lacking := {key for key in promised - tensors.keys() if bare(key) not in tensors}:
            key = printable(min(lacking), 120)
            raise CheckpointError(f"{file} has no {key}, which its index places there. Fetch the folder again.")
        if twice := places.keys() & tensors.keys():
            key = min(twice)
            raise CheckpointError(
                f"{file} and {places[key].name} both have {printable(key, 120)}, and nothing tells which is meant. "
                "Fetch the folder again."
            )
        places |= dict.fromkeys(tensors, file)
        state |= tensors
    return state


def _choose_weights(folder: Path) -> dict[Path, Set[str]]:
    """Files of weights -> the names of weights that an index places there; none for a whole file."""
    for variant in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                whole = folder / f"{stem}{variant}{suffix}"
                indexes = sorted({f"{whole.name}.index.json", f"{stem}{suffix}.index{variant}.json"})
                found = [path for path in (whole, *(folder / name for name in indexes)) if _is_filled(path)]
                if len(found) > 1:
                    names = " and ".join(path.name for path in found)
                    raise CheckpointError(
                        f"{folder} has {names}, and nothing tells which are the weights. Remove the wrong one."
                    )
                if found:
                    return {whole: frozenset()} if found == [whole] else _shards(found[0], suffix)
    raise CheckpointError(
        f"{folder} has no weights; expected diffusion_pytorch_model.safetensors, model.safetensors, "
        "pytorch_model.bin or their .fp16 or sharded forms. Was the download complete?"
    )


def _is_filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def write_folder(
    target: Path,
    config: LatentDiffusionConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    tokenizer: Sequence[Path],
    *,
    check: Check | None = None,
) -> None:
    """Write a model as a diffusers folder like the released ones; it appears whole or not at all.

    Args:
        target: The folder to create; must not exist.
        config: The model's config.
        parts: ``unet``, ``vae`` and ``text_encoder`` -> name -> weight, as ``to_diffusers`` gives them, and no others.
        tokenizer: Files of the XLM-R tokenizer, to be copied.
        check: Is given the finished folder.

    Raises:
        CheckpointError: ``target`` exists, the disk refuses, or ``parts`` is not exactly these three.
        ConfigError: diffusers' classes cannot express the config.
    """
    if set(parts) != set(PREFIXES):
        names = [f"{part}: {key}" for part in sorted(set(parts) - set(PREFIXES)) for key in list(parts[part])[:3]]
        raise CheckpointError(
            f"expected the parts {', '.join(PREFIXES)}, got {', '.join(parts)} {shown(names) if names else ''}".strip()
            + "."
        )
    index = _index(_scheduler_class(config), has_tokenizer=bool(tokenizer))
    configs = {DIFFUSERS_INDEX: index, **part_configs(config)}
    every = {f"{part}.{key}": tensor for part, tensors in parts.items() for key, tensor in tensors.items()}
    with unfinished_model(target, every) as made:
        for name, fields in configs.items():
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for part, tensors in parts.items():
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            write_safetensors(made / part / f"{stem}.safetensors", tensors)
        (made / "README.md").write_text(_README, encoding="utf-8")
        if tokenizer:
            (made / "tokenizer").mkdir()
            copy_files(tokenizer, made / "tokenizer")
            settings = made / "tokenizer" / "tokenizer_config.json"
            if not settings.exists():
                settings.write_text(json.dumps(_TOKENIZER, indent=2) + "\n", encoding="utf-8")
        if check:
            check(made)


def part_configs(config: LatentDiffusionConfig) -> dict[str, Mapping[str, object]]:
    """What diffusers' classes are told of a model's parts, by the files that say it.

    Raises:
        ConfigError: They cannot express the config.
    """
    return {
        "unet/config.json": _unet_fields(config.unet, config.image_size),
        "vae/config.json": _autoencoder_fields(config.first_stage, config.scale_factor),
        "text_encoder/config.json": text_fields(config.cond_stage),
        "scheduler/scheduler_config.json": _scheduler_fields(config),
    }


def text_fields(config: TextEncoderConfig) -> Mapping[str, object]:
    """What the text encoder's config says."""
    return _TEXT.write(config)


def _check_index(index: ConfigFile) -> None:
    if index.fields.get("_class_name") not in PIPELINES:
        raise index.error("_class_name", " or ".join(PIPELINES))
    for part, name in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL"), ("text_encoder", "Roberta")):
        entry = index.fields.get(part)
        kind = entry[-1] if isinstance(entry, list) and entry else None
        if not isinstance(kind, str) or name not in kind:
            if isinstance(kind, str) and kind.startswith("CLIP"):
                raise ConfigError(
                    f"{index.path}: its text_encoder is {kind}: this is Stable Diffusion, not AltDiffusion."
                )
            raise index.error(part, f"a class named {name}" if part != "text_encoder" else "a Roberta class")


@dataclass(frozen=True)
class _Part:
    """What one of diffusers' configs holds, for reading and for writing.

    Args:
        class_name: Of diffusers; empty where there are several, and where fields that are not known here do no harm.
        same: Their field -> ours, and what a file that leaves it out means; of a choice, their values -> ours, with
            that one first.
        fixed: Fields whose one value is built into AltDiffusion's modules.
        others: Fields that take more than one of ours, and fields that change nothing here.
        marks: Fields that are written, but not asked for.
    """

    class_name: str
    same: Mapping[str, tuple[str, bool | int | float | Mapping[str, str]]]
    fixed: Mapping[str, object]
    others: str = ""
    marks: Mapping[str, object] = field(default_factory=dict)

    def read(self, file: ConfigFile) -> dict[str, Any]:
        """Fields of ours."""
        if self.class_name and file.fields.get("_class_name", self.class_name) != self.class_name:
            raise file.error("_class_name", self.class_name)
        file.check(self.fixed, [*self.same, *self.others.split()] if self.class_name else None)
        return {ours: _read_field(file, theirs, default) for theirs, (ours, default) in self.same.items()}

    def write(self, config: object, **others: object) -> dict[str, object]:
        """The content of the file."""
        head = {"_class_name": self.class_name, "_diffusers_version": _DIFFUSERS_VERSION} if self.class_name else {}
        same = {theirs: _written(config, ours, default) for theirs, (ours, default) in self.same.items()}
        return {**head, **self.fixed, **self.marks, **same, **others}


def _read_field(file: ConfigFile, name: str, default: bool | int | float | Mapping[str, str]) -> Any:
    if isinstance(default, Mapping):
        return file.choice(name, default, next(iter(default)))
    if isinstance(default, bool):
        return file.flag(name, default)
    return file.uniform(name, default) if isinstance(default, int) else file.number(name, default)


def _written(config: object, name: str, default: object) -> object:
    value = getattr(config, name)
    if not isinstance(default, Mapping):
        return value
    theirs = {ours: their for their, ours in default.items()}
    if value not in theirs:
        raise ConfigError(f"{name}={value!r}: diffusers has only {', '.join(theirs)}.")
    return theirs[value]


_DIFFUSERS_VERSION = "0.8.0.dev0"  # what the released folders say; diffusers reads nothing from it
_UNET = _Part(
    "UNet2DConditionModel",
    {
        "in_channels": ("in_channels", 4),
        "out_channels": ("out_channels", 4),
        "layers_per_block": ("num_res_blocks", 2),
        "use_linear_projection": ("use_linear_in_transformer", False),
        "cross_attention_dim": ("context_dim", 1280),
        "transformer_layers_per_block": ("transformer_depth", 1),
        "norm_num_groups": ("norm_groups", 32),
    },
    fixed={
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "downsample_padding": 1,
        "dual_cross_attention": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "only_cross_attention": False,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
    },
    others="attention_head_dim block_out_channels down_block_types num_attention_heads up_block_types sample_size "
    "addition_embed_type_num_heads dropout upcast_attention",
)
_AUTOENCODER = _Part(
    "AutoencoderKL",
    {
        "in_channels": ("in_channels", 3),
        "out_channels": ("out_ch", 3),
        "latent_channels": ("embed_dim", 4),
        "layers_per_block": ("num_res_blocks", 1),
        "norm_num_groups": ("norm_groups", 32),
        "sample_size": ("resolution", 32),
    },
    fixed={"act_fn": "silu", "mid_block_add_attention": True, "use_post_quant_conv": True, "use_quant_conv": True},
    others="block_out_channels down_block_types scaling_factor up_block_types force_upcast",
)
_TEXT = _Part(
    "",
    # What a file leaves out has the value that transformers' XLMRobertaConfig gives it, not XLM-R large's.
    {
        "hidden_size": ("hidden_size", 768),
        "num_hidden_layers": ("num_hidden_layers", 12),
        "num_attention_heads": ("num_attention_heads", 12),
        "intermediate_size": ("intermediate_size", 3072),
        "vocab_size": ("vocab_size", 30522),
        "max_position_embeddings": ("max_position_embeddings", 512),
        "layer_norm_eps": ("layer_norm_eps", 1e-12),
        "project_dim": ("project_dim", 512),
        "has_pre_transformation": ("has_pre_transformation", False),
        "has_pooler": ("has_pooler", False),
    },
    fixed={
        "hidden_act": "gelu",
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "use_attention_mask": True,
    },
    marks={
        "architectures": ["RobertaSeriesModelWithTransformation"],
        "attention_probs_dropout_prob": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "learn_encoder": False,
        "model_type": "xlm-roberta",
        "pooler_fn": "cls",
    },
)
_SCHEDULER = _Part(
    "",
    {
        "num_train_timesteps": ("timesteps", 1000),
        "beta_start": ("linear_start", 0.0001),
        "beta_end": ("linear_end", 0.02),
        "beta_schedule": (
            "beta_schedule",
            {"linear": "sqrt_linear", "scaled_linear": "linear", "squaredcos_cap_v2": "cosine"},
        ),
        "prediction_type": ("parameterization", {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}),
    },
    fixed={"trained_betas": None, "rescale_betas_zero_snr": False},
    marks={"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
)


def _read_unet(file: ConfigFile) -> UNetConfig:
    fields = _UNET.read(file)
    width, mults = _widths(file, (320, 640, 1280, 1280))
    attends = _attention_levels(file, len(mults), "CrossAttn", "DownBlock2D", "UpBlock2D")
    num_heads, num_head_channels = _heads(file, [width * mult for mult in mults])
    return build(
        file.path,
        UNetConfig,
        **fields,
        model_channels=width,
        channel_mult=mults,
        attention_resolutions=tuple(2**level for level in reversed(range(len(mults))) if attends[level]),
        num_heads=num_heads,
        num_head_channels=num_head_channels,
    )


def _read_autoencoder(file: ConfigFile) -> AutoencoderConfig:
    fields = _AUTOENCODER.read(file)
    ch, mults = _widths(file, (64,))
    attends = _attention_levels(file, len(mults), "Attn", "DownEncoderBlock2D", "UpDecoderBlock2D")
    sides = [fields["resolution"] // 2**level for level in range(len(mults))]
    attn_resolutions = tuple(side for side, has in zip(sides, attends, strict=True) if has)
    if [side in attn_resolutions for side in sides] != attends:
        raise file.error(
            "sample_size", f"at least {2 ** len(mults)}, to tell the levels with attention from the others"
        )
    return build(
        file.path,
        AutoencoderConfig,
        **fields,
        z_channels=fields["embed_dim"],
        ch=ch,
        ch_mult=mults,
        attn_resolutions=attn_resolutions,
    )


def _read_text_encoder(file: ConfigFile) -> TextEncoderConfig:
    names = file.fields.get("architectures") or ["Roberta"]
    if not isinstance(names, list) or not isinstance(names[0], str) or "Roberta" not in names[0]:
        raise file.error("architectures", "a Roberta class")
    return build(file.path, TextEncoderConfig, **_TEXT.read(file))


def _widths(file: ConfigFile, default: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """(width of the first level, width of every level in units of it)."""
    widths = file.integers("block_out_channels", default)
    if any(width % widths[0] for width in widths):
        raise file.error("block_out_channels", "multiples of the first width")
    return widths[0], tuple(width // widths[0] for width in widths)


def _attention_levels(file: ConfigFile, levels: int, mark: str, down: str, up: str) -> list[bool]:
    """Which levels attend (their block's name begins with ``mark``), from the finest; both halves must agree."""
    halves = []
    for key, name in (("down_block_types", down), ("up_block_types", up)):
        kinds, known = file.fields.get(key), (name, mark + name)
        if not isinstance(kinds, list) or len(kinds) != levels or not all(kind in known for kind in kinds):
            raise file.error(key, f"{levels} times {mark + name} or {name}")
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


def _shards(index: Path, suffix: str) -> dict[Path, Set[str]]:
    """Shards -> the names of the weights that the index places there."""
    names = load_json(index).fields.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: weight_map is missing; it says which shard holds which weight.")
    shards: dict[str, set[str]] = {}
    for key, name in names.items():
        if not isinstance(name, str) or not _is_file_name(name, suffix):
            raise CheckpointError(
                f"{index}: shard {shown(name)} is not the name of a {suffix} file in {index.parent}; refused."
            )
        shards.setdefault(name, set()).add(key)
    for name in shards:
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index.parent / name} is missing, but {index.name} lists it. Was the download complete?"
            )
    return {index.parent / name: shards[name] for name in sorted(shards)}


def _is_file_name(name: str, suffix: str) -> bool:
    """Whether a name is one of a file in a folder. Where that leads is not judged: the hub's cache is made of links."""
    return (
        name == PureWindowsPath(name).name
        and not name.startswith(".")
        and name.endswith(suffix)
        and name.isprintable()
        and len(name.encode()) <= _MAX_NAME_BYTES
    )


def _index(scheduler_class: str, has_tokenizer: bool) -> dict[str, object]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": _DIFFUSERS_VERSION,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["flagai_altdiff", "MultilingualRobertaEncoder"],
        "tokenizer": ["transformers", "XLMRobertaTokenizer"] if has_tokenizer else [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _unet_fields(config: UNetConfig, sample_size: int) -> dict[str, object]:
    widths = _widths_written("channel_mult", config.model_channels, config.channel_mult)
    attends = [2**level in config.attention_resolutions for level in range(len(widths))]
    return _UNET.write(
        config,
        attention_head_dim=config.num_heads or [config.heads(width) for width in widths],
        block_out_channels=widths,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        sample_size=sample_size,
    )


def _autoencoder_fields(config: AutoencoderConfig, scale_factor: float) -> dict[str, object]:
    if config.z_channels != config.embed_dim:
        raise ConfigError(
            f"z_channels={config.z_channels} and embed_dim={config.embed_dim} differ; diffusers has one number."
        )
    attends = [config.resolution // 2**level in config.attn_resolutions for level in range(len(config.ch_mult))]
    return _AUTOENCODER.write(
        config,
        block_out_channels=_widths_written("ch_mult", config.ch, config.ch_mult),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        scaling_factor=scale_factor,
    )


def _scheduler_fields(config: LatentDiffusionConfig) -> dict[str, object]:
    if config.beta_schedule == "cosine" and config.cosine_s != LatentDiffusionConfig.cosine_s:
        raise ConfigError(
            f"cosine_s={config.cosine_s}: diffusers' cosine schedule has {LatentDiffusionConfig.cosine_s} only."
        )
    head = {"_class_name": _scheduler_class(config), "_diffusers_version": _DIFFUSERS_VERSION}
    return {**head, **_SCHEDULER.write(config)}


def _scheduler_class(config: LatentDiffusionConfig) -> str:
    return "DDIMScheduler" if config.parameterization == "x0" else "PNDMScheduler"  # PNDM knows eps and v only


def _widths_written(field: str, width: int, mults: Sequence[int]) -> list[int]:
    if mults[0] != 1:
        raise ConfigError(f"{field}={list(mults)}: diffusers' networks begin at the width of their first level (1).")
    return [width * mult for mult in mults]
