"""The same numbers sooner on a processor: weights laid out once, less computed twice.

What it does differently from the model itself:

- 3x3 convolutions of stride 1 by minimal filtering (:mod:`.winograd`), others with weights in oneDNN's own layout,
  which it makes anew at every call otherwise;
- keys and values of the text once for a walk, not once for a step;
- both halves of guidance are one batch, and what comes before the first look at the text is computed once for both;
- what the time adds to all residual blocks in one product, once for a batch, as a part of their biases;
- sums and activations within the products that they follow, and layers with the same input as one;
- convolutions after an enlargement at the small size, unless they have very many channels.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.checkpoint.mapped import let_go
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.packed_attention import Context, as_many, transform_map, transform_tokens
from flagai_altdiff.engine.packed_layers import PackedConv, PackedLinear, PackedUpsample, normed
from flagai_altdiff.engine.twins import drawing_modules, made_of, twin_of
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.attention import BasicTransformerBlock, SpatialTransformer
from flagai_altdiff.models.autoencoder import ResnetBlock
from flagai_altdiff.models.layers import Upsample
from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.models.unet import OUTER, ResBlock, UNetModel, timestep_embedding

Shifts = dict[ResBlock, Tensor]
"""What the time adds to the channels of each residual block, (1 or N, C)."""


def _predict(unet: UNetModel) -> Callable[..., Tensor]:
    """Of the UNet: (n, C, h, w), (n,) and the context of N rows -> (N, C', h, w)."""
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    layers = [layer for block in blocks for layer in block.emb_layers if isinstance(layer, nn.Linear)]
    project, widths = PackedLinear(*layers), [layer.out_features for layer in layers]

    def forward(x: Tensor, timesteps: Tensor, context: Context, shortcuts: Shortcuts = NONE) -> Tensor:
        rows = len(context.states)
        if (timesteps == timesteps[0]).all():
            timesteps = timesteps[:1]
        else:
            x, timesteps = as_many(x, rows), as_many(timesteps, rows)
        emb = unet.time_embed(timestep_embedding(timesteps, unet.config.model_channels).to(x.dtype))
        parts = torch.split(project(F.silu(emb)), widths, dim=-1)  # type: ignore[no-untyped-call]
        shifts = dict(zip(blocks, parts, strict=True))
        x = x.contiguous(memory_format=torch.channels_last)
        merged = shortcuts.merged_tokens
        skips = []
        for block in [*unet.input_blocks][:OUTER]:
            x = block(x, shifts, context, merged)
            skips.append(x)
        x = shortcuts.inner(rows, lambda: _predict_inner(unet, x, shifts, context, merged))
        for block in [*unet.output_blocks][-OUTER:]:
            x = block(_beside(x, skips.pop()), shifts, context, merged)
        norm, _, conv = unet.out
        return conv(F.silu(norm(as_many(x, rows)), inplace=True))

    return forward


def _predict_inner(unet: UNetModel, x: Tensor, shifts: Shifts, context: Context, merged: float) -> Tensor:
    """What lies between the outer blocks, for all rows of the context."""
    skips = []
    for block in [*unet.input_blocks][OUTER:]:
        x = block(x, shifts, context, merged)
        skips.append(x)
    x = unet.middle_block(x, shifts, context, merged)
    for block in [*unet.output_blocks][:-OUTER]:
        x = block(_beside(x, skips.pop()), shifts, context, merged)
    return x


def _beside(x: Tensor, skip: Tensor) -> Tensor:
    """A map and one of the way down, whose rows may be fewer, channels beside channels."""
    return torch.cat([x, as_many(skip, len(x))], dim=1)


def _add(block: ResBlock) -> Callable[[Tensor, Shifts], Tensor]:
    """Of a residual block of the UNet."""
    (norm1, _, conv1), (norm2, _, _, conv2) = block.in_layers, block.out_layers

    def forward(x: Tensor, shifts: Shifts) -> Tensor:
        y, shift = F.silu(norm1(x), inplace=True), shifts[block]
        y = conv1(y, shift[0]) if len(shift) == 1 else conv1(y) + shift[:, :, None, None]
        return conv2(F.silu(norm2(y), inplace=True), None, block.skip_connection(x))

    return forward


def _add_to_picture(block: ResnetBlock, x: Tensor) -> Tensor:
    """Of a residual block of the autoencoder."""
    y = block.conv1(F.silu(block.norm1(x), inplace=True))
    shortcut = block.nin_shortcut(x) if hasattr(block, "nin_shortcut") else x
    return block.conv2(F.silu(block.norm2(y), inplace=True), None, shortcut)


def _packed(model: LatentDiffusion) -> LatentDiffusion:
    """A twin whose modules do all this."""
    twin = twin_of(model)
    for module in drawing_modules(twin):
        own = _own_way(module)
        if own is not None:
            module.forward = own  # type: ignore[method-assign, assignment]
    return twin


def _own_way(module: nn.Module) -> Callable[..., Tensor] | None:
    match module:
        case nn.Linear():
            return PackedLinear(module)
        case nn.Conv2d(kernel_size=(1, 1)):
            return PackedLinear(module).of_map
        case nn.Conv2d():
            return PackedConv(module)
        case Upsample():
            return PackedUpsample(module.conv)
        case nn.GroupNorm():
            return partial(normed, module)
        case UNetModel():
            return _predict(module)
        case ResBlock():
            return _add(module)
        case ResnetBlock():
            return partial(_add_to_picture, module)
        case SpatialTransformer():
            return transform_map(module)
        case BasicTransformerBlock():
            return transform_tokens(module)
    return None


_twins: weakref.WeakKeyDictionary[LatentDiffusion, tuple[tuple[int, ...], LatentDiffusion]] = (
    weakref.WeakKeyDictionary()
)
"""Packed once for all calls that draw with a model, as long as it is made of the same."""


_twins_lock = threading.Lock()


def _twin(model: LatentDiffusion) -> LatentDiffusion:
    made = made_of(model)
    with _twins_lock:
        if model not in _twins or _twins[model][0] != made:
            _twins[model] = made, _packed(model)
        return _twins[model][1]


def is_packed(model: LatentDiffusion) -> bool:
    """Whether a model's weights were laid out already."""
    return model in _twins


class PackedEngine(EagerEngine):
    """Runs a model on the processor, from weights that are laid out for it.

    Args:
        model: The model; float32, on the CPU. What is changed of it later is seen.
    """

    _contexts: list[tuple[Tensor, Context]]

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__(_twin(model))
        self._contexts = []

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D); weights that are pages of a file go afterwards, as the packed ones need their room."""
        states = super().encode_text(token_ids)
        for weight in self.model.cond_stage_model.parameters():
            let_go(weight)
        return states

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), (n B, L, D) -> (n B, C, h, w)."""
        return self.model.model.diffusion_model(x, t, self._context(cond), shortcuts).float()

    def _context(self, states: Tensor) -> Context:
        """What was made of the same states before; of a few at most."""
        for known, context in self._contexts:
            if known is states:
                return context
        self._contexts = [*self._contexts[-_CONTEXTS + 1 :], (states, Context(states))]
        return self._contexts[-1][1]


_CONTEXTS = 8
