"""Tensors of a file -> the weights of a model, strictly; which keys of a file matter; weights told apart."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.checkpoint.mapped import is_mapped, let_go
from flagai_altdiff.errors import CheckpointError, StateDictMismatchError, printable

logger = logging.getLogger(__name__)

_LOOKED_AT = 64
"""Numbers of each weight that tell models apart."""

_INERT = re.compile(
    r"[^.]+$"  # the noise schedule, logvar, scale_factor: they follow from the config
    r"|model_ema\."  # averages of the training
    r"|first_stage_model\.(loss|model_ema)\."  # the critic that trained the autoencoder
    # parts of the text encoder that no image passes through
    r"|(cond_stage_model\.|text_encoder/)(roberta\.pooler\.|logit_scale$|roberta\.embeddings\.\w+_ids$)"
)
"""Keys that a file may have beside a model's parameters. Their values change nothing, so they may be anything."""


def assign(model: nn.Module, state: Mapping[str, Tensor], where: str, *, mapped: bool = False) -> None:
    """Give a model its weights; all of them, or none if there is an error.

    What counts are the parameters. Buffers follow from the config and stay as they are.

    Args:
        model: Parameters on the meta device become the file's tensors, as float32, without a copy where they are that.
            Others are overwritten in place.
        state: LDM key -> tensor.
        where: The file, for errors.
        mapped: Whether weights may stay mapped from their file; otherwise the file may be overwritten afterwards.

    Raises:
        StateDictMismatchError: A key or shape differs, outside a short list of known leftovers.
        CheckpointError: A tensor that should hold numbers holds integers, or it holds NaN or infinity.
    """
    want = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    weights = {k: v for k, v in state.items() if k in want or not (k in buffers or _INERT.match(k))}
    missing = [k for k in want if k not in weights]
    unexpected = [k for k in weights if k not in want]
    shapes = {
        k: (tuple(v.shape), tuple(want[k].shape)) for k, v in weights.items() if k in want and v.shape != want[k].shape
    }
    if missing or unexpected or shapes:
        raise StateDictMismatchError(where, missing, unexpected, shapes)
    for key, value in weights.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{where}: {key} holds {value.dtype}; expected floating-point numbers.")
    check_weights(weights, where)
    _warn_of_another_schedule(buffers, state, where)
    if any(parameter.is_meta for parameter in want.values()):
        model.load_state_dict({k: _own(v, mapped) for k, v in weights.items()}, strict=False, assign=True)
    else:
        with torch.no_grad():  # in one step of Python, between which and the next an interruption comes
            deque(map(Tensor.copy_, map(want.__getitem__, weights), weights.values()), maxlen=0)


def fingerprint(module: nn.Module) -> str:
    """A short name of a module's weights, from the first numbers of each: cheap, and another after any training."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.flatten()[:_LOOKED_AT].double().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def _own(value: Tensor, mapped: bool) -> Tensor:
    """As float32, and apart from the file unless it may stay mapped."""
    own = value.float()
    if mapped or not is_mapped(value):
        return own
    own = own.clone() if own is value else own
    let_go(value)
    return own


def _warn_of_another_schedule(buffers: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    names = [name for name in buffers if "." not in name and name in state and not _agree(state[name], buffers[name])]
    if names:
        logger.warning(
            "%s: the noise schedule stored in it (%s) is not the one of the config, which is used. If the model was "
            "trained with another, set timesteps, linear_start, linear_end and beta_schedule in its config.yaml.",
            printable(where),
            ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
        )


def _agree(stored: Tensor, own: Tensor) -> bool:
    """Whether values are the same but for the rounding of what they were stored and computed in."""
    if stored.shape != own.shape or not stored.is_floating_point():
        return False
    rounding = max(4 * torch.finfo(stored.dtype).eps, 4 * torch.finfo(own.dtype).eps, 1e-4)
    return torch.allclose(stored.cpu().double(), own.cpu().double(), rtol=rounding, atol=1e-7)
