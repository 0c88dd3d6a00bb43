"""The autoencoder in strips gives what it gives as a whole, and holds less."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from flagai_altdiff.engine import EagerEngine, sparing, strips
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.sparing import SparingEngine, sliced_attention
from flagai_altdiff.engine.strips import decode_in_strips
from flagai_altdiff.loading import load_model
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.autoencoder import AutoencoderKL
from tests import tiny
from tests.live import peak_bytes


@pytest.fixture
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of two rows or a few, as many as full-size models have."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 20_000)


@torch.no_grad()
@pytest.mark.parametrize("axes", ["", "x", "y", "xy"])
@pytest.mark.parametrize("shape", [(1, 4, 8, 12), (2, 4, 20, 9), (1, 4, 2, 2)])
def test_strips_are_the_whole(axes: str, shape: tuple[int, ...], thin: None, m9: LatentDiffusion) -> None:
    whole, sparing = EagerEngine(seamless(m9, axes)), SparingEngine(m9, axes)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images = whole.decode(x)
    torch.testing.assert_close(sparing.decode(x), images, rtol=1e-4, atol=2e-5)
    images = images.clamp(-1, 1)
    torch.testing.assert_close(sparing.encode_image(images), whole.encode_image(images), rtol=1e-4, atol=5e-6)


@torch.no_grad()
def test_no_seam_is_seen_with_the_embedded_model(thin: None) -> None:
    model = load_model("AltDiffusion-mini", memory="normal")
    x = torch.randn(1, *EagerEngine(model).latent_shape(128, 256), generator=torch.Generator().manual_seed(0))
    whole, tiled = EagerEngine(model).decode(x).clamp(-1, 1), SparingEngine(model).decode(x).clamp(-1, 1)
    error = float((whole - tiled).double().square().mean())
    assert 10 * math.log10(4 / max(error, 1e-20)) > 100, "40 dB is what no eye sees"


@torch.no_grad()
def test_attention_between_the_blocks_sees_the_whole(thin: None) -> None:
    """As other autoencoders have it."""
    config = tiny.tiny_config(tiny.M9).first_stage
    model = AutoencoderKL(replace(config, ch_mult=(1, 2), resolution=32, attn_resolutions=(32, 16)))
    tiny.fill(model.state_dict(), seed=3)
    z = torch.randn(1, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    whole = model.decoder(z)
    torch.testing.assert_close(decode_in_strips(model.decoder, "", z), whole, rtol=1e-4, atol=2e-5)


def test_slices_of_attention_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (50, 77, 77))
    whole = F.scaled_dot_product_attention(q, k, v)
    for limit in (1, 2 * 3 * 77 * 4 * 7, 1 << 20):
        monkeypatch.setattr(sparing, "_SCORES_BYTES", limit)
        torch.testing.assert_close(sliced_attention(q, k, v), whole)
    attend = partial(F.scaled_dot_product_attention, dropout_p=1e-9)  # with any, torch holds all scores
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    scores = 2 * 3 * 50 * 77 * 4
    monkeypatch.setattr(sparing, "_SCORES_BYTES", scores // 10)
    assert peak_bytes(partial(attend, q, k, v)) > scores > peak_bytes(partial(sliced_attention, q, k, v))


@pytest.mark.parametrize("shape", [(64, 64), (128, 32)])
def test_a_decoder_in_strips_holds_less_than_a_third(
    shape: tuple[int, int], m9: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 100_000)
    x = torch.randn(1, 4, *shape)
    whole, tiled = (peak_bytes(partial(engine(m9).decode, x)) for engine in (EagerEngine, SparingEngine))
    assert tiled < whole / 3


def test_images_are_decoded_one_by_one(m9: LatentDiffusion) -> None:
    engine = SparingEngine(m9)
    one, four = (peak_bytes(partial(engine.decode, torch.zeros(n, 4, 32, 32))) for n in (1, 4))
    assert four < 1.5 * one


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(dtype: torch.dtype, thin: None) -> None:
    decoder = tiny.fresh_model("m9").to(dtype).first_stage_model.decoder
    z = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, whole = decode_in_strips(decoder, "", z), decoder(z)
    assert found.dtype is dtype
    rough = 0 if dtype is torch.float64 else 60 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, whole, rtol=rough or 1e-9, atol=rough or 1e-9)
