"""config.yaml -> frozen dataclasses. Nothing in a config file is ever imported or run.

The YAML is read as data; ``TARGETS`` maps the exact ``target:`` strings seen in released files to the parser of one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flagai_altdiff.errors import ConfigError, UnknownTargetError

T = TypeVar("T")

PARAMETERIZATIONS = ("eps", "v", "x0")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the UNet; the defaults are AltDiffusion's and AltDiffusion-m9's."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_heads: int | None = 8
    num_head_channels: int | None = None
    use_linear_in_transformer: bool = False
    context_dim: int = 768
    transformer_depth: int = 1
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_limits(self)
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ConfigError(
                f"num_heads={self.num_heads}, num_head_channels={self.num_head_channels}: exactly one of the two must be set."
            )
        for mult in self.channel_mult:
            self.heads(mult * self.model_channels)
        _check_groups("model_channels", [self.model_channels * m for m in (1, *self.channel_mult)], self.norm_groups)

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of ``channels``."""
        heads = self.num_heads if self.num_heads is not None else channels // (self.num_head_channels or 1)
        if heads < 1 or channels % heads:
            raise ConfigError(f"{channels} channels cannot be divided among {heads} attention heads.")
        return heads


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are those of every released model."""

    embed_dim: int = 4
    z_channels: int = 4
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    norm_groups: int = 32

    def __post_init__(self) -> None:
        _check_limits(self)
        _check_groups("ch", [self.ch * m for m in (1, *self.ch_mult)], self.norm_groups)

    @property
    def downsampling(self) -> int:
        """f: pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the text encoder; the defaults are XLM-R large projected to AltDiffusion-m9's context."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    vocab_size: int = 250002
    max_position_embeddings: int = 514
    layer_norm_eps: float = 1e-5
    project_dim: int = 768
    has_pre_transformation: bool = False
    has_pooler: bool = True

    def __post_init__(self) -> None:
        _check_limits(self)
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} cannot be divided among {self.num_attention_heads} heads.")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """A whole model. ``cond_stage`` holds what config.yaml says of the text encoder; released files leave its sizes out.

    ``image_size`` is the side of a latent in training: times ``first_stage.downsampling``, the default size of a picture.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    cond_stage: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    cosine_s: float = 8e-3
    beta_schedule: str = "linear"
    parameterization: str = "eps"
    image_size: int = 64
    scale_factor: float = 0.18215
    use_ema: bool = False
    cond_stage_trainable: bool = False

    def __post_init__(self) -> None:
        if self.parameterization not in PARAMETERIZATIONS:
            raise ConfigError(f"parameterization {self.parameterization!r}: expected one of {', '.join(PARAMETERIZATIONS)}.")
        if not 1 <= self.timesteps <= 100_000:
            raise ConfigError(f"timesteps {self.timesteps}: expected 1 to 100000.")
        if self.unet.context_dim != self.cond_stage.project_dim:
            raise ConfigError(
                f"the UNet's context_dim is {self.unet.context_dim}, but the text encoder gives {self.cond_stage.project_dim}."
            )
        if not self.unet.in_channels == self.unet.out_channels == self.first_stage.embed_dim:
            raise ConfigError(
                f"the UNet takes {self.unet.in_channels} and gives {self.unet.out_channels} channels, "
                f"but the latents have {self.first_stage.embed_dim}."
            )


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
    return _build(UNetConfig, {**params, "num_heads": num_heads, "num_head_channels": head_channels}, _INERT_UNET, where)


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
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
        if len(text) > _MAX_CONFIG_BYTES:
            raise ConfigError(f"it has over {_MAX_CONFIG_BYTES} bytes; a config.yaml has a few thousand. Is it another file?")
        data = _read_yaml(text.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Was the download complete?") from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as YAML data: {error}") from error
    return parse_config(data, str(path))


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
    model = _mapping(_mapping(data, where).get("model"), f"{where}: model")
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
            raise UnknownTargetError(f"{where}: {key} has the unknown target {target!r}. Known targets:\n  {known}")
        parts[name] = parse(_mapping(part.get("params") or {}, f"{where}: {key}.params"), f"{where}: {key}.params")
        if not isinstance(parts[name], kind):
            raise UnknownTargetError(f"{where}: {key} has the target {target!r}, which is not a {kind.__name__[:-6]}.")
    if "timesteps" not in params:
        raise ConfigError(f"{where}: model.params.timesteps is missing; every released config says 1000.")
    # The released configs say nothing of the text encoder's projection: it is as wide as the UNet's context.
    if "project_dim" not in (_mapping(data, where)["model"]["params"]["cond_stage_config"].get("params") or {}):
        parts["cond_stage"] = replace(parts["cond_stage"], project_dim=parts["unet"].context_dim)
    return _build(LatentDiffusionConfig, {**params, **parts}, _INERT_MODEL, f"{where}: model.params")


def dump_config(config: LatentDiffusionConfig) -> str:
    """The config.yaml that :func:`load_config` reads back to an equal config.

    Args:
        config: The config.

    Returns:
        YAML text with LDM's target strings.
    """
    params = {k: _plain(v) for k, v in asdict(config).items() if k not in ("unet", "first_stage", "cond_stage")}
    first_stage = {k: _plain(v) for k, v in asdict(config.first_stage).items()}
    embed_dim = first_stage.pop("embed_dim")
    text = "xlmr_m18" if config.cond_stage.has_pre_transformation else "xlmr"
    parts = {
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {k: _plain(v) for k, v in asdict(config.unet).items() if v is not None},
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": embed_dim,
                "ddconfig": {"double_z": True, **first_stage},
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {
            "target": f"modules.{text}.BertSeriesModelWithTransformation",
            "params": asdict(config.cond_stage),
        },
    }
    tree = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**params, **parts}}}
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


_MAX_CONFIG_BYTES = 64 << 10
_MAX_NESTING = 50


def _read_yaml(text: str) -> object:
    """YAML as plain data: no tags, no interpolation, no aliases (a few lines of them can stand for gigabytes)."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError("YAML aliases are not accepted in a config.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_NESTING:
            raise ConfigError(f"nested deeper than {_MAX_NESTING} levels.")
    return OmegaConf.to_container(OmegaConf.create(text), resolve=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{where}: expected a mapping, got {type(value).__name__}.")
    return value


def _reject_unknown(params: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    unknown = sorted(set(params) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown parameter {', '.join(unknown)}. Known: {', '.join(sorted(known))}.")


def _build(kind: type[T], params: Mapping[str, Any], inert: frozenset[str], where: str) -> T:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    _reject_unknown(params, frozenset(known) | inert, where)
    values = {name: _checked(params[name], f.type, f"{where}.{name}") for name, f in known.items() if name in params}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _checked(value: Any, annotation: Any, where: str) -> Any:
    """``value`` as the dataclass annotation says, or an error: counts are small positive integers, numbers are finite."""
    kind = str(annotation)
    if kind.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not all(_is_int(v) and 0 < v <= _MAX_SIZE for v in value):
            raise ConfigError(f"{where}={value!r}: expected a list of positive integers.")
        return tuple(value)
    if kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{where}={value!r}: expected true or false.")
    elif kind.startswith("int"):
        if value is None and "None" in kind:
            return None
        if not _is_int(value) or not 0 < value <= _MAX_SIZE:
            raise ConfigError(f"{where}={value!r}: expected a positive integer of at most {_MAX_SIZE}.")
    elif kind == "float":
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{where}={value!r}: expected a positive number.")
        return float(value)
    elif kind == "str" and not isinstance(value, str):
        raise ConfigError(f"{where}={value!r}: expected text.")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_MAX_SIZE = 1_000_000
_MAX_WIDTH = 1 << 16
_MAX_DEPTH = 100
_MAX_LEVELS = 16
_WIDTHS = ("model_channels", "ch", "hidden_size", "num_heads", "num_attention_heads")
_DEPTHS = ("num_res_blocks", "transformer_depth", "num_hidden_layers")


def _check_limits(config: UNetConfig | AutoencoderConfig | TextEncoderConfig) -> None:
    """Sizes that a computer could not hold are refused before anything is built, wherever they come from."""
    for name, value in asdict(config).items():
        if isinstance(value, tuple):
            limit, values = _MAX_SIZE, value
            if len(value) > _MAX_LEVELS:
                raise ConfigError(f"{name} has {len(value)} entries; expected at most {_MAX_LEVELS}.")
        else:
            limit = _MAX_DEPTH if name in _DEPTHS else _MAX_WIDTH if name in _WIDTHS else _MAX_SIZE
            values = (value,) if _is_int(value) else ()
        if not all(0 < v <= limit for v in values):
            raise ConfigError(f"{name}={value!r}: expected 1 to {limit}.")


def _check_groups(name: str, widths: list[int], groups: int) -> None:
    if max(widths) > _MAX_WIDTH:
        raise ConfigError(f"{name} gives {max(widths)} channels; expected at most {_MAX_WIDTH}.")
    bad = next((w for w in widths if w % groups), None)
    if bad is not None:
        raise ConfigError(f"{name} gives {bad} channels, which {groups} norm groups do not divide; set norm_groups.")
