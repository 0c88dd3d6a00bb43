"""The plan of memory against what lives at once, and what is chosen by it."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from flagai_altdiff.config import RELEASED, LatentDiffusionConfig
from flagai_altdiff.engine import EagerEngine, Engine, eager, plan
from flagai_altdiff.engine.plan import Size, bytes_to_come, choose_mode, plan_memory, planning_of, working_dtype
from flagai_altdiff.engine.sparing import SparingEngine
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.loading import load_model
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare
from tests import tiny
from tests.live import peak_bytes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
M18 = cast(LatentDiffusionConfig, RELEASED["AltDiffusion-m18"])
ENGINES = {"normal": EagerEngine, "low": SparingEngine}


def measured(engine: Engine, size: Size) -> tuple[int, int]:
    """Bytes of a step of the UNet and of the decoder."""
    x = torch.zeros(size.batch, *engine.latent_shape(size.height, size.width))
    rows = size.batch * (2 if size.guided else 1)
    states = engine.encode_text(torch.zeros(1, 77, dtype=torch.long)).repeat(rows, 1, 1)
    t = torch.zeros(size.batch)
    return peak_bytes(lambda: engine.denoise(x, t, states)), peak_bytes(lambda: engine.decode(x))


@torch.no_grad()
@pytest.mark.parametrize("mode", ENGINES)
@pytest.mark.parametrize(
    "size",
    [Size(height=256, width=256), Size(height=512, width=384), Size(height=256, width=256, batch=2, guided=False)],
)
def test_the_plan_is_what_is_taken(
    mode: str, size: Size, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("plan", "strips"):
        monkeypatch.setattr(f"flagai_altdiff.engine.{module}.STRIP_BYTES", 200_000)
    monkeypatch.setattr("flagai_altdiff.engine.sparing.INNER_BYTES", 200_000)
    monkeypatch.setattr(plan, "INNER_BYTES", 200_000)
    unet, vae = measured(ENGINES[mode](model), size)
    planned = plan_memory(model.config, size, mode)
    assert planned.unet.working == pytest.approx(unet, rel=0.25)
    assert planned.vae.working == pytest.approx(vae, rel=0.25)


@torch.no_grad()
def test_a_processor_decodes_a_large_batch_in_parts(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, size = EagerEngine(model), Size(height=128, width=128, batch=4)
    latents = torch.randn(4, *engine.latent_shape(128, 128), generator=torch.Generator().manual_seed(1))
    whole, together = engine.decode(latents), peak_bytes(lambda: engine.decode(latents))
    planned = plan_memory(model.config, size).vae.working
    sizes = model.config.first_stage
    monkeypatch.setattr(eager, "MAP_BYTES", 2 * 4 * sizes.ch * sizes.ch_mult[1] * 128**2)  # two images
    torch.testing.assert_close(engine.decode(latents), whole, rtol=1e-4, atol=1e-5)
    assert peak_bytes(lambda: engine.decode(latents)) == pytest.approx(together / 2, rel=0.2)
    assert plan_memory(model.config, size).vae.working == pytest.approx(planned / 2, rel=0.2)


def test_released_models_fit_small_cards() -> None:
    """What is left of a card: the driver and torch's own kernels take some half a GiB."""
    size = Size(height=512, width=512, batch=4)
    low = plan_memory(M18, size, "low", "cuda", torch.float16)
    lowest = plan_memory(M18, size, "lowest", "cuda", torch.float16)
    assert lowest.peak < low.peak < (6 - 1) * GIB
    assert lowest.peak < (4 - 1) * GIB
    assert low.unet.weights == pytest.approx(2 * 866e6, rel=0.01) and low.text.weights == pytest.approx(
        4 * 560e6, rel=0.02
    )
    assert lowest.unet.weights < 0.2 * low.unet.weights


def test_private_memory_of_the_lowest_mode_on_a_processor() -> None:
    weights = plan_memory(M18, Size(height=512, width=512)).text.weights
    assert weights == pytest.approx(5.6 * GIB, rel=0.02)
    assert plan_memory(M18, Size(height=512, width=512), "lowest").peak < 0.1 * weights


@pytest.mark.parametrize(
    ("device", "free", "mode"),
    [
        (CPU, 16, "normal"),
        (CPU, 4, "low"),
        (CPU, 0.01, "lowest"),
        (CPU, math.nan, "normal"),
        (GPU, 10, "normal"),
        (GPU, 5, "low"),
        (GPU, 1.5, "lowest"),
        (GPU, 0.1, "lowest"),
    ],
)
def test_the_mode_is_the_first_that_fits(
    device: torch.device, free: float, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda _: free * GIB)
    assert choose_mode(M18, Size(height=512, width=512), device, None) == mode


def test_half_precision_comes_with_little_memory_on_a_gpu() -> None:
    assert working_dtype("low", GPU, None) is working_dtype("lowest", GPU, None) is torch.float16
    assert working_dtype("low", GPU, torch.bfloat16) is torch.bfloat16
    assert working_dtype("low", GPU, torch.float32) is working_dtype("normal", GPU, None) is None
    assert working_dtype("low", CPU, None) is None


def test_need_grows_with_pixels_and_batch_but_not_beyond_a_window(m9: LatentDiffusion) -> None:
    def need(**options: int) -> int:
        return bytes_to_come(m9, prepare(m9, tiny.CAT, **options)[0])

    base = need(height=256, width=256)
    assert need(height=512, width=256) == pytest.approx(2 * base, rel=0.1)
    assert need(height=256, width=256, images_per_prompt=2) == pytest.approx(2 * base, rel=0.1)
    assert need(height=256, width=1024, window=256) == base
    assert need(height=256, width=256, hires=2) == pytest.approx(4 * base, rel=0.1)


@pytest.mark.parametrize("options", [{"width": 2048}, {"height": 2048}, {"hires": 2}], ids=["long", "high", "twice"])
def test_windows_are_weighed_wherever_a_side_is_longer_than_one(options: dict[str, int], m9: LatentDiffusion) -> None:
    side = max(m9.spec.width, m9.spec.height)
    request = prepare(m9, tiny.CAT, **{"height": side, "width": side, **options})[0]
    assert planning_of(m9).otherwise(request)[f"window={side}"] < bytes_to_come(m9, request)


def test_only_known_modes_are_taken() -> None:
    with pytest.raises(InvalidRequestError, match="'lowest'"):
        load_model("AltDiffusion-mini", memory="least")
