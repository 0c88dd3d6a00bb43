"""The same numbers sooner on a processor: weights laid out once, less computed twice.

What it does differently from the model itself:

- 3x3 convolutions of stride 1 by minimal filtering (:mod:`.winograd`), others with weights in oneDNN's own layout,
  which it makes anew at every call otherwise;
- keys and values of the text once for a walk, not once for a step;
- both halves of guidance are one batch, and what comes before the first look at the text is computed once for both;
- the time embedding once for a batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flagai_altdiff.checkpoint.mapped import let_go
from flagai_altdiff.engine.eager import EagerEngine
from flagai_altdiff.engine.twins import drawing_modules, made_of, twin_of
from flagai_altdiff.engine.winograd import Filtering, convolve, filtering
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.attention import BasicTransformerBlock, CrossAttention, SpatialTransformer
from flagai_altdiff.models.quantized import kept
from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.models.tokens import Merging
from flagai_altdiff.models.unet import OUTER, UNetModel, timestep_embedding

_FEWEST_CHANNELS, _FEWEST_NUMBERS = 128, 128 * 16 * 16
"""With fewer channels, or pixels times channels, minimal filtering does not pay."""
_WIDE_CHANNELS = 640
"""With more, kernels of the larger tile take too much memory: four times the plain ones."""


class _Weights:
    """A layer's weights, laid out when they are first asked for, and again when they have changed.

    Args:
        layer: Its weights are read only, and stay the model's.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self._layer = layer
        self._laid_out: dict[Filtering | None, Tensor] = {}
        self._state: object = None
        self._lock = threading.Lock()

    def get(self, lay_out: Callable[[Tensor], Tensor], form: Filtering | None = None) -> Tensor:
        """In one form of several."""
        stored = kept(self._layer)
        state = (stored.data_ptr(), stored._version, stored.shape)
        with self._lock:
            if self._state != state:
                self._laid_out, self._state = {}, state
            if form not in self._laid_out:
                self._laid_out[form] = lay_out(self._layer.weight.detach())
                let_go(stored)
            return self._laid_out[form]


class PackedConv:
    """A convolution with weights laid out for it.

    The way of computing depends on the size of its input alone, so that a result never depends on what ran before.

    Args:
        conv: The model's.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self._conv, self._weights = conv, _Weights(conv)
        self._form = _form_of(conv)
        self._fewest_pixels = _FEWEST_NUMBERS // min(conv.in_channels, conv.out_channels)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H', W'), its channels together."""
        conv, form = self._conv, self._form
        if form is not None and x.shape[2] * x.shape[3] >= self._fewest_pixels:
            return convolve(x, self._weights.get(form.transformed, form), conv.bias, form)
        x = x.contiguous(memory_format=torch.channels_last)
        how: tuple[object, ...] = (conv.padding, conv.stride, conv.dilation, conv.groups, "none", [], "")
        return torch.ops.mkldnn._convolution_pointwise(x, self._weights.get(self._lay_out), conv.bias, *how)

    def _lay_out(self, weight: Tensor) -> Tensor:
        conv = self._conv
        return torch._C._nn.mkldnn_reorder_conv2d_weight(
            weight.to_mkldnn(), list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        )


class PackedLinear:
    """A linear layer, or a convolution of 1x1, with weights laid out for it.

    Args:
        layer: The model's.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self._layer, self._weights = layer, _Weights(layer)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., K)."""
        packed = self._weights.get(_laid_out)
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, self._layer.bias, "none", [], "")

    def mix_channels(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, K, H, W), its channels together."""
        return self(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _laid_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.flatten(1), None)


def _form_of(conv: nn.Conv2d) -> Filtering | None:
    """The way of minimal filtering that suits a convolution, if any does."""
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    widths = (conv.in_channels, conv.out_channels)
    if not plain or min(widths) < _FEWEST_CHANNELS:
        return None
    return filtering(4 if max(widths) <= _WIDE_CHANNELS else 2)


class Context:
    """Text states with the keys and values that attention made of them.

    Args:
        states: (B, L, D).
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self._made: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keys_and_values(self, attention: CrossAttention) -> tuple[Tensor, Tensor]:
        """Of one attention, (B, heads, L, d) each."""
        if attention not in self._made:
            self._made[attention] = (
                _by_head(attention.to_k(self.states), attention.heads),
                _by_head(attention.to_v(self.states), attention.heads),
            )
        return self._made[attention]


def _by_head(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def _as_many(x: Tensor, like: Tensor) -> Tensor:
    """A batch repeated until it is as large as another."""
    return x if len(x) == len(like) else x.repeat(len(like) // len(x), *[1] * (x.ndim - 1))


# What modules of the twin do in place of their own forward; rows of x may be fewer than those of the context.


def _look_at(attention: CrossAttention, x: Tensor, context: Context) -> Tensor:
    keys, values = context.keys_and_values(attention)
    queries = _as_many(_by_head(attention.to_q(x), attention.heads), keys)
    found = F.scaled_dot_product_attention(queries, keys, values)
    return attention.to_out(rearrange(found, "b h n d -> b n (h d)"))


def _transform(block: BasicTransformerBlock, x: Tensor, context: Context, merging: Merging | None) -> Tensor:
    x = x + block.attend_to_itself(x, merging)
    seen = block.attn2(block.norm2(x), context)
    x = _as_many(x, seen) + seen
    return x + block.ff(block.norm3(x))


def _transform_map(transformer: SpatialTransformer, x: Tensor, context: Context, merged_tokens: float) -> Tensor:
    height = x.shape[2]
    merging = transformer.merging(x, merged_tokens)
    y = transformer.norm(x)
    if not transformer.use_linear:
        y = transformer.proj_in(y)
    y = rearrange(y, "b c h w -> b (h w) c")
    if transformer.use_linear:
        y = transformer.proj_in(y)
    for block in transformer.transformer_blocks:
        y = block(y, context, merging)
    if transformer.use_linear:
        y = transformer.proj_out(y)
    y = rearrange(y, "b (h w) c -> b c h w", h=height)
    if not transformer.use_linear:
        y = transformer.proj_out(y)
    return _as_many(x, y) + y


def _predict(unet: UNetModel, x: Tensor, timesteps: Tensor, context: Context, shortcuts: Shortcuts = NONE) -> Tensor:
    if (timesteps == timesteps[0]).all():
        timesteps = timesteps[:1]
    else:
        x, timesteps = _as_many(x, context.states), _as_many(timesteps, context.states)
    emb = unet.time_embed(timestep_embedding(timesteps, unet.config.model_channels).to(x.dtype))
    x = x.contiguous(memory_format=torch.channels_last)
    merged = shortcuts.merged_tokens
    skips = []
    for block in [*unet.input_blocks][:OUTER]:
        x = block(x, emb, context, merged)
        skips.append(x)
    x = shortcuts.inner(len(context.states), lambda: _predict_inner(unet, x, emb, context, merged))
    for block in [*unet.output_blocks][-OUTER:]:
        x = block(torch.cat([x, _as_many(skips.pop(), x)], dim=1), emb, context, merged)
    return unet.out(_as_many(x, context.states))


def _predict_inner(unet: UNetModel, x: Tensor, emb: Tensor, context: Context, merged: float) -> Tensor:
    """What lies between the outer blocks, for all rows of the context."""
    skips = []
    for block in [*unet.input_blocks][OUTER:]:
        x = block(x, emb, context, merged)
        skips.append(x)
    x = unet.middle_block(x, emb, context, merged)
    for block in [*unet.output_blocks][:-OUTER]:
        x = block(torch.cat([x, _as_many(skips.pop(), x)], dim=1), emb, context, merged)
    return x


def _packed(model: LatentDiffusion) -> LatentDiffusion:
    """A twin whose modules do all this."""
    twin = twin_of(model)
    for module in drawing_modules(twin):
        own = next(_own_ways(module), None)
        if own is not None:
            module.forward = own  # type: ignore[method-assign, assignment]
    return twin


def _own_ways(module: nn.Module) -> Iterator[object]:
    if isinstance(module, nn.Linear):
        yield PackedLinear(module)
    elif isinstance(module, nn.Conv2d):
        yield PackedLinear(module).mix_channels if module.kernel_size == (1, 1) else PackedConv(module)
    elif isinstance(module, UNetModel):
        yield partial(_predict, module)
    elif isinstance(module, SpatialTransformer):
        yield partial(_transform_map, module)
    elif isinstance(module, BasicTransformerBlock):
        module.attn2.forward = partial(_look_at, module.attn2)  # type: ignore[method-assign]
        yield partial(_transform, module)


_twins: weakref.WeakKeyDictionary[LatentDiffusion, tuple[tuple[int, ...], LatentDiffusion]] = (
    weakref.WeakKeyDictionary()
)
"""Packed once for all calls that draw with a model, as long as it is made of the same."""


def _twin(model: LatentDiffusion) -> LatentDiffusion:
    made = made_of(model)
    if model not in _twins or _twins[model][0] != made:
        _twins[model] = made, _packed(model)
    return _twins[model][1]


class PackedEngine(EagerEngine):
    """Runs a model on the processor, from weights that are laid out for it.

    Args:
        model: The model; float32, on the CPU. What is changed of it later is seen.
    """

    _contexts: list[tuple[Tensor, Context]]

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__(_twin(model))
        self._contexts = []

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
