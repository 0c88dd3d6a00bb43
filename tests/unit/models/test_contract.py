"""The attributes and methods by which LDM's users drive a model, and a sampler of the k-diffusion kind that does so."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.autoencoder import DiagonalGaussianDistribution
from tests import tiny


def test_attributes_of_the_contract(model: LatentDiffusion) -> None:
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    for name in ("model.diffusion_model", "first_stage_model", "cond_stage_model"):
        assert isinstance(model.get_submodule(name), nn.Module)
    assert model.model_ema is None
    assert model.scale_factor == 0.18215
    assert model.num_timesteps == 1000
    assert model.parameterization == "eps"
    assert model.betas.shape == model.alphas_cumprod.shape == (1000,)
    alphas_cumprod = torch.cumprod(1 - model.betas.double(), 0).float()
    torch.testing.assert_close(model.alphas_cumprod, alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert len([k for k in model.state_dict() if "." not in k]) == 12


def test_conditioning_has_77_rows(model: LatentDiffusion) -> None:
    states = model.get_learned_conditioning([tiny.CAT, ""])
    assert states.shape == (2, 77, model.config.unet.context_dim)
    torch.testing.assert_close(states[0], model.get_learned_conditioning([tiny.CAT])[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[0], states[1])


def test_conditioning_may_come_in_three_forms(model: LatentDiffusion) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    cond = torch.randn(2, 77, model.config.unet.context_dim)
    plain = model.apply_model(x, t, cond)
    assert plain.shape == x.shape
    assert torch.equal(model.apply_model(x, t, [cond]), plain)
    assert torch.equal(model.apply_model(x, t, cond={"c_crossattn": [cond]}), plain)
    parts = list(cond.split([40, 37], dim=1))
    torch.testing.assert_close(model.apply_model(x, t, {"c_crossattn": parts}), plain)


def test_rows_times_and_texts_all_count(model: LatentDiffusion) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    cond = torch.randn(2, 77, model.config.unet.context_dim)
    out = model.apply_model(x, t, cond)
    for row in (0, 1):
        alone = model.apply_model(x[row, None], t[row, None], cond[row, None])
        torch.testing.assert_close(alone[0], out[row], rtol=1e-3, atol=1e-4)
    assert (model.apply_model(x, t.flip(0), cond) - out).abs().max() > 0.01
    assert (model.apply_model(x, t, cond.flip(0)) - out).abs().max() > 0.01


def test_a_sampler_of_the_k_diffusion_kind_drives_the_model(model: LatentDiffusion) -> None:
    """Noise levels from alphas_cumprod, fractional timesteps, eps through apply_model(x, t, cond=...)."""
    sigmas_of_t = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt()
    log_sigmas = sigmas_of_t.log()

    def time_of(sigma: Tensor) -> Tensor:
        low = int((log_sigmas <= sigma.log()).sum().clamp(1, 999)) - 1
        weight = (sigma.log() - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
        return low + weight.clamp(0, 1)

    def denoised(x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        t = time_of(sigma).repeat(len(x))
        return x - sigma * model.apply_model(x / (sigma**2 + 1).sqrt(), t, cond=cond)

    torch.manual_seed(0)
    sigmas = torch.cat([torch.exp(torch.linspace(math.log(14.6), math.log(0.03), 8)), torch.zeros(1)])
    with torch.no_grad(), model.ema_scope("sampling"):
        cond = model.get_learned_conditioning([tiny.CAT])
        x = torch.randn(1, 4, 8, 8) * sigmas[0]
        for sigma, following in pairwise(sigmas):
            direction = (x - denoised(x, sigma, cond)) / sigma
            x = x + direction * (following - sigma)
        image = model.decode_first_stage(x)
    assert image.shape == (1, 3, 64, 64)
    assert bool(image.isfinite().all())


def test_q_sample_mixes_picture_and_noise_row_by_row(m9: LatentDiffusion) -> None:
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    mixed = m9.q_sample(x, t, noise)
    for i, step in enumerate(t):
        a = float(m9.alphas_cumprod[step])
        torch.testing.assert_close(mixed[i], a**0.5 * x[i] + (1 - a) ** 0.5 * noise[i])
    torch.manual_seed(4)
    drawn = m9.q_sample(x, t)
    torch.manual_seed(4)
    torch.testing.assert_close(drawn, m9.q_sample(x, t, torch.randn_like(x)))


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_the_loss_compares_with_what_the_model_is_meant_to_give(kind: str) -> None:
    model = tiny.fresh_model("m9", parameterization=kind)
    x, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 800])
    cond = torch.randn(2, 77, 64)
    with torch.no_grad():
        loss, values = model.p_losses(x, cond, t, noise)
        a = model.alphas_cumprod[t][:, None, None, None]
        output = model.apply_model(a.sqrt() * x + (1 - a).sqrt() * noise, t, cond)
    target = {"eps": noise, "x0": x, "v": a.sqrt() * noise - (1 - a).sqrt() * x}[kind]
    torch.testing.assert_close(loss, ((output - target) ** 2).mean())
    torch.testing.assert_close(values["loss_simple"], loss)


def test_training_reaches_the_unet_only() -> None:
    model = tiny.fresh_model("m9")
    loss, _ = model(torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64))
    loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {"model"}
    assert all(p.grad is not None for p in model.model.parameters())
    trainable = tiny.fresh_model("m9", cond_stage_trainable=True)
    assert all(p.requires_grad for p in trainable.cond_stage_model.parameters())
    assert not any(p.requires_grad for p in trainable.first_stage_model.parameters())


def test_a_batch_becomes_scaled_latents(m9: LatentDiffusion) -> None:
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    batch = {m9.first_stage_key: images, m9.cond_stage_key: ["a", "b"]}
    torch.manual_seed(1)
    z, states = m9.get_input(batch, m9.first_stage_key)
    torch.manual_seed(1)
    torch.testing.assert_close(z, 0.18215 * m9.encode_first_stage(images).sample())
    assert not z.requires_grad
    torch.testing.assert_close(states, m9.get_learned_conditioning(["a", "b"]))
    posterior = m9.encode_first_stage(images)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    torch.testing.assert_close(m9.get_first_stage_encoding(posterior.mode()), 0.18215 * posterior.mean)


def test_captions_stay_captions_where_the_text_encoder_learns(m9_folder: Path) -> None:
    model = load_path(m9_folder)
    model.cond_stage_model.requires_grad_(True)
    batch = {"pixels": torch.rand(2, 3, 64, 64), "caption": ["a", "b"]}
    z, captions = model.get_input(batch, "pixels")
    assert captions == ["a", "b"]
    model(z, captions)[0].backward()
    assert any(p.grad is not None for p in model.cond_stage_model.parameters())


def test_ids_stand_for_the_captions_that_a_batch_lacks(m9: LatentDiffusion) -> None:
    tokenizer = m9.tokenizer
    assert tokenizer is not None
    ids = tokenizer(["a cat", "a castle on a hill"], padding=True, return_tensors="pt")["input_ids"]
    batch = {"pixels": torch.rand(2, 3, 64, 64), "caption": ["a cat"], "input_ids": ids}
    _, states = m9.get_input(batch, "pixels")
    torch.testing.assert_close(states, m9.get_learned_conditioning(["a cat", "a castle on a hill"]))
    with pytest.raises(ValueError, match="1 texts for 2 latents"):
        m9(torch.randn(2, 4, 8, 8), ["a cat"])


def test_decoding_undoes_the_scale(m9: LatentDiffusion) -> None:
    z = torch.randn(1, 4, 3, 5)
    image = m9.decode_first_stage(z)
    assert image.shape == (1, 3, 24, 40)
    torch.testing.assert_close(image, m9.first_stage_model.decode(z / 0.18215))


def test_ema_follows_and_swaps() -> None:
    model = tiny.fresh_model("m9", use_ema=True)
    assert model.model_ema is not None
    names = [k for k in model.state_dict() if k.startswith("model_ema.")]
    assert "model_ema.decay" in names and "model_ema.num_updates" in names
    assert "model_ema.diffusion_modelout2bias" in names
    bias = model.get_parameter("model.diffusion_model.out.2.bias")
    average = model.model_ema.get_buffer("diffusion_modelout2bias")
    with torch.no_grad():
        average.zero_()
        bias.fill_(1.0)
    model.model_ema(model.model)
    torch.testing.assert_close(average, torch.full((4,), 1 - 2 / 11))  # min(0.9999, 2 / 11) of the old stays
    model.model_ema(model.model)
    torch.testing.assert_close(average, torch.full((4,), 1 - 2 / 11 * 3 / 12))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        with model.ema_scope("test"):
            torch.testing.assert_close(bias, before["model_ema.diffusion_modelout2bias"])
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_without_an_average_the_scope_changes_nothing(m9: LatentDiffusion) -> None:
    weight = m9.get_parameter("model.diffusion_model.out.2.weight")
    before = weight.clone()
    with m9.ema_scope():
        assert torch.equal(weight, before)


def test_the_tokenizer_and_checker_are_no_part_of_the_state(m9: LatentDiffusion, m9_folder: Path) -> None:
    assert m9.tokenizer is not None
    assert set(m9.state_dict()) == set(tiny.tiny_state("m9"))
    assert not [k for k in m9.state_dict() if "token" in k.split(".")[0] or "safety" in k]
