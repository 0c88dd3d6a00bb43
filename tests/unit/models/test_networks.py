"""Autoencoder and UNet: sizes, symmetry of their blocks, and the numbers that a checkpoint cannot show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from flagai_altdiff.config import AutoencoderConfig, UNetConfig
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.attention import CrossAttention, SpatialTransformer
from flagai_altdiff.models.autoencoder import AutoencoderKL, DiagonalGaussianDistribution
from flagai_altdiff.models.unet import UNetModel, timestep_embedding


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 96), (8, 16)])
def test_the_autoencoder_halves_sides_and_restores_them(height: int, width: int, m9: LatentDiffusion) -> None:
    posterior = m9.first_stage_model.encode(torch.rand(2, 3, height, width))
    assert posterior.mean.shape == posterior.std.shape == (2, 4, height // 8, width // 8)
    assert m9.first_stage_model.decode(posterior.mode()).shape == (2, 3, height, width)


def test_padding_of_the_encoder_is_on_the_right_and_below(m9: LatentDiffusion) -> None:
    down = m9.first_stage_model.encoder.get_submodule("down.0.downsample")
    weight, bias = down.get_parameter("conv.weight"), down.get_parameter("conv.bias")
    x = torch.randn(1, 32, 6, 6)
    expected = nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
    assert torch.equal(down(x), expected) and expected.shape[-1] == 3


def test_attention_in_the_autoencoder_where_configured() -> None:
    config = AutoencoderConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, resolution=32, attn_resolutions=(16,))
    keys = AutoencoderKL(config).state_dict()
    assert "encoder.down.1.attn.0.q.weight" in keys and "encoder.down.0.attn.0.q.weight" not in keys
    assert "decoder.up.1.attn.1.q.weight" in keys
    assert AutoencoderKL(config)(torch.rand(1, 3, 32, 32))[0].shape == (1, 3, 32, 32)


def test_the_posterior() -> None:
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2 * math.log(0.5))], dim=1)
    posterior = DiagonalGaussianDistribution(moments)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(posterior.sample(generator), 3 + 0.5 * noise)
    assert torch.equal(posterior.mode(), posterior.mean)
    torch.testing.assert_close(posterior.kl(), torch.tensor([16 * 0.5 * (9 + 0.25 - 1 - 2 * math.log(0.5))]))
    wild = DiagonalGaussianDistribution(torch.full((1, 2, 1, 1), 1000.0))
    assert math.isclose(float(wild.std), math.exp(10), rel_tol=1e-5)


def test_time_is_told_by_cosines_then_sines() -> None:
    features = timestep_embedding(torch.tensor([0.0, 3.5, 999]), 6)
    expected = [[f(t * 10000 ** (-k / 3)) for f in (math.cos, math.sin) for k in range(3)] for t in (0, 3.5, 999)]
    torch.testing.assert_close(features, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert timestep_embedding(torch.tensor([1]), 5).shape == (1, 5)
    assert timestep_embedding(torch.tensor([1]), 5)[0, -1] == 0


def test_norms_have_the_released_epsilons(model: LatentDiffusion) -> None:
    unet = model.model.diffusion_model
    entries = {id(m.norm) for m in unet.modules() if isinstance(m, SpatialTransformer)}
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_groups == 32
            assert module.eps == (1e-6 if id(module) in entries else 1e-5)
    assert {m.eps for m in model.first_stage_model.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    assert {m.eps for m in model.cond_stage_model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_heads_by_family(m9: LatentDiffusion, m18: LatentDiffusion) -> None:
    def heads(model: LatentDiffusion) -> list[int]:
        return [m.heads for m in model.model.diffusion_model.modules() if isinstance(m, CrossAttention)]

    assert set(heads(m9)) == {8}
    assert set(heads(m18)) == {1, 2}


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (4, 4), (16, 2)])
def test_the_unet_keeps_every_size_that_it_can_halve(height: int, width: int, model: LatentDiffusion) -> None:
    x = torch.randn(1, 4, height, width)
    cond = torch.randn(1, 77, model.config.unet.context_dim)
    assert model.apply_model(x, torch.tensor([5]), cond).shape == x.shape


def test_a_deep_unet_has_a_transformer_at_each_configured_level() -> None:
    config = UNetConfig(
        model_channels=32, context_dim=8, num_res_blocks=1, attention_resolutions=(4, 2), transformer_depth=2
    )
    keys = UNetModel(config).state_dict()
    assert "input_blocks.1.1.norm.weight" not in keys
    assert "input_blocks.3.1.transformer_blocks.1.attn2.to_k.weight" in keys
    assert "input_blocks.7.1.norm.weight" not in keys
    assert "middle_block.1.norm.weight" in keys


def test_attention_is_softmax_of_scaled_products() -> None:
    attention = CrossAttention(6, 5, heads=2, dim_head=3)
    x, context = torch.randn(1, 4, 6), torch.randn(1, 7, 5)
    pairs = ((attention.to_q, x), (attention.to_k, context), (attention.to_v, context))
    q, k, v = (layer(y)[0].reshape(-1, 2, 3) for layer, y in pairs)
    weights = torch.softmax(torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(3), dim=-1)
    expected = attention.to_out(torch.einsum("hnm,mhd->nhd", weights, v).reshape(1, 4, 6))
    torch.testing.assert_close(attention(x, context), expected)
