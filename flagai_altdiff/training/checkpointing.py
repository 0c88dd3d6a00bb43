"""Activations that are not kept for the backward pass but computed again: time for memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from flagai_altdiff.models.text_encoder import Layer
from flagai_altdiff.models.unet import Block

_BLOCKS = (Block, Layer)


@contextmanager
def computed_twice(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Keep only what goes into the blocks of UNet and text encoder, not what is computed within them.

    Args:
        model: Has such blocks; its parameters stay as they are and keep their names.
        wanted: Whether to do anything at all.

    **Source**: Chen et al. 2016 (arXiv 1604.06174).
    """
    blocks = [module for module in model.modules() if isinstance(module, _BLOCKS)] if wanted else []
    for block in blocks:  # nothing random happens in them: every dropout of these models is 0
        again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
