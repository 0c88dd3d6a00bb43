"""LDM's and FlagAI's ``config.yaml``, read and written. Nothing in such a file is ever imported or run.

The YAML is read as data; ``TARGETS`` maps the exact ``target:`` strings seen in released files to parsers of parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import ConfigError, UnknownTargetError, printable, shown
from flagai_altdiff.plain_data import read_config

T = TypeVar("T")

_MAX_CONFIG_BYTES = 64 << 10
_MAX_NAMED = 8

# Parameters that appear in released files and change nothing here.
_INERT_MODEL = frozenset(
    "num_timesteps_cond log_every_t first_stage_key cond_stage_key channels conditioning_key monitor "
    "scheduler_config ckpt_path ignore_keys unfreeze_model model_lr original_elbo_weight l_simple_weight v_posterior "
    "learn_logvar logvar_init given_betas clip_denoised load_only_unet name base_learning_rate concat_mode "
    "scale_by_std cond_stage_forward use_positional_encodings device fp16 is_legacy download_path".split()
)
_INERT_UNET = frozenset(
    "image_size use_spatial_transformer use_checkpoint use_fp16 fp16 legacy dropout conv_resample dims num_classes "
    "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order n_embed use_hypernetwork".split()
)
_INERT_AUTOENCODER = frozenset("monitor lossconfig ckpt_path ignore_keys image_key colorize_nlabels".split())
_INERT_DDCONFIG = frozenset("double_z dropout resamp_with_conv attn_type tanh_out give_pre_end use_linear_attn".split())
_INERT_TEXT_ENCODER = frozenset("name ckpt_path download_path use_fp16 freeze layer device max_length config".split())


def _unet(params: Mapping[str, Any], where: str) -> UNetConfig:
    params = dict(params)
    if params.get("use_spatial_transformer") is False:
        raise ConfigError(f"{where}: use_spatial_transformer is false, but AltDiffusion's UNet always has one.")
    heads = (params.pop("num_heads", None), params.pop("num_head_channels", None))
    # LDM writes -1 for "not set"; when both are given, the channels per head win.
    num_heads, head_channels = (None if h in (-1, None) else h for h in heads)
    if head_channels is not None:
        num_heads = None
    elif num_heads is None:
        num_heads = 8
    return _build(
        UNetConfig, {**params, "num_heads": num_heads, "num_head_channels": head_channels}, _INERT_UNET, where
    )


def _autoencoder(params: Mapping[str, Any], where: str) -> AutoencoderConfig:
    params = dict(params)
    ddconfig = _mapping(params.pop("ddconfig", {}), f"{where}.ddconfig")
    if ddconfig.get("double_z") is False:
        raise ConfigError(f"{where}.ddconfig: double_z is false, but a KL autoencoder needs means and variances.")
    own = {k: v for k, v in params.items() if k == "embed_dim"}
    rest = {k: v for k, v in params.items() if k != "embed_dim"}
    _reject_unknown(rest, _INERT_AUTOENCODER, where)
    return _build(AutoencoderConfig, {**ddconfig, **own}, _INERT_DDCONFIG, f"{where}.ddconfig")


def _text_encoder(pre_transformation: bool | None) -> Callable[[Mapping[str, Any], str], TextEncoderConfig]:
    def parse(params: Mapping[str, Any], where: str) -> TextEncoderConfig:
        config = _build(TextEncoderConfig, params, _INERT_TEXT_ENCODER, where)
        if pre_transformation is not None and "has_pre_transformation" not in params:
            config = replace(config, has_pre_transformation=pre_transformation, has_pooler=not pre_transformation)
        return config

    return parse


TARGETS: dict[str, Callable[[Mapping[str, Any], str], UNetConfig | AutoencoderConfig | TextEncoderConfig]] = {
    "flagai.model.mm.Unets.Unet.UNetModel": _unet,
    "flagai.model.mm.modules.diffusionmodules.openaimodel.UNetModel": _unet,
    "ldm.modules.diffusionmodules.openaimodel.UNetModel": _unet,
    "flagai.model.mm.autoencoders.AutoencoderKL": _autoencoder,
    "flagai.model.mm.autoencoder_m18.AutoencoderKL": _autoencoder,
    "ldm.models.autoencoder.AutoencoderKL": _autoencoder,
    "flagai.model.mm.modeling_berts.RobertaSeriesModelWithTransformation": _text_encoder(False),
    "flagai.model.mm.modeling_berts_m18.RobertaSeriesModelWithTransformation": _text_encoder(True),
    "flagai.model.mm.modeling_berts.BertSeriesModelWithTransformation": _text_encoder(False),
    "flagai.model.mm.modeling_berts_m18.BertSeriesModelWithTransformation": _text_encoder(True),
    "modules.xlmr.BertSeriesModelWithTransformation": _text_encoder(False),
    "modules.xlmr_m18.BertSeriesModelWithTransformation": _text_encoder(True),
    "lm.dcn_clip.DCNCLIP30M1024": _text_encoder(True),
}
"""Every ``target:`` of a part that is understood, and how its ``params`` are read."""


def load_config(path: Path) -> LatentDiffusionConfig:
    """Read a ``config.yaml`` of the FlagAI or LDM form.

    Args:
        path: The file.

    Returns:
        The config; sizes of the text encoder that the file leaves out are XLM-R large's.

    Raises:
        ConfigError: The file is not such a config; UnknownTargetError for a foreign ``target:``.
    """
    from flagai_altdiff.checkpoint.plain_yaml import parse_yaml

    return parse_config(read_config(path, _MAX_CONFIG_BYTES, parse_yaml, "YAML"), str(path))


def parse_config(data: object, where: str = "config") -> LatentDiffusionConfig:
    """Turn the data of a config.yaml into a config.

    Args:
        data: Plain mappings, lists and scalars.
        where: What to call it in errors.

    Returns:
        The config.

    Raises:
        ConfigError: See :func:`load_config`.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}: expected a mapping with the key model, got {type(data).__name__}.")
    model = _mapping(data.get("model"), f"{where}: model")
    params = dict(_mapping(model.get("params"), f"{where}: model.params"))
    parts: dict[str, Any] = {}
    for key, name, kind in (
        ("unet_config", "unet", UNetConfig),
        ("first_stage_config", "first_stage", AutoencoderConfig),
        ("cond_stage_config", "cond_stage", TextEncoderConfig),
    ):
        part = _mapping(params.pop(key, None), f"{where}: model.params.{key}")
        target = part.get("target")
        parse = TARGETS.get(target) if isinstance(target, str) else None
        if parse is None:
            known = "\n  ".join(TARGETS)
            raise UnknownTargetError(
                f"{where}: {key} has the unknown target {shown(target)}. Known targets:\n  {known}"
            )
        parts[name] = parse(_mapping(part.get("params") or {}, f"{where}: {key}.params"), f"{where}: {key}.params")
        if not isinstance(parts[name], kind):
            raise UnknownTargetError(
                f"{where}: {key} has the target {shown(target)}, which is not a {kind.__name__[:-6]}."
            )
    if "timesteps" not in params:
        raise ConfigError(f"{where}: model.params.timesteps is missing; every released config says 1000.")
    # The released configs say nothing of the text encoder's projection: it is as wide as the UNet's context.
    if "project_dim" not in (data["model"]["params"]["cond_stage_config"].get("params") or {}):
        parts["cond_stage"] = replace(parts["cond_stage"], project_dim=parts["unet"].context_dim)
    return _build(LatentDiffusionConfig, {**params, **parts}, _INERT_MODEL, f"{where}: model.params")


def dump_config(config: LatentDiffusionConfig) -> str:
    """The config.yaml that :func:`load_config` reads back to an equal config.

    Args:
        config: The config.

    Returns:
        YAML text with LDM's target strings.
    """
    import yaml

    params = _plain(config)
    unet, first_stage, cond_stage = (params.pop(name) for name in ("unet", "first_stage", "cond_stage"))
    text = "xlmr_m18" if config.cond_stage.has_pre_transformation else "xlmr"
    parts = {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {k: v for k, v in unet.items() if v is not None},
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": first_stage.pop("embed_dim"),
                "ddconfig": {"double_z": True, **first_stage},
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {"target": f"modules.{text}.BertSeriesModelWithTransformation", "params": cond_stage},
    }
    tree = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**params, **parts}}}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def _plain(config: LatentDiffusionConfig) -> dict[str, Any]:
    """A config as nothing but what YAML knows."""
    return json.loads(json.dumps(asdict(config)))


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where}: expected a mapping, got {type(value).__name__}.")
    return value


def _reject_unknown(params: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        names = ", ".join(printable(name, 80) for name in unknown[:_MAX_NAMED])
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        raise ConfigError(f"{where}: unknown parameter {names}{more}. Known: {', '.join(sorted(known))}.")


def _build(kind: type[T], params: Mapping[str, Any], inert: frozenset[str], where: str) -> T:
    known = frozenset(field.name for field in fields(kind))  # type: ignore[arg-type]
    _reject_unknown(params, known | inert, where)
    try:
        return kind(**{name: value for name, value in params.items() if name in known})
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
