"""The sizes of a model's parts, as frozen dataclasses that refuse what no computer could build."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from flagai_altdiff.errors import ConfigError, printable, shown

T = TypeVar("T")

_MAX_WIDTH = 1 << 16
_MAX_BLOCKS = 160
"""Layers of one network: four times what the largest released one has. They are built before a file is compared."""
Size = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
Width = Annotated[int, Field(strict=True, ge=1, le=_MAX_WIDTH)]
Depth = Annotated[int, Field(strict=True, ge=1, le=100)]
Levels = Annotated[tuple[Size, ...], Field(min_length=1, max_length=8)]
Sizes = Annotated[tuple[Size, ...], Field(max_length=16)]


_INPAINTING = 9
_FOR_INPAINTING = (
    " A UNet with 9 input channels was made for inpainting alone, and is not supported; any other model draws into "
    "pictures as well: --init-image FILE --mask FILE."
)


def _descending(values: tuple[int, ...]) -> tuple[int, ...]:
    """In one order, as files have them in any."""
    return tuple(sorted(values, reverse=True))


Beta = Annotated[float, Field(strict=True, gt=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
_STRICT = ConfigDict(extra="forbid")


def _with_our_errors(cls: type[T]) -> type[T]:
    """Class decorator: what the dataclass refuses is a ConfigError that names field and value."""
    validate = cls.__init__

    @functools.wraps(validate)
    def __init__(self: T, **values: Any) -> None:
        try:
            validate(self, **values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            reason = problem.get("ctx", {}).get("error")
            if isinstance(reason, ConfigError):
                raise reason from None
            field = printable(".".join(map(str, problem["loc"])), 80)
            raise ConfigError(f"{field}={shown(problem['input'])}: {_in_our_words(problem['msg'])}.") from None

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class UNetConfig:
    """Sizes of the UNet; the defaults are AltDiffusion's and AltDiffusion-m9's."""

    in_channels: Size = 4
    out_channels: Size = 4
    model_channels: Width = 320
    attention_resolutions: Annotated[Sizes, AfterValidator(_descending)] = (4, 2, 1)
    num_res_blocks: Depth = 2
    channel_mult: Levels = (1, 2, 4, 4)
    num_heads: Width | None = 8
    num_head_channels: Size | None = None
    use_linear_in_transformer: Flag = False
    context_dim: Size = 768
    transformer_depth: Depth = 1
    norm_groups: Size = 32

    def __post_init__(self) -> None:
        if (self.num_heads is None) == (self.num_head_channels is None):
            raise ConfigError(
                f"num_heads={self.num_heads}, num_head_channels={self.num_head_channels}: expected exactly one of them."
            )
        _check_blocks(len(self.channel_mult), self.num_res_blocks, 1 + self.transformer_depth)
        for mult in self.channel_mult:
            self.heads(mult * self.model_channels)
        _check_groups("model_channels", self.model_channels, self.channel_mult, self.norm_groups)

    def heads(self, channels: int) -> int:
        """Number of attention heads at a width of ``channels``."""
        heads = self.num_heads if self.num_heads is not None else channels // (self.num_head_channels or 1)
        if heads < 1 or channels % heads:
            raise ConfigError(f"{channels} channels cannot be divided among {heads} attention heads.")
        return heads


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AutoencoderConfig:
    """Sizes of the autoencoder; the defaults are those of every released model."""

    embed_dim: Size = 4
    z_channels: Size = 4
    resolution: Size = 256
    in_channels: Size = 3
    out_ch: Size = 3
    ch: Width = 128
    ch_mult: Levels = (1, 2, 4, 4)
    num_res_blocks: Depth = 2
    attn_resolutions: Sizes = ()
    norm_groups: Size = 32

    def __post_init__(self) -> None:
        _check_blocks(len(self.ch_mult), self.num_res_blocks, 1)
        _check_groups("ch", self.ch, self.ch_mult, self.norm_groups)

    @property
    def downsampling(self) -> int:
        """f: pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TextEncoderConfig:
    """Sizes of the text encoder; the defaults are XLM-R large projected to AltDiffusion-m9's context."""

    hidden_size: Width = 1024
    num_hidden_layers: Annotated[int, Field(strict=True, ge=1, le=48)] = 24
    num_attention_heads: Width = 16
    intermediate_size: Size = 4096
    vocab_size: Size = 250002
    max_position_embeddings: Size = 514
    layer_norm_eps: Positive = 1e-5
    project_dim: Size = 768
    has_pre_transformation: Flag = False
    has_pooler: Flag = True

    def __post_init__(self) -> None:
        _check_heads(self.hidden_size, self.num_attention_heads)


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class VisionConfig:
    """Sizes of CLIP's image tower; the defaults are ViT-L/14's."""

    hidden_size: Width = 1024
    num_hidden_layers: Depth = 24
    num_attention_heads: Width = 16
    intermediate_size: Size = 4096
    image_size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 224
    patch_size: Annotated[int, Field(strict=True, ge=1, le=4096)] = 14
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Positive = 1e-5

    def __post_init__(self) -> None:
        _check_heads(self.hidden_size, self.num_attention_heads)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class AltCLIPConfig:
    """A matching model: both towers, and the width of the space in which they meet."""

    text: TextEncoderConfig = Field(default_factory=TextEncoderConfig)
    vision: VisionConfig = Field(default_factory=VisionConfig)
    projection_dim: Size = 768


@_with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LatentDiffusionConfig:
    """A whole model. ``cond_stage`` is what config.yaml says of the text encoder; released files leave out its sizes.

    ``image_size`` is the side of a latent in training: times ``first_stage.downsampling``, an image's default size.
    """

    unet: UNetConfig = Field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = Field(default_factory=AutoencoderConfig)
    cond_stage: TextEncoderConfig = Field(default_factory=TextEncoderConfig)
    timesteps: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1000
    linear_start: Beta = 0.00085
    linear_end: Beta = 0.012
    cosine_s: Positive = 8e-3
    beta_schedule: Literal["linear", "sqrt_linear", "sqrt", "cosine"] = "linear"
    parameterization: Literal["eps", "v", "x0"] = "eps"
    image_size: Annotated[int, Field(strict=True, ge=1, le=8192)] = 64
    scale_factor: Positive = 0.18215
    use_ema: Flag = False
    cond_stage_trainable: Flag = False

    def __post_init__(self) -> None:
        if self.unet.context_dim != self.cond_stage.project_dim:
            raise ConfigError(
                f"the UNet's context_dim is {self.unet.context_dim}, "
                f"but the text encoder gives {self.cond_stage.project_dim}."
            )
        if not self.unet.in_channels == self.unet.out_channels == self.first_stage.embed_dim:
            raise ConfigError(
                f"the UNet takes {self.unet.in_channels} and gives {self.unet.out_channels} channels, "
                f"but the latents have {self.first_stage.embed_dim}."
                + (_FOR_INPAINTING if self.unet.in_channels == _INPAINTING else "")
            )


def _in_our_words(message: str) -> str:
    for theirs, ours in {
        "Input should be": "expected",
        "greater than or equal to": "at least",
        "less than or equal to": "at most",
        "Unexpected keyword argument": "there is no such parameter",
    }.items():
        message = message.replace(theirs, ours)
    return message


def _check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % heads:
        raise ConfigError(f"hidden_size {hidden_size} cannot be divided among {heads} heads.")


def _check_blocks(levels: int, blocks: int, depth: int) -> None:
    count = levels * (2 * blocks + 1) * depth
    if count > _MAX_BLOCKS:
        raise ConfigError(
            f"{levels} levels with num_res_blocks={blocks} and a depth of {depth} make {count:,} layers; "
            f"expected at most {_MAX_BLOCKS}."
        )


def _check_groups(name: str, width: int, mults: Iterable[int], groups: int) -> None:
    for channels in (width * mult for mult in (1, *mults)):
        if channels > _MAX_WIDTH:
            raise ConfigError(f"{name} gives {channels} channels; expected at most {_MAX_WIDTH}.")
        if channels % groups:
            raise ConfigError(
                f"{name} gives {channels} channels, which {groups} norm groups do not divide; set norm_groups."
            )


RELEASED: dict[str, LatentDiffusionConfig | AltCLIPConfig] = {
    "AltDiffusion": LatentDiffusionConfig(),
    "AltDiffusion-m9": LatentDiffusionConfig(),
    "AltDiffusion-m18": LatentDiffusionConfig(
        unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
        cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
    ),
    "AltCLIP-XLMR-L": AltCLIPConfig(),
    "AltCLIP-XLMR-L-m9": AltCLIPConfig(),
    "AltCLIP-XLMR-L-m18": AltCLIPConfig(
        text=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
        vision=VisionConfig(hidden_size=1280, num_hidden_layers=32, intermediate_size=5120, hidden_act="gelu"),
        projection_dim=1024,
    ),
}
"""Sizes of the released models by their registered names, for plans that are made without their files."""
