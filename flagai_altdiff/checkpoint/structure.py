"""Sizes of a model from its keys and shapes: what config.yaml leaves out, and what a lone file cannot say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from heapq import nsmallest
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import CheckpointError, ConfigError, printable

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
"""Prefixes of the three parts."""

_RELEASED_HEAD_WIDTH = 64
_MAX_TIMESTEPS = 100_000
_MAX_LEVELS = 16
_MAX_PART = 6000
_MAY_LACK = 1000
"""So many weights may be missing before a model is built to say which. The released models have some 1,300 in all."""

_OTHER_MODELS = {
    r"cond_stage_model\.transformer\.": "Stable Diffusion 1.x (its text encoder is CLIP)",
    r"cond_stage_model\.model\.": "Stable Diffusion 2.x (its text encoder is OpenCLIP)",
    r"conditioner\.embedders\.": "Stable Diffusion XL",
    r"(lora_(unet|te)|.*\.lora_(A|B|up|down)\.|.*_lora\.(up|down)\.)": "a LoRA, an addition to a model",
    r"control_model\.|input_hint_block\.|controlnet_": "a ControlNet, an addition to a model",
    r"(model\.diffusion_model\.)?(double_blocks|joint_blocks|single_blocks)\.": "a diffusion transformer (FLUX, SD 3)",
    r"text_model\.|vision_model\.": "AltCLIP or CLIP, which matches texts and images but draws none",
    r"roberta\.|transformation\.": "a text encoder without the UNet and the autoencoder",
    r"model\.diffusion_model\.": "a UNet without the text encoder",
    r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)": "an autoencoder (VAE) alone",
    r"(down_blocks|up_blocks|mid_block)\.": "the UNet of a diffusers folder alone",
    r"model_ema\.": "averaged weights of a training alone",
    r"emb_params$|string_to_param": "a textual inversion, one new word",
}
"""How the first key of other well-known files begins, from the most telling one on; and what they are."""


def complete_config(config: LatentDiffusionConfig, state: Mapping[str, Tensor], where: str) -> LatentDiffusionConfig:
    """The config with the sizes of the text encoder that the weights have.

    Args:
        config: From config.yaml. Released files say nothing of these sizes; where the width is right, its heads stand.
        state: LDM key -> tensor.
        where: The file, for errors.

    Raises:
        ConfigError: Config and weights disagree on the variant (m9's or m18's read-out), or on a size.
        CheckpointError: The weights are not those of a text encoder.
    """
    text = config.cond_stage
    has_pre = f"{TEXT}transformation_pre.weight" in state
    if has_pre != text.has_pre_transformation:
        found, said = ("m18", "m9 or AltDiffusion") if has_pre else ("m9 or AltDiffusion", "m18")
        raise ConfigError(
            f"{where}: the weights have the text encoder of {found} ({'with' if has_pre else 'without'} "
            f"transformation_pre), but the config says {said}. Put the weights and the config of one model together."
        )
    found_text = text_encoder_config(state, where)
    with _naming(where):
        if text.hidden_size == found_text.hidden_size:
            found_text = replace(
                found_text, num_attention_heads=text.num_attention_heads, layer_norm_eps=text.layer_norm_eps
            )
        return replace(config, cond_stage=found_text)


def text_encoder_config(state: Mapping[str, Tensor], where: str) -> TextEncoderConfig:
    """Sizes of an XLM-R text encoder; heads are 64 wide, as in every released one."""
    has_pre = f"{TEXT}transformation_pre.weight" in state
    vocab_size, hidden = _shape(state, f"{TEXT}roberta.embeddings.word_embeddings.weight", where, 2)
    positions = _shape(state, f"{TEXT}roberta.embeddings.position_embeddings.weight", where, 2)[0]
    if min(vocab_size, positions) < 4:  # beginning, padding, end and one more
        raise CheckpointError(
            f"{where}: the text encoder has {vocab_size} tokens and {positions} positions; expected 4 or more of each."
        )
    intermediate = _shape(state, f"{TEXT}roberta.encoder.layer.0.intermediate.dense.weight", where, 2)[0]
    project = _shape(state, f"{TEXT}transformation.weight", where, 2)[0]
    with _naming(where):
        return TextEncoderConfig(
            hidden_size=hidden,
            num_hidden_layers=count_blocks(state, TEXT + r"roberta\.encoder\.layer\.([0-9]+)\."),
            num_attention_heads=max(hidden // _RELEASED_HEAD_WIDTH, 1),
            intermediate_size=intermediate,
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            project_dim=project,
            has_pre_transformation=has_pre,
            has_pooler=f"{TEXT}roberta.pooler.dense.weight" in state and not has_pre,
        )


def fill_unread(config: TextEncoderConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with something harmless for those that nothing reads where a file has none, or none that can be.

    In m9 that is the norm before m18's read-out, and XLM-R's pooler. The latter is a square as large as others in the
    file; where these are not, a file of a few bytes would ask for gigabytes.
    """
    width, unread = config.hidden_size, dict[str, Tensor]()
    if not config.has_pre_transformation:
        unread[f"{TEXT}pre_LN.weight"] = torch.ones(width, device="cpu")
        unread[f"{TEXT}pre_LN.bias"] = torch.zeros(width, device="cpu")
    square = state.get(f"{TEXT}roberta.encoder.layer.0.attention.self.query.weight")
    if config.has_pooler and square is not None and square.shape == (width, width):
        unread[f"{TEXT}roberta.pooler.dense.weight"] = torch.eye(width, device="cpu")
        unread[f"{TEXT}roberta.pooler.dense.bias"] = torch.zeros(width, device="cpu")
    return {**state, **{key: value for key, value in unread.items() if not _is_usable(state.get(key), value)}}


def _is_usable(found: Tensor | None, like: Tensor) -> bool:
    if found is None or found.shape != like.shape or not found.is_floating_point():
        return False
    numbers = found.float()  # which every type can become, while not every one can be asked
    return bool(numbers.isfinite().all()) and (like.ndim == 1 or bool(numbers.any()))


def infer_config(state: Mapping[str, Tensor], where: str) -> LatentDiffusionConfig:
    """The config of a file that comes without one; scale factor and head sizes are the released models'.

    So is the noise schedule, unless the file has a whole one of another length or with other ends.

    Args:
        state: LDM key -> tensor.
        where: The file, for errors.

    Raises:
        CheckpointError: Not a model of this family.
    """
    refuse_other_models(state, where)
    text = text_encoder_config(state, where)
    with _naming(where):
        return LatentDiffusionConfig(
            unet=_unet_config(state, where),
            first_stage=_autoencoder_config(state, where),
            cond_stage=text,
            **_schedule(state),
        )


def check_counts(config: LatentDiffusionConfig, counts: Mapping[str, int], where: str) -> None:
    """Refuse a config that is far larger than the weights, before a model is built: a short text can ask for any number
    of blocks.

    Args:
        config: The model's config.
        counts: Prefix of a part -> how many weights it has.
        where: The file, for errors.

    Raises:
        CheckpointError: A part has so many blocks that nothing but a made-up config can be the reason.
    """
    unet, vae = config.unet, config.first_stage
    levels = range(len(unet.channel_mult))
    attending = sum(2**level in unet.attention_resolutions for level in levels)
    around = 2 * unet.num_res_blocks + 1  # blocks of a level, down and up
    transformer = 6 + 20 * unet.transformer_depth
    least = {
        UNET: 10 * (len(levels) * around + 2) + transformer * (attending * around + 1),
        VAE: 8 * (len(vae.ch_mult) * (2 * vae.num_res_blocks + 1) + 4),
        TEXT: 16 * config.cond_stage.num_hidden_layers,
    }
    for part, needed in least.items():
        found = counts.get(part, 0)
        if needed > min(found + _MAY_LACK, _MAX_PART):
            raise CheckpointError(
                f"{where}: the config describes a model of over {needed} weights below {part}, but there are {found} "
                f"(and {_MAX_PART} at most can be). Put the weights and the config of one model together."
            )


def counts(state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many weights each part of a model has."""
    return {part: sum(key.startswith(part) for key in state) for part in (UNET, VAE, TEXT)}


def _schedule(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the betas of a file say of the schedule, if they, or their roots, are even steps from end to end."""
    betas = state.get("betas", torch.zeros(0))
    if betas.dtype not in (torch.float32, torch.float64) or betas.ndim != 1 or not 2 <= len(betas) <= _MAX_TIMESTEPS:
        return {}
    betas = betas.double()
    signal = state.get("alphas_cumprod")
    if (
        signal is None
        or signal.shape != betas.shape
        or not torch.allclose(signal.double(), (1 - betas).cumprod(0), rtol=1e-3)
    ):
        return {}  # a table that its neighbour does not agree with
    for kind, power in (("linear", 0.5), ("sqrt_linear", 1.0)):
        ends = betas[0].item(), betas[-1].item()
        if not 0 < ends[0] < ends[1] < 1:
            return {}
        steps = torch.linspace(ends[0] ** power, ends[1] ** power, len(betas), dtype=torch.float64) ** (1 / power)
        if torch.allclose(betas, steps, rtol=1e-5, atol=0):
            start, end = (float(f"{value:.7g}") for value in ends)  # the number that was rounded to float32
            return {"beta_schedule": kind, "timesteps": len(betas), "linear_start": start, "linear_end": end}
    return {}


def refuse_other_models(state: Mapping[str, Tensor], where: str) -> None:
    """Raise CheckpointError, with the name of what it is, for weights of another well-known kind."""
    if any(k.startswith(f"{TEXT}roberta.") for k in state):
        return
    kind = next((name for pattern, name in _OTHER_MODELS.items() if any(map(re.compile(pattern).match, state))), "")
    if kind:
        raise CheckpointError(f"{where} is {kind}, not AltDiffusion, whose text encoder is XLM-RoBERTa.")
    first = ", ".join(printable(key, 80) for key in nsmallest(3, state)) or "none at all"
    raise CheckpointError(f"{where} has no AltDiffusion text encoder ({TEXT}roberta.*); its first keys are {first}.")


def _unet_config(state: Mapping[str, Tensor], where: str) -> UNetConfig:
    width, in_channels = _shape(state, f"{UNET}input_blocks.0.0.weight", where, 4)[:2]
    levels: list[list[int]] = [[]]
    for i in range(1, count_blocks(state, UNET + r"input_blocks\.([0-9]+)\.")):
        if f"{UNET}input_blocks.{i}.0.op.weight" in state:  # a downsampling step opens the next level
            levels.append([])
        else:
            levels[-1].append(i)
    if not all(levels) or len(levels) > _MAX_LEVELS:
        raise CheckpointError(f"{where}: the UNet's input blocks are not a whole AltDiffusion UNet.")
    first = [f"{UNET}input_blocks.{blocks[0]}" for blocks in levels]
    middle = f"{UNET}middle_block.1"
    use_linear = len(_shape(state, f"{middle}.proj_in.weight", where, 2, 4)) == 2
    return UNetConfig(
        in_channels=in_channels,
        out_channels=_shape(state, f"{UNET}out.2.weight", where, 4)[0],
        model_channels=width,
        attention_resolutions=tuple(2**i for i, name in enumerate(first) if f"{name}.1.norm.weight" in state),
        num_res_blocks=len(levels[0]),
        channel_mult=tuple(_shape(state, f"{name}.0.out_layers.3.weight", where, 4)[0] // width for name in first),
        num_heads=None if use_linear else 8,
        num_head_channels=_RELEASED_HEAD_WIDTH if use_linear else None,
        use_linear_in_transformer=use_linear,
        context_dim=_shape(state, f"{middle}.transformer_blocks.0.attn2.to_k.weight", where, 2)[1],
        transformer_depth=count_blocks(state, re.escape(middle) + r"\.transformer_blocks\.([0-9]+)\."),
    )


def _autoencoder_config(state: Mapping[str, Tensor], where: str) -> AutoencoderConfig:
    base = _shape(state, f"{VAE}encoder.conv_in.weight", where, 4)[0]
    levels = count_blocks(state, VAE + r"encoder\.down\.([0-9]+)\.")
    blocks = count_blocks(state, VAE + r"encoder\.down\.0\.block\.([0-9]+)\.")
    last = f"block.{max(blocks, 1) - 1}.conv2.weight"
    widths = [_shape(state, f"{VAE}encoder.down.{i}.{last}", where, 4)[0] for i in range(max(levels, 1))]
    z_channels, embed_dim = _shape(state, f"{VAE}post_quant_conv.weight", where, 4)[:2]
    return AutoencoderConfig(
        embed_dim=embed_dim,
        z_channels=z_channels,
        ch=base,
        ch_mult=tuple(w // base for w in widths),
        num_res_blocks=blocks,
    )


def _shape(state: Mapping[str, Tensor], key: str, where: str, *dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there, with one of these numbers of dimensions and not empty."""
    if key not in state:
        raise CheckpointError(f"{where} is not a whole AltDiffusion model: {key} is missing.")
    shape = tuple(state[key].shape)
    if len(shape) not in dimensions or 0 in shape:
        expected = " or ".join(map(str, dimensions))
        raise CheckpointError(
            f"{where}: {key} has the shape {list(shape)}; expected {expected} dimensions, none of them empty."
        )
    return shape


def count_blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbered modules there are; numbers that leave gaps are the key check's to report."""
    found = re.compile("^" + pattern)
    return len({m[1] for m in map(found.match, state) if m})


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the file in front of what a config refuses."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
