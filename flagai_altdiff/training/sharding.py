"""What learns in pieces, one in each process: FSDP for ``StageTraining``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from flagai_altdiff.errors import ConfigError


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this process may have a piece: equal numbers of rows, but for the last process; then
    all processes must ask for it.

    Its own ``full_tensor`` waits by other means, in which a process on CPUs once died.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    piece, world = tensor.to_local(), tensor.device_mesh.size()
    padded = piece.new_zeros(-(-len(tensor) // world), *tensor.shape[1:])
    padded[: len(piece)] = piece
    rows = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(rows, padded, group=tensor.device_mesh.get_group())
    return torch.cat(rows)[: len(tensor)]


def own(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def piece_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have whole, cut as another one is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor.to(own(other)), other.device_mesh, other.placements, src_data_rank=None)


@contextmanager
def in_place_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the block with other tensors as the parameters with their names."""
    before = {name: model.get_parameter(name) for name in tensors}
    try:
        _put(model, {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()})
        yield
    finally:
        _put(model, before)


def make_whole(model: nn.Module, names: Mapping[str, object]) -> None:
    """Have the parameters with these names whole in each process, for good."""
    _put(model, {name: nn.Parameter(whole(model.get_parameter(name).detach())) for name in names})


def _put(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        place, _, leaf = name.rpartition(".")
        model.get_submodule(place)._parameters[leaf] = parameter


class Sharded(DDPStrategy):
    """Each process has a piece of every weight that learns, of its gradient, its moments and its average.

    For a step the weights are gathered whole, and go again after it. What does not learn is whole everywhere. A saved
    state is the same as one process's, so that a run may go on with another strategy, or another number of processes.

    **Source**: Rajbhandari et al. 2020 (arXiv 1910.02054); Zhao et al. 2023 (arXiv 2304.11277).
    """

    _kind: type | None = None

    def configure_ddp(self) -> None:
        """Cut what learns into pieces."""
        training: Any = self.lightning_module
        scalars = [name for name, parameter in training.trainable.items() if not parameter.ndim]
        if scalars:
            raise ConfigError(
                f"machine.strategy=fsdp cannot cut {scalars[0]}, a single number; leave it out, or use ddp."
            )
        self._kind = type(training)
        frozen = {parameter for parameter in training.parameters() if not parameter.requires_grad}
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        fully_shard(training, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
        register_fsdp_forward_method(training, "training_step")
        training.was_cut()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Of one process's optimizer."""
        state: dict[str, Any] = tree_map(
            lambda value: whole(value) if isinstance(value, Tensor) else value, super().optimizer_state(optimizer)
        )
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This process's pieces of it."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            pieces = {
                number: {name: piece_like(value, parameters[number]) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": pieces})

    def teardown(self) -> None:
        """Let the pieces go; the module, whole again, is of its own class again."""
        self.optimizers = []
        if self._kind is not None:
            self.lightning_module.__class__ = self._kind
        super().teardown()
