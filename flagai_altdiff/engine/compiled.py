"""A model as torch's compiler makes it: kernels that suit a GPU and a shape, replayed as one.

Compiling takes minutes at full size, for each shape; torch keeps what it made in a cache of its own, on disk
(``TORCHINDUCTOR_CACHE_DIR``), so that the next process takes a part of that.
"""

from __future__ import annotations

import logging
import threading
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.graphs import Graph, Graphs
from flagai_altdiff.errors import InvalidRequestError, MissingDependencyError, printable
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.latent_diffusion import dtype_of
from flagai_altdiff.models.shortcuts import NONE, Shortcuts

logger = logging.getLogger(__name__)

_INDUCTOR = "inductor"
"""torch's own compiler."""
_ADVICE = (
    "Where it was interrupted before, its cache may be damaged: name another folder with the environment variable "
    "TORCHINDUCTOR_CACHE_DIR, or choose another engine"
)


class CompiledEngine(EagerEngine):
    """Runs the UNet and the decoder compiled, one whole graph each, on the model's device and in its precision.

    Args:
        model: The model. What is changed of its weights later is seen.
        backend: Of ``torch.compile``.

    Raises:
        MissingDependencyError: What the compiler needs is not there.
    """

    def __init__(self, model: LatentDiffusion, backend: Any = _INDUCTOR) -> None:
        super().__init__(model)
        if backend == _INDUCTOR:
            require_compiler(self.device)
        self._backend = backend
        self._graphs = _graphs.setdefault(model, Graphs())

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), (n B, L, D) -> (n B, C, h, w); all of the work, whatever the shortcuts."""
        times = len(cond) // len(x)
        given = x.repeat(times, 1, 1, 1).to(self.model.dtype)
        # Samplers give whole timesteps or others: one graph takes both.
        return self._run(self.model.model.diffusion_model, given, t.float().repeat(times), cond)

    def _decoded(self, latents: Tensor) -> Tensor:
        part = self.model.first_stage_model
        return self._run(part, (latents / self.model.scale_factor).to(dtype_of(part)))

    def _run(self, part: nn.Module, *inputs: Tensor) -> Tensor:
        from torch._dynamo.exc import BackendCompilerFailed  # a second, which only who compiles should pay

        mode = mode_for(self.device)
        with self._autocast():
            how = (self._backend, mode, self.device, self.model.dtype, self.model.autocast_dtype)
            graph = self._graphs.of(part, inputs, how, lambda module: _compiled(module, self._backend, mode))
            try:
                return graph(*inputs).to(torch.float32, copy=True)  # replayed kernels write to the same place again
            except BackendCompilerFailed as error:
                expected = f"torch's compiler failed ({printable(str(error.inner_exception), 200)}). {_ADVICE}"
                raise InvalidRequestError("engine", "compile", expected) from error


def mode_for(device: torch.device) -> str | None:
    """Of ``torch.compile``.

    Replaying belongs to one thread, of which torch makes the one that first does it: in others a GPU gets its kernels
    one by one. For a processor the compiler has nothing more to try.
    """
    if device.type != "cuda":
        return None
    main = threading.current_thread() is threading.main_thread()
    return "max-autotune" if main else "max-autotune-no-cudagraphs"


def require_compiler(device: torch.device) -> None:
    """MissingDependencyError where torch's compiler lacks what it needs for a device."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise MissingDependencyError("engine='compile' needs a C++ compiler: apt-get install g++") from error
    if device.type == "cuda" and not has_triton():
        raise MissingDependencyError("engine='compile' needs Triton on a GPU: pip install triton")


def _compiled(module: nn.Module, backend: Any, mode: str | None) -> Graph:
    def run(*inputs: Tensor) -> Tensor:
        return module(*inputs)

    name = type(module).__name__
    logger.warning("compiling %s for this size: that takes minutes, and is kept for the next drawings", name)
    # torch counts what it makes of a function's code, of whatever model and shape, and stops after a few.
    own: Graph = types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    return torch.compile(own, backend=backend, fullgraph=True, dynamic=False, mode=mode)


_graphs: weakref.WeakKeyDictionary[LatentDiffusion, Graphs] = weakref.WeakKeyDictionary()
"""Made once for all calls that draw with a model."""
