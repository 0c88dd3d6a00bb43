"""Names of weights in diffusers' parts <-> names in LDM checkpoints, both ways, by rule.

A rule is a pair of module names; everything below a named module keeps its name. The numbering of the UNet's and the
autoencoder's blocks follows from the config, so models of any size translate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

from torch import Tensor

from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, UNetConfig

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
"""Part of a diffusers folder -> what its names begin with in an LDM checkpoint."""

UNKNOWN = "unknown"
"""Key of :func:`to_diffusers`' result for what has no place in any part."""

Modules = Iterator[tuple[str, str]]
"""(LDM name, diffusers name) of modules, without the part's prefix."""


def to_ldm(parts: Mapping[str, Mapping[str, Tensor]], config: LatentDiffusionConfig) -> dict[str, Tensor]:
    """Weights of a diffusers folder under LDM's names, without the schedule buffers.

    A weight that has no LDM name, or whose name is taken, is kept as ``<part>/<its own name>``.

    Args:
        parts: Part -> name -> weight; any subset of ``unet``, ``vae`` and ``text_encoder``. Meta tensors will do.
        config: The model's config.
    """
    state: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        names = {theirs: PREFIXES[part] + ours for ours, theirs in _modules(part, config)}
        if part == "vae":
            names |= {
                theirs: PREFIXES[part] + ours for ours, theirs in _autoencoder(config.first_stage, _OLD_ATTENTION)
            }
        for key, tensor in tensors.items():
            name = _rename(key, names)
            if name is None or name in state:
                name = f"{part}/{key}"
            state[name] = tensor[..., None, None] if _is_pixel_linear(name) and tensor.ndim == 2 else tensor
    return state


def to_diffusers(state: Mapping[str, Tensor], config: LatentDiffusionConfig) -> dict[str, dict[str, Tensor]]:
    """Weights of an LDM checkpoint as the parts of a diffusers folder; the schedule buffers are left out.

    Args:
        state: LDM name -> weight. Meta tensors will do.
        config: The model's config.

    Returns:
        ``unet``, ``vae`` and ``text_encoder`` -> name -> weight; and under :data:`UNKNOWN`, if there are any, what
        belongs to none of them (averaged weights, for example), by LDM names.
    """
    names = {PREFIXES[part] + ours: (part, theirs) for part in PREFIXES for ours, theirs in _modules(part, config)}
    heads = {ours: f"{part}/{theirs}" for ours, (part, theirs) in names.items()}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PREFIXES}
    for key, tensor in state.items():
        if "." not in key:  # the schedule's buffers, which a diffusers folder expresses by its scheduler's config
            continue
        part, _, name = (_rename(key, heads) or f"{UNKNOWN}/{key}").partition("/")
        is_map = _is_pixel_linear(key) and tensor.shape[2:] == (1, 1)
        parts.setdefault(part, {})[name] = tensor[:, :, 0, 0] if is_map else tensor
    return parts


def _rename(key: str, names: Mapping[str, str]) -> str | None:
    """``key`` with its longest module name replaced, or None where no module name fits."""
    module = key
    while module := module.rpartition(".")[0]:
        if module in names:
            return names[module] + key[len(module) :]
    return None


def _modules(part: str, config: LatentDiffusionConfig) -> Modules:
    if part == "unet":
        return _unet(config.unet)
    if part == "vae":
        return _autoencoder(config.first_stage, _ATTENTION)
    return ((name, name) for name in ("roberta", "transformation", "transformation_pre", "pre_LN"))


_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _unet(config: UNetConfig) -> Modules:
    yield "time_embed.0", "time_embedding.linear_1"
    yield "time_embed.2", "time_embedding.linear_2"
    yield "input_blocks.0.0", "conv_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    yield from _inside("middle_block.0", "mid_block.resnets.0", _RES_BLOCK)
    yield "middle_block.1", "mid_block.attentions.0"
    yield from _inside("middle_block.2", "mid_block.resnets.1", _RES_BLOCK)
    levels = range(len(config.channel_mult))
    blocks = count(1)  # input_blocks.0 is the entry convolution
    for level in levels:
        for layer in range(config.num_res_blocks):
            yield from _unet_layer(config, f"input_blocks.{next(blocks)}", f"down_blocks.{level}", level, layer)
        if level != levels[-1]:
            yield f"input_blocks.{next(blocks)}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
    blocks = count()
    for step, level in enumerate(reversed(levels)):
        for layer in range(config.num_res_blocks + 1):
            block = f"output_blocks.{next(blocks)}"
            yield from _unet_layer(config, block, f"up_blocks.{step}", level, layer)
        if level:
            yield f"{block}.{2 if _attends(config, level) else 1}.conv", f"up_blocks.{step}.upsamplers.0.conv"


def _unet_layer(config: UNetConfig, ours: str, theirs: str, level: int, layer: int) -> Modules:
    yield from _inside(f"{ours}.0", f"{theirs}.resnets.{layer}", _RES_BLOCK)
    if _attends(config, level):
        yield f"{ours}.1", f"{theirs}.attentions.{layer}"


def _attends(config: UNetConfig, level: int) -> bool:
    return 2**level in config.attention_resolutions


_RESNET_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def _autoencoder(config: AutoencoderConfig, attention: Mapping[str, str]) -> Modules:
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    levels = range(len(config.ch_mult))
    for side, ours, theirs, resample, layers in (
        ("encoder", "down", "down_blocks", "downsample", config.num_res_blocks),
        ("decoder", "up", "up_blocks", "upsample", config.num_res_blocks + 1),
    ):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        yield from _inside(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", _RESNET_BLOCK)
        yield from _inside(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", attention)
        yield from _inside(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", _RESNET_BLOCK)
        for level in levels:
            step = level if side == "encoder" else levels[-1] - level  # diffusers counts in the order of computation
            here, there = f"{side}.{ours}.{level}", f"{side}.{theirs}.{step}"
            for layer in range(layers):
                yield from _inside(f"{here}.block.{layer}", f"{there}.resnets.{layer}", _RESNET_BLOCK)
                yield from _inside(f"{here}.attn.{layer}", f"{there}.attentions.{layer}", attention)
            yield f"{here}.{resample}.conv", f"{there}.{resample}rs.0.conv"


def _inside(ours: str, theirs: str, names: Mapping[str, str]) -> Modules:
    return ((f"{ours}.{our}", f"{theirs}.{their}") for our, their in names.items())


def _is_pixel_linear(name: str) -> bool:
    """Whether LDM has a 1x1 convolution where diffusers has a linear layer: in the attention of the autoencoder."""
    module, _, leaf = name.rpartition(".")
    parents = module.split(".")
    return (
        parents[0] == "first_stage_model"
        and leaf == "weight"
        and parents[-1] in ("q", "k", "v", "proj_out")
        and ("attn_1" in parents or "attn" in parents)
    )
