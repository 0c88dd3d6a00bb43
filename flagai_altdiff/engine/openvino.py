"""A model as graphs that OpenVINO makes for the processor.

The UNet, with both halves of guidance in a batch, and the decoder are traced from the loaded model in memory; no file
is read or written. The text encoder and the image encoder stay with torch.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.graphs import Graphs, weights_state
from flagai_altdiff.errors import MissingDependencyError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.shortcuts import NONE, Shortcuts

logger = logging.getLogger(__name__)

_HALVES = (torch.float16, torch.bfloat16)
_NEEDED = "this engine needs OpenVINO: pip install openvino"
_SINGLE, _HALF = "f32", "bf16"
"""OpenVINO's names of precisions."""


class OpenVinoEngine(EagerEngine):
    """Runs the UNet and the decoder with OpenVINO.

    It computes in float32; in bfloat16 where the model is asked for half precision and the processor has instructions
    for that. The first call with a shape traces and compiles; what is changed of the weights later is seen.

    Args:
        model: The model; on the CPU.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__(model)
        self.precision = _HALF if computes_in_half(model) else _SINGLE
        self._graphs = _graphs.setdefault(model, Graphs(weights_state))

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), (n B, L, D) -> (n B, C, h, w); all of the work, whatever the shortcuts."""
        times = len(cond) // len(x)
        return self._run(self.model.model.diffusion_model, x.repeat(times, 1, 1, 1), t.repeat(times), cond)

    def _decoded(self, latents: Tensor) -> Tensor:
        return self._run(self.model.first_stage_model, latents / self.model.scale_factor)

    def _decodes_in_half(self) -> bool:
        return self.precision == _HALF

    def _run(self, part: nn.Module, *given: Tensor) -> Tensor:
        inputs = [tensor.float().contiguous() for tensor in given]
        graph = self._graphs.of(part, inputs, self.precision, lambda module: _Graph(module, inputs, self.precision))
        return graph(*inputs)


def computes_in_half(model: LatentDiffusion) -> bool:
    """Whether it computes in bfloat16 for this model; MissingDependencyError without OpenVINO."""
    return (model.autocast_dtype in _HALVES or model.dtype in _HALVES) and has_half_precision()


def has_half_precision() -> bool:
    """Whether the processor computes in bfloat16; MissingDependencyError without OpenVINO, which knows."""
    return _HALF.upper() in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def check_installed() -> None:
    """MissingDependencyError without OpenVINO."""
    _core()


class _Graph:
    """A compiled module. Calls of several threads take turns, as OpenVINO would have them.

    Args:
        module: What it computes.
        inputs: As those that it will get, float32.
        precision: To compute in.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], precision: str) -> None:
        began = time.perf_counter()
        settings = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        compiled = _core().compile_model(_traced(module, inputs), "CPU", settings)
        self._request, self._lock = compiled.create_infer_request(), threading.Lock()
        shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs)
        logger.info("compiled %s for %s in %.1f s", type(module).__name__, shapes, time.perf_counter() - began)

    def __call__(self, *inputs: Tensor) -> Tensor:
        with self._lock:
            found = self._request.infer([tensor.numpy() for tensor in inputs], share_inputs=True)
            return torch.from_numpy(found[0].copy())  # the next call writes over it


def _traced(module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """OpenVINO's graph of a module, for these shapes and no others."""
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
        module = copy.deepcopy(module).float()
    # What openvino.convert_model does as well, but not without telling its makers' server about it.
    with warnings.catch_warnings():  # of the tracer, of sizes that are fixed here: a graph is for one shape
        warnings.filterwarnings("ignore", category=TracerWarning)
        trace = TorchScriptPythonDecoder(module, example_input=tuple(inputs), trace_kwargs={"check_trace": False})
    frontend = FrontEndManager().load_by_framework("pytorch")
    graph = frontend.convert(frontend.load(trace))
    graph.reshape({number: list(tensor.shape) for number, tensor in enumerate(inputs)})
    return graph


@cache
def _core() -> Any:
    """OpenVINO's door, one for the process."""
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(_NEEDED) from error
    return openvino.Core()


_graphs: weakref.WeakKeyDictionary[LatentDiffusion, Graphs] = weakref.WeakKeyDictionary()
"""Made once for all calls that draw with a model."""
