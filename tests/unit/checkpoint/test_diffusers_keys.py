"""Names in diffusers' parts <-> LDM names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flagai_altdiff.checkpoint.diffusers_keys import PREFIXES, UNKNOWN, to_diffusers, to_ldm
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.models import build_model
from flagai_altdiff.sampling.schedule import make_betas, schedule_buffers

SCHEDULE = schedule_buffers(make_betas("linear", 10, 0.1, 0.2))

M9 = LatentDiffusionConfig()
M18 = LatentDiffusionConfig(
    unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
    cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
)


def tiny(
    pre: bool = False, pooler: bool = True, unet: dict[str, Any] | None = None, **vae: Any
) -> LatentDiffusionConfig:
    heads: dict[str, Any] = (
        {"num_heads": None, "num_head_channels": 4, "use_linear_in_transformer": True} if pre else {"num_heads": 2}
    )
    return LatentDiffusionConfig(
        unet=UNetConfig(**{"model_channels": 8, "context_dim": 8, "norm_groups": 4, **heads, **(unet or {})}),
        first_stage=AutoencoderConfig(**{"ch": 8, "norm_groups": 4, **vae}),
        cond_stage=TextEncoderConfig(
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=20,
            max_position_embeddings=10,
            project_dim=8,
            has_pre_transformation=pre,
            has_pooler=pooler,
        ),
    )


CONFIGS = {
    "m9": tiny(),
    "m18": tiny(pre=True, pooler=False),
    "one block a level": tiny(unet={"num_res_blocks": 1, "channel_mult": (1, 2), "attention_resolutions": (2, 1)}),
    "five levels, some attend": tiny(
        unet={"num_res_blocks": 3, "channel_mult": (1, 1, 2, 2, 3), "attention_resolutions": (16, 2)}
    ),
    "two transformer blocks": tiny(unet={"transformer_depth": 2}),
    "autoencoder attends": tiny(ch_mult=(1, 2, 3), num_res_blocks=1, resolution=16, attn_resolutions=(8, 4)),
}


def weights(config: LatentDiffusionConfig, device: str = "cpu") -> dict[str, Tensor]:
    """A model's state dict without the schedule."""
    with torch.device(device):
        state = build_model(config).state_dict()
    return {key: tensor for key, tensor in state.items() if key not in SCHEDULE}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_tiny_model_goes_there_and_back_unchanged(name: str) -> None:
    config = CONFIGS[name]
    state = weights(config)
    parts = to_diffusers(state, config)
    assert set(parts) == set(PREFIXES)
    back = to_ldm(parts, config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("config", [M9, M18], ids=["m9", "m18"])
def test_a_full_size_model_goes_there_and_back_unchanged(config: LatentDiffusionConfig) -> None:
    state = weights(config, "meta")
    parts = to_diffusers(state, config)
    assert {part: len(tensors) for part, tensors in parts.items()} == {"unet": 686, "vae": 248, "text_encoder": 396}
    assert {k: v.shape for k, v in to_ldm(parts, config).items()} == {k: v.shape for k, v in state.items()}


@pytest.mark.parametrize(
    ("ldm", "part", "diffusers"),
    [
        ("model.diffusion_model.input_blocks.1.0.in_layers.0.weight", "unet", "down_blocks.0.resnets.0.norm1.weight"),
        ("model.diffusion_model.input_blocks.3.0.op.weight", "unet", "down_blocks.0.downsamplers.0.conv.weight"),
        ("model.diffusion_model.input_blocks.8.1.norm.bias", "unet", "down_blocks.2.attentions.1.norm.bias"),
        (
            "model.diffusion_model.input_blocks.11.0.emb_layers.1.weight",
            "unet",
            "down_blocks.3.resnets.1.time_emb_proj.weight",
        ),
        ("model.diffusion_model.output_blocks.2.1.conv.weight", "unet", "up_blocks.0.upsamplers.0.conv.weight"),
        ("model.diffusion_model.output_blocks.5.2.conv.weight", "unet", "up_blocks.1.upsamplers.0.conv.weight"),
        (
            "model.diffusion_model.output_blocks.11.0.skip_connection.bias",
            "unet",
            "up_blocks.3.resnets.2.conv_shortcut.bias",
        ),
        ("model.diffusion_model.middle_block.2.out_layers.3.weight", "unet", "mid_block.resnets.1.conv2.weight"),
        (
            "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
            "unet",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj.weight",
        ),
        ("first_stage_model.decoder.up.0.block.2.conv1.weight", "vae", "decoder.up_blocks.3.resnets.2.conv1.weight"),
        ("first_stage_model.decoder.up.3.upsample.conv.bias", "vae", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
        (
            "first_stage_model.encoder.down.1.block.0.nin_shortcut.bias",
            "vae",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        (
            "first_stage_model.decoder.mid.attn_1.proj_out.weight",
            "vae",
            "decoder.mid_block.attentions.0.to_out.0.weight",
        ),
        ("cond_stage_model.transformation.weight", "text_encoder", "transformation.weight"),
    ],
)
def test_names_of_the_released_models(ldm: str, part: str, diffusers: str) -> None:
    tensor = torch.empty(2, 2, 1, 1, device="meta")
    assert list(to_diffusers({ldm: tensor}, M9)[part]) == [diffusers]
    assert ldm in to_ldm({part: {diffusers: tensor}}, M9)


def test_attention_weights_of_the_autoencoder_are_linear_in_diffusers() -> None:
    config = CONFIGS["autoencoder attends"]
    vae = to_diffusers(weights(config), config)["vae"]
    assert vae["encoder.mid_block.attentions.0.to_q.weight"].shape == (24, 24)
    assert vae["decoder.up_blocks.0.attentions.1.to_out.0.weight"].shape == (24, 24)
    assert vae["quant_conv.weight"].ndim == 4


@pytest.mark.parametrize("name", ["m9", "autoencoder attends"])
def test_the_attention_names_of_2022_are_read(name: str) -> None:
    config = CONFIGS[name]
    state = weights(config)
    vae = to_diffusers(state, config)["vae"]
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        vae = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in vae.items()}
    assert any("proj_attn" in key for key in vae)
    back = to_ldm({"vae": vae}, config)
    assert all(torch.equal(back[key], state[key]) for key in state if key.startswith("first_stage_model."))


def test_an_unknown_weight_keeps_its_own_name() -> None:
    extra = {
        "unet": {"down_blocks.7.resnets.0.conv1.weight": torch.zeros(1)},
        "text_encoder": {"head.weight": torch.ones(1)},
    }
    assert to_ldm(extra, CONFIGS["m9"]).keys() == {
        "unet/down_blocks.7.resnets.0.conv1.weight",
        "text_encoder/head.weight",
    }


def test_a_weight_given_under_both_spellings_is_not_lost() -> None:
    new, old = "decoder.mid_block.attentions.0.to_q.bias", "decoder.mid_block.attentions.0.query.bias"
    state = to_ldm({"vae": {new: torch.zeros(1), old: torch.ones(1)}}, CONFIGS["m9"])
    assert state.keys() == {"first_stage_model.decoder.mid.attn_1.q.bias", f"vae/{old}"}


def test_a_convolution_of_another_size_is_left_for_the_shape_check() -> None:
    odd = {"first_stage_model.encoder.mid.attn_1.q.weight": torch.zeros(4, 4, 3, 3)}
    assert to_diffusers(odd, CONFIGS["m9"])["vae"]["encoder.mid_block.attentions.0.to_q.weight"].shape == (4, 4, 3, 3)


def test_weights_of_no_part_are_reported() -> None:
    state = {"model_ema.diffusion_modelout0weight": torch.zeros(1), "betas": torch.zeros(1)}
    assert to_diffusers(state, CONFIGS["m9"])[UNKNOWN].keys() == {"model_ema.diffusion_modelout0weight"}
