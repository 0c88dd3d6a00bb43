"""Another way to run the same weights: a twin of a model, of which single modules can be told to do otherwise."""

from __future__ import annotations

import copy

from torch import nn

from flagai_altdiff.models import LatentDiffusion

_PARTS = ("model", "first_stage_model")
"""What draws; the text encoder and the rest are the model's own."""
_KNOWN = ("torch.nn.modules.", "flagai_altdiff.models.")
"""Where classes are from whose ways are known."""


def twin_of(model: LatentDiffusion) -> LatentDiffusion:
    """A model whose drawing parts have modules of their own, and share all tensors with the given one."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for name in _PARTS:
        part = model.get_submodule(name)
        shared = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        twin._modules[name] = copy.deepcopy(part, shared)
    return twin


def drawing_modules(model: LatentDiffusion) -> list[nn.Module]:
    """All modules that draw; of a twin, those that are its own."""
    return [module for name in _PARTS for module in model.get_submodule(name).modules()]


def made_of(model: LatentDiffusion) -> tuple[int, ...]:
    """What a model's drawing parts consist of; another value when a module or a tensor was put in another's place."""
    parts = [model.get_submodule(name) for name in _PARTS]
    return tuple(id(own) for part in parts for own in (*part.modules(), *part.parameters(), *part.buffers()))


def is_watched(model: LatentDiffusion) -> bool:
    """Whether a module that draws has hooks, a ``forward`` or a class of somebody's own, which a twin would not run.

    Weights that are made anew whenever they are looked at, as those of a LoRA in training, make such a class.
    """
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not type(module).__module__.startswith(_KNOWN)
        for module in drawing_modules(model)
    )
