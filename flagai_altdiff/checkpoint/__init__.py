"""Files on disk -> tensors with LDM names -> a model, strictly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.checkpoint.structure import TEXT
from flagai_altdiff.errors import CheckpointError, StateDictMismatchError

_POSITION_IDS = f"{TEXT}roberta.embeddings.position_ids"
_DROPPED = ("model_ema.", f"{TEXT}roberta.pooler.", f"{TEXT}logit_scale", _POSITION_IDS)
"""Keys that a file may have and a model need not: averaged weights of the training, parts that no picture passes through."""


def assign(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Give a model on the meta device its weights, without a copy where they are float32 already.

    Args:
        model: Built under ``torch.device("meta")``.
        state: LDM key -> tensor; half precision is widened.
        where: The file, for errors.

    Raises:
        StateDictMismatchError: A key or shape differs, outside a short list of known leftovers.
        CheckpointError: A tensor that should hold numbers holds integers (or the reverse), or holds NaN or infinity.
    """
    want = model.state_dict()
    state = {k: v for k, v in state.items() if k in want or not k.startswith(_DROPPED)}
    if _POSITION_IDS in want and _POSITION_IDS not in state:
        state[_POSITION_IDS] = torch.arange(want[_POSITION_IDS].shape[1])[None]
    missing = [k for k in want if k not in state]
    unexpected = [k for k in state if k not in want]
    shapes = {k: (tuple(v.shape), tuple(want[k].shape)) for k, v in state.items() if k in want and v.shape != want[k].shape}
    if missing or unexpected or shapes:
        raise StateDictMismatchError(where, missing, unexpected, shapes)
    for key, value in state.items():
        if want[key].is_floating_point():
            if not value.is_floating_point():
                raise CheckpointError(f"{where}: {key} holds {value.dtype}; expected floating-point numbers.")
            state[key] = value.float()
        elif value.is_floating_point() or value.is_complex():
            raise CheckpointError(f"{where}: {key} holds {value.dtype}; expected whole numbers.")
    check_weights(state, where)
    model.load_state_dict(state, strict=True, assign=True)
