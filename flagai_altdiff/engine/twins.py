"""Another way to run the same weights: a twin of a model, of which single modules can be told to do otherwise."""

from __future__ import annotations

import copy

from torch import nn

from flagai_altdiff.models import LatentDiffusion

_PARTS = ("model", "first_stage_model")
"""What draws; the text encoder and the rest are the model's own."""


def twin_of(model: LatentDiffusion) -> LatentDiffusion:
    """A model whose drawing parts have modules of their own, and share all tensors with the given one."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    for name in _PARTS:
        part = model.get_submodule(name)
        shared = {id(tensor): tensor for tensor in (*part.parameters(), *part.buffers())}
        twin._modules[name] = copy.deepcopy(part, shared)
    return twin


def drawing_modules(twin: LatentDiffusion) -> list[nn.Module]:
    """All modules that are the twin's own."""
    return [module for name in _PARTS for module in twin.get_submodule(name).modules()]
