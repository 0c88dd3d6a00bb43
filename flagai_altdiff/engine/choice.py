"""Which engine draws a request."""

from __future__ import annotations

from collections.abc import Callable

import torch

from flagai_altdiff.engine.base import Engine
from flagai_altdiff.engine.compiled import CompiledEngine
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.openvino import OpenVinoEngine
from flagai_altdiff.engine.packed import PackedEngine
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.request import ResolvedRequest

_REPAID_STEPS = 5
"""With fewer, laying out the weights takes longer than it saves."""
_OTHERS: dict[str, Callable[[LatentDiffusion], Engine]] = {
    "packed": PackedEngine,
    "openvino": OpenVinoEngine,
    "compile": CompiledEngine,
}
"""Beside the model as it is."""
_ON_CPU = ("packed", "openvino")


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
    name = request.engine
    if name == "auto":
        is_repaid = request.steps >= _REPAID_STEPS and not _unfit("packed", model, circular)
        name = "packed" if is_repaid else "eager"
    if name == "eager":
        return EagerEngine(seamless(model, circular) if circular else model)
    if reason := _unfit(name, model, circular):
        raise InvalidRequestError("engine", name, f"{reason}; leave it out")
    return _OTHERS[name](model)


def _unfit(name: str, model: LatentDiffusion, circular: str) -> str:
    """Why an engine cannot run a model; nothing if it can."""
    if name in _ON_CPU and model.device.type != "cpu":
        return f"it is for the CPU, and the model is on {model.device}"
    if name == "packed" and model.dtype != torch.float32:
        return f"it computes in float32, and the model's weights are {str(model.dtype).removeprefix('torch.')}"
    return "it does not draw images that go on at their edges" if circular else ""
