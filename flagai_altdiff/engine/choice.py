"""Which engine draws a request."""

from __future__ import annotations

import torch

from flagai_altdiff.engine.base import Engine
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.packed import PackedEngine
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.twins import is_watched
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.quantized import is_quantized
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
    pays = request.steps >= _REPAID_STEPS and not is_quantized(model)  # whose memory it would take again
    by_itself = request.engine == "auto" and pays and not _unpackable(model, circular)
    if request.engine == "packed" or by_itself:
        return PackedEngine(model)
    return EagerEngine(seamless(model, circular) if circular else model)


def _unpackable(model: LatentDiffusion, circular: str) -> str:
    """Why a model's weights cannot be laid out for the processor; nothing if they can."""
    if model.device.type != "cpu":
        return f"it is for the CPU, and the model is on {model.device}"
    if model.dtype != torch.float32:
        return f"it computes in float32, and the model's weights are {str(model.dtype).removeprefix('torch.')}"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "it needs oneDNN, which this build of torch has not"
    if is_watched(model):
        return "it runs modules in its own way, and some have hooks or a forward of their own"
    return "it does not draw images that go on at their edges" if circular else ""
