"""Which engine draws a request."""

from __future__ import annotations

import torch

from flagai_altdiff.engine.base import Engine
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.packed import PackedEngine
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.sparing import SparingEngine
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.request import ResolvedRequest

_REPAID_STEPS = 5
"""With fewer, laying out the weights takes longer than it saves."""


def make_engine(model: LatentDiffusion, request: ResolvedRequest, circular: str = "") -> Engine:
    """The engine that a request asks for, or what is quickest.

    Args:
        model: What it runs.
        request: Names the engine; ``auto`` leaves the choice open.
        circular: Axes along which an image goes on at its opposite edge.

    Raises:
        InvalidRequestError: The named one cannot run this.
    """
    if request.engine == "packed" and (reason := _unpackable(model, circular)):
        raise InvalidRequestError("engine", "packed", f"{reason}; leave it out")
    by_itself = request.engine == "auto" and request.steps >= _REPAID_STEPS and not _unpackable(model, circular)
    if request.engine == "packed" or by_itself:
        return PackedEngine(model)
    if model.memory != "normal":
        return SparingEngine(model, circular)
    return EagerEngine(seamless(model, circular) if circular else model)


def _unpackable(model: LatentDiffusion, circular: str) -> str:
    """Why a model's weights cannot be laid out for the processor; nothing if they can."""
    if model.memory != "normal":
        return f"it lays out weights anew, for which memory={model.memory!r} has no room"
    if model.device.type != "cpu":
        return f"it is for the CPU, and the model is on {model.device}"
    if model.dtype != torch.float32:
        return f"it computes in float32, and the model's weights are {str(model.dtype).removeprefix('torch.')}"
    return "it does not draw images that go on at their edges" if circular else ""
