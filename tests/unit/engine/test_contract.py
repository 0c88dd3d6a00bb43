"""What every engine must do, whatever it runs a model with: shapes, precision in and out, and the reference's
numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from flagai_altdiff.engine import EagerEngine, Engine, eager
from flagai_altdiff.engine.compiled import CompiledEngine
from flagai_altdiff.engine.openvino import OpenVinoEngine
from flagai_altdiff.engine.packed import PackedEngine
from flagai_altdiff.engine.sparing import SparingEngine
from flagai_altdiff.errors import NotFiniteError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from tests import tiny

ENGINES: dict[str, Callable[[LatentDiffusion], Engine]] = {
    "eager": EagerEngine,
    "packed": PackedEngine,
    "openvino": OpenVinoEngine,
    "compile": partial(CompiledEngine, backend="eager"),  # traced as for every backend, but not compiled: seconds
    "sparing": SparingEngine,
}
"""A new engine is one line here."""
OF_ANY_PRECISION = [name for name in ENGINES if name != "packed"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, model: LatentDiffusion) -> Engine:
    return ENGINES[request.param](model)


@torch.no_grad()
def test_numbers_are_the_models(engine: Engine, model: LatentDiffusion) -> None:
    ids = model.tokenize([tiny.CAT, ""])
    states = engine.encode_text(ids)
    assert states.shape == (2, 77, model.config.unet.context_dim)
    torch.testing.assert_close(states, model.get_learned_conditioning([tiny.CAT, ""]), rtol=1e-4, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, *engine.latent_shape(64, 96), generator=generator), torch.tensor([5, 800])
    assert x.shape == (2, 4, 8, 12)
    torch.testing.assert_close(engine.denoise(x, t, states), model.apply_model(x, t, states), rtol=1e-4, atol=1e-4)
    both = torch.cat([states, states.flip(0)])
    wanted = model.apply_model(torch.cat([x, x]), torch.tensor([7, 7, 7, 7]), both)
    torch.testing.assert_close(engine.denoise(x, torch.tensor([7, 7]), both), wanted, rtol=1e-4, atol=1e-4)
    images = engine.decode(x)
    assert images.shape == (2, 3, 64, 96)
    torch.testing.assert_close(images, model.decode_first_stage(x), rtol=1e-4, atol=1e-4)
    latents = engine.encode_image(images.clamp(-1, 1))
    wanted = model.scale_factor * model.encode_first_stage(images.clamp(-1, 1)).mode()
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_processor_decodes_no_more_at_once_than_memory_was_planned_for(
    engine: Engine, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(engine, EagerEngine)
    decoded = engine._decoded
    sizes: list[int] = []

    def watched(some: torch.Tensor) -> torch.Tensor:
        sizes.append(len(some))
        return decoded(some)

    monkeypatch.setattr(eager, "MAP_BYTES", 1)
    monkeypatch.setattr(engine, "_decoded", watched)
    x = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(engine.decode(x), model.decode_first_stage(x), rtol=1e-4, atol=1e-4)
    assert sizes == [1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OF_ANY_PRECISION)
def test_float32_goes_in_and_comes_out(name: str, dtype: torch.dtype, m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False).to(dtype)
    engine = ENGINES[name](model)
    x, t = torch.zeros(1, *engine.latent_shape(64, 64)), torch.tensor([5])
    states = engine.encode_text(model.tokenize([tiny.CAT]))
    outputs = (states, engine.denoise(x, t, states), engine.decode(x), engine.encode_image(torch.zeros(1, 3, 64, 64)))
    assert {output.dtype for output in outputs} == {torch.float32}
    assert all(bool(output.isfinite().all()) for output in outputs)


def test_the_schedule_is_the_configs_in_full_precision(engine: Engine, model: LatentDiffusion) -> None:
    assert engine.parameterization == model.parameterization
    assert engine.device == model.device
    torch.testing.assert_close(engine.alphas_cumprod, model.alphas_cumprod, rtol=0, atol=0)
    assert [len(engine.schedule(n)) for n in (1, 6, 50)] == [1, 7, 50]


@pytest.mark.fault(111)
@pytest.mark.parametrize("name", OF_ANY_PRECISION)
def test_a_cast_model_keeps_its_schedule(name: str, m9: LatentDiffusion, m9_folder: Path) -> None:
    engine = ENGINES[name](load_path(m9_folder, safety_checker=False).half())
    assert torch.equal(engine.alphas_cumprod, m9.alphas_cumprod)


def test_no_image_is_an_error(engine: Engine) -> None:
    with pytest.raises(NotFiniteError, match="float32"):
        engine.decode(torch.full((1, *engine.latent_shape(64, 64)), torch.nan))
