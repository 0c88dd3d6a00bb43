"""Which engine draws a request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flagai_altdiff.engine.base import Engine
from flagai_altdiff.engine.compiled import CompiledEngine, require_compiler
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.openvino import OpenVinoEngine, check_installed, computes_in_half
from flagai_altdiff.engine.packed import PackedEngine, is_packed
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.sparing import SparingEngine
from flagai_altdiff.engine.twins import is_watched
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.memory import free_memory
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.quantized import is_quantized
from flagai_altdiff.request import ResolvedRequest

_REPAID_STEPS = 5
"""With fewer, laying out the weights takes longer than it saves."""
_LAID_OUT = 1.8
"""Bytes that laid-out weights take at most, over those of the plain ones of a released model."""
_OTHERS: dict[str, Callable[[LatentDiffusion], Engine]] = {
    "packed": PackedEngine,
    "openvino": OpenVinoEngine,
    "compile": CompiledEngine,
}
"""Beside the model as it is."""
_ON_CPU, _WHOLE = ("packed", "openvino"), ("openvino", "compile")


def make_engine(model: LatentDiffusion, request: ResolvedRequest, circular: str = "") -> Engine:
    """The engine that a request asks for, or what is quickest.

    Args:
        model: What it runs.
        request: Names the engine; ``auto`` leaves the choice open.
        circular: Axes along which an image goes on at its opposite edge.

    Raises:
        InvalidRequestError: The named one cannot run this.
        MissingDependencyError: The named one is not installed.
    """
    check_engine(model, request, circular)
    name = request.engine
    if name == "auto":
        pays = request.steps >= _REPAID_STEPS and not is_quantized(model)  # whose memory it would take again
        is_wanted = pays and not _unfit("packed", model, request, circular) and _has_room(model)
        name = "packed" if is_wanted else "eager"
    if name == "eager":
        if model.memory != "normal":
            return SparingEngine(model, circular)
        return EagerEngine(seamless(model, circular) if circular else model)
    return _OTHERS[name](model)


def check_engine(model: LatentDiffusion, request: ResolvedRequest, circular: str = "") -> None:
    """Whether the engine that a request asks for can run it. Arguments and errors as of :func:`make_engine`."""
    name = request.engine
    if name not in _OTHERS:
        return
    if reason := _unfit(name, model, request, circular):
        raise InvalidRequestError("engine", name, f"{reason}; expected another engine, auto for example")
    if name == "openvino":
        check_installed()
    if name == "compile":
        require_compiler(model.device)


def precision_of(model: LatentDiffusion, request: ResolvedRequest) -> torch.dtype:
    """What a request is computed in."""
    if request.engine == "openvino":
        return torch.bfloat16 if computes_in_half(model) else torch.float32
    return model.autocast_dtype if model.autocast_dtype and model.device.type == "cuda" else model.dtype


def _has_room(model: LatentDiffusion) -> bool:
    """Whether weights can be laid out beside those that are there, or are already."""
    if is_packed(model):
        return True
    return not free_memory(model.device) < _LAID_OUT * sum(weight.nbytes for weight in _drawing_weights(model))


def _drawing_weights(model: LatentDiffusion) -> tuple[Tensor, ...]:
    return (*model.model.parameters(), *model.first_stage_model.parameters())


def _unfit(name: str, model: LatentDiffusion, request: ResolvedRequest, circular: str) -> str:
    """Why an engine cannot run a model; nothing if it can."""
    if model.memory != "normal":
        return f"it needs all weights in memory, for which memory={model.memory!r} has no room"
    if name in _ON_CPU and model.device.type != "cpu":
        return f"it is for the CPU, and the model is on {model.device}"
    if name == "packed" and (others := {weight.dtype for weight in _drawing_weights(model)} - {torch.float32}):
        return f"it computes in float32, and the model has weights in {str(others.pop()).removeprefix('torch.')}"
    if name in _WHOLE and (request.cache_interval > 1 or request.token_merging):
        return "it runs the UNet as a whole, and cache_interval and token_merging leave parts of it out"
    if name == "packed" and not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "it needs oneDNN, which this build of torch has not"
    if name == "packed" and is_watched(model):
        return "it runs modules in its own way, and some have hooks, a forward or a class of somebody's own"
    return "it does not draw images that go on at their edges" if circular else ""
