"""The engine that torch compiles: what it adds to the contract."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flagai_altdiff.engine import EagerEngine, compiled
from flagai_altdiff.engine.compiled import CompiledEngine, mode_for, require_compiler
from flagai_altdiff.engine.graphs import Decoder
from flagai_altdiff.errors import InvalidRequestError, MissingDependencyError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.autoencoder import ResnetBlock
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch's compiler needs a C++ compiler")


def states(model: LatentDiffusion) -> Tensor:
    return torch.randn(2, 77, model.config.unet.context_dim, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_nothing_breaks_the_graphs(model: LatentDiffusion) -> None:
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([5.0, 5.0])
    found = torch._dynamo.explain(model.model.diffusion_model)(x, t, states(model))
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    found = torch._dynamo.explain(Decoder(model.first_stage_model))(x)
    assert (found.graph_count, found.graph_break_count) == (1, 0)


@needs_compiler
@torch.no_grad()
def test_what_the_compiler_makes_has_the_same_numbers() -> None:
    block = ResnetBlock(8, 16, groups=4).eval()
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(compiled._compiled(block, "inductor", None)(x), block(x), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.full
@torch.no_grad()
def test_a_compiled_model_has_the_same_numbers(model: LatentDiffusion) -> None:
    engine, plain = CompiledEngine(model), EagerEngine(model)
    x, t = torch.randn(1, *engine.latent_shape(64, 96)), torch.tensor([5])
    wanted = plain.denoise(x, t, states(model))
    torch.testing.assert_close(engine.denoise(x, t, states(model)), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(engine.decode(x), plain.decode(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_damaged_cache_is_one_error_with_advice(model: LatentDiffusion) -> None:
    def backend(*_: object) -> object:
        raise ImportError("/tmp/cache/c3.main.so: file too short")

    engine = CompiledEngine(model, backend=backend)
    with pytest.raises(InvalidRequestError, match=r"c3\.main\.so: file too short.*TORCHINDUCTOR_CACHE_DIR"):
        engine.decode(torch.zeros(1, *engine.latent_shape(64, 64)))


@torch.no_grad()
def test_shapes_and_models_have_no_limit() -> None:
    limit = torch._dynamo.config.recompile_limit
    for width in range(1, limit + 4):
        graph = compiled._compiled(nn.Linear(width, 2), "eager", None)
        assert graph(torch.zeros(1, width)).shape == (1, 2)


def recorder(seen: list[Any]) -> Callable[..., Any]:
    """A compiler that notes what it is given and changes nothing."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        seen.append(([value for value in inputs if isinstance(value, Tensor)], half))
        return graph.forward

    return backend


@torch.no_grad()
def test_inputs_are_where_the_weights_are_and_as_precise() -> None:
    seen: list[Any] = []
    model = tiny.fresh_model("m9").eval().to(device="meta", dtype=torch.bfloat16)
    engine = CompiledEngine(model, backend=recorder(seen))
    x, cond = torch.zeros(1, 4, 8, 8, device="meta"), torch.zeros(2, 77, 64, device="meta")
    found = engine.denoise(x, torch.zeros(1, dtype=torch.long, device="meta"), cond)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float32, (2, 4, 8, 8))
    given, half = seen[0]
    assert {value.device.type for value in given} == {"meta"} and half is None
    assert {value.dtype for value in given if value.shape == (2, 4, 8, 8)} == {torch.bfloat16}


@torch.no_grad()
def test_on_a_gpu_it_is_compiled_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    seen: list[Any] = []
    model = tiny.fresh_model("m9").eval()
    model.autocast_dtype = torch.float16
    engine = CompiledEngine(model, backend=recorder(seen))
    engine.device = GPU  # says so; there is none
    monkeypatch.setattr(compiled, "mode_for", lambda device: None)
    engine._decoded(torch.zeros(1, 4, 8, 8))
    assert seen[0][1] == torch.float16


def test_only_the_first_thread_replays() -> None:
    found: list[str | None] = [mode_for(CPU), mode_for(GPU)]
    thread = threading.Thread(target=lambda: found.append(mode_for(GPU)))
    thread.start()
    thread.join()
    assert found == [None, "max-autotune", "max-autotune-no-cudagraphs"]


def test_without_a_compiler_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def missing() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    with pytest.raises(MissingDependencyError, match=r"apt-get install g\+\+"):
        require_compiler(CPU)
