"""A model's weights in 8 or 4 bits: a quarter or a seventh of the memory, for another picture."""

from __future__ import annotations

import torch
from torch import nn

from flagai_altdiff.added import QUANTIZE, AddedPart
from flagai_altdiff.checkpoint.mapped import is_mapped, let_go
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.quantized import PRECISIONS, fold, is_quantized


def quantize_model(model: LatentDiffusion, kind: str) -> None:
    """Keep the weights of UNet and text encoder in fewer bits; they are unfolded when they are used.

    The autoencoder stays as it is. LoRAs, learnt words and weights of other files are to be put in before. The state
    dict has the weights as they are now, rounded. ``model.parts`` says it, and so do the records of images.

    Args:
        model: Changed in place; its weights must be float32 or half precision.
        kind: ``"int8"`` or ``"int4"``.

    Raises:
        InvalidRequestError: Another kind, or the model is quantized already.
    """
    check_kind(kind)
    refuse_quantized(model, "quantize", kind)
    for part in (model.model, model.cond_stage_model):
        for module in part.modules():
            weight = getattr(module, "weight", None)
            if fold(module, PRECISIONS[kind]) and isinstance(weight, torch.Tensor):
                let_go(weight)
    model.parts = (*model.parts, AddedPart(kind=QUANTIZE, name=kind, sha256=""))


def check_kind(kind: object) -> None:
    """InvalidRequestError unless weights can be kept so."""
    if kind not in tuple(PRECISIONS):
        raise InvalidRequestError("quantize", kind, f"expected {' or '.join(PRECISIONS)}")


def refuse_quantized(model: LatentDiffusion, field: str, value: object) -> None:
    """InvalidRequestError where weights are to be changed that are kept in few bits.

    Args:
        model: The model.
        field: What would change them.
        value: Its value.
    """
    if is_quantized(model):
        expected = "the weights are quantized and cannot change; do this first, and quantize_model(model, …) then"
        raise InvalidRequestError(field, value, expected)


@torch.no_grad()
def leave_files(model: nn.Module) -> None:
    """Copy what of a model's weights is still mapped from a file."""
    for parameter in model.parameters():
        if is_mapped(parameter):
            parameter.data = parameter.data.clone()
