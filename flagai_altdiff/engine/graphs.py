"""Parts of a model as graphs that a compiler makes: one for each part and shape, kept for all calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

from torch import Tensor, nn

from flagai_altdiff.models.autoencoder import AutoencoderKL

Graph = Callable[..., Tensor]
_KEPT = 2
"""Shapes of a part that are kept: at full size, each may take as much memory as the weights."""


class Decoder(nn.Module):
    """The autoencoder from the latent on, as a module of its own.

    Args:
        autoencoder: Whose modules it shares.
    """

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = autoencoder.post_quant_conv, autoencoder.decoder

    def forward(self, z: Tensor) -> Tensor:
        """(B, embed_dim, h, w) -> (B, 3, H, W)."""
        return self.decoder(self.post_quant_conv(z))


class Graphs:
    """The graphs of one model, made when they are first run, and again when the state of its part is another.

    Args:
        state: What of a part a graph is bound to; the part itself unless given.
    """

    def __init__(self, state: Callable[[nn.Module], object] = lambda part: part) -> None:
        self._state = state
        self._made: dict[tuple[Hashable, ...], tuple[object, Graph]] = {}
        self._lock = threading.Lock()

    def of(self, part: nn.Module, inputs: Sequence[Tensor], how: Hashable, make: Callable[[nn.Module], Graph]) -> Graph:
        """The graph of a part for inputs of these shapes.

        Args:
            part: The UNet, or the autoencoder, of which the decoder is taken.
            inputs: What it will be called with.
            how: What else tells it from others.
            make: Makes one.
        """
        key = (type(part), how, *((tensor.shape, tensor.dtype) for tensor in inputs))
        state = self._state(part)
        with self._lock:
            made = self._made.pop(key, None)
            if made is None or made[0] != state:
                self._make_room(type(part))
                made = state, make(Decoder(part) if isinstance(part, AutoencoderKL) else part)
            self._made[key] = made  # the newest is the last
            return made[1]

    def _make_room(self, kind: type) -> None:
        own = [key for key in self._made if key[0] is kind]
        for key in own[: max(len(own) - _KEPT + 1, 0)]:
            del self._made[key]


def weights_state(part: nn.Module) -> tuple[tuple[int, int], ...]:
    """Another value as soon as a weight of the part is another, or has been changed."""
    return tuple((weight.data_ptr(), weight._version) for weight in part.parameters())
