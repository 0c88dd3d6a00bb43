"""Little memory: the weights of a model lie at home, and are where they work only while they do.

Home is the CPU, mostly pages of a file. Work is on the model's device: there weights are copies, in half precision
where the UNet computes in that; on the CPU itself they are the pages, which are let go afterwards.

Two ways: a part of the model at a time, which stays until another one's turn comes (``low``), or a layer at a time,
which leaves at once, while the next one's pages are read from the disk (``lowest``).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from flagai_altdiff.checkpoint.mapped import fetch, let_go
from flagai_altdiff.models import LatentDiffusion


@dataclass(kw_only=True)
class _Group:
    """What comes and goes together.

    Args:
        modules: Of the model, in the order in which they work.
        halves: Whether copies are in the precision of autocast.
        users: Calls that are at work in it.
        dtype: Precision of the copies; ``None`` is that of the weights.
        is_out: Whether it has been at work since it was sent home.
        homes: Weights that are away, and what they are at home.
    """

    modules: Sequence[nn.Module]
    halves: bool = False
    users: int = 0
    dtype: torch.dtype | None = None
    is_out: bool = False
    homes: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def bring(self, module: nn.Module, device: torch.device) -> None:
        """Copy weights of a module to where they work, unless they are there."""
        self.is_out = True
        for weight in _weights_of(module):
            dtype = self.dtype if self.dtype and weight.is_floating_point() else weight.dtype
            if not _is_at(weight.device, device) or weight.dtype != dtype:
                self.homes.append((weight, weight.data))
                weight.data = weight.data.to(device).to(dtype)  # cast there: the transfer needs no memory for that

    def send_home(self) -> None:
        """Drop the copies, and the pages that are mapped."""
        for weight, home in self.homes:
            weight.data = home
        self.homes.clear()
        self.is_out = False
        for weight in self.weights():
            if weight.device.type == "cpu":
                let_go(weight)

    def fetch(self) -> None:
        """Have the pages read that are mapped."""
        for weight in self.weights():
            if weight.device.type == "cpu":
                fetch(weight)

    def weights(self) -> Iterator[Tensor]:
        """All of them."""
        return (weight for module in self.modules for weight in _weights_of(module))


def _weights_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, which quantized layers have instead."""
    yield from module.parameters()
    yield from module.buffers()


class Keeper:
    """Brings weights to work, and home.

    Args:
        mode: ``"low"`` or ``"lowest"``.
        groups: In the order in which they work.
    """

    def __init__(self, mode: str, groups: Sequence[_Group]) -> None:
        self.mode = mode
        self.device = torch.device("cpu")
        self._groups = list(groups)
        self._lingers = mode == "low"
        self._lock = threading.RLock()

    def watch(self) -> None:
        """From now on, weights come when their modules are called."""
        for number, group in enumerate(self._groups):
            for module in group.modules:
                module.register_forward_pre_hook(partial(self._enter, number))
                module.register_forward_hook(partial(self._leave, number), always_call=True)

    def send_home(self) -> None:
        """Put back all weights that do not work at the moment."""
        with self._lock:
            self._send_home_all_but(None)

    def _send_home_all_but(self, one: _Group | None) -> None:
        for group in self._groups:
            if group is not one and group.is_out and not group.users:
                group.send_home()

    def _enter(self, number: int, module: nn.Module, _: object) -> None:
        """Of a twin of the module just as well: its weights are the same."""
        group = self._groups[number]
        with self._lock:
            if self._lingers:
                self._send_home_all_but(group)
            elif number + 1 < len(self._groups):
                self._groups[number + 1].fetch()
            dtype = _autocast_dtype(self.device) if group.halves else None
            if dtype != group.dtype and not group.users:
                group.send_home()
                group.dtype = dtype
            group.users += 1
            group.bring(module, self.device)

    def _leave(self, number: int, *_: object) -> None:
        group = self._groups[number]
        with self._lock:
            group.users -= 1
            if not group.users and not self._lingers:
                group.send_home()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # twins share weights, and so who keeps them

    def __getstate__(self) -> dict[str, Any]:
        self.send_home()
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())


def _is_at(place: torch.device, device: torch.device) -> bool:
    """Whether a place is a device, which may be one without a number, the first of its kind."""
    return place.type == device.type and (place.index or 0) == (device.index or 0)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The half precision that is computed in now, if one is."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def keep(model: LatentDiffusion, mode: str) -> None:
    """Have a model draw with little memory from now on; ``model.to(device)`` then says where.

    Args:
        model: On the CPU, its weights best mapped.
        mode: ``"low"`` or ``"lowest"``.
    """
    layers = ((modules, halves) for _, modules, halves in layers_of(model))
    groups = parts_of(model).values() if mode == "low" else layers
    keeper = Keeper(mode, [_Group(modules=modules, halves=halves) for modules, halves in groups])
    keeper.watch()
    model.keeper = keeper


@contextmanager
def weights_at_home_afterwards(model: LatentDiffusion) -> Iterator[None]:
    """Put a model's weights back when the block ends, those that no other thread works with."""
    try:
        yield
    finally:
        if model.keeper:
            model.keeper.send_home()


def parts_of(model: LatentDiffusion) -> dict[str, tuple[list[nn.Module], bool]]:
    """The parts of a model in the order in which they work, and whether they do in half precision."""
    vae = model.first_stage_model
    return {
        "text": ([model.cond_stage_model], False),
        "unet": ([model.model.diffusion_model], True),
        "vae": ([vae.encoder, vae.quant_conv, vae.post_quant_conv, vae.decoder], False),
    }


def layers_of(model: LatentDiffusion) -> Iterator[tuple[str, list[nn.Module], bool]]:
    """The same layer by layer, each with the name of its part; an encoder or decoder of images is one layer."""
    text, unet = model.cond_stage_model, model.model.diffusion_model
    heads = [getattr(text, name) for name in ("pre_LN", "transformation", "transformation_pre") if hasattr(text, name)]
    for layer in (text.roberta.embeddings, *text.roberta.encoder["layer"], *heads):  # type: ignore[misc]
        yield "text", [layer], False
    for layer in (unet.time_embed, *unet.input_blocks, unet.middle_block, *unet.output_blocks, unet.out):
        yield "unet", [layer], True
    for layer in parts_of(model)["vae"][0]:
        yield "vae", [layer], False
