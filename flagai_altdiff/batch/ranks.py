"""Lightning's predict loop for processes that owe each other nothing: none waits for another, or ends with it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import ParallelStrategy

from flagai_altdiff.errors import ConfigError
from flagai_altdiff.training.processes import cluster_plugins


class Independent(ParallelStrategy):
    """Processes that have a number, and no connection: the work is divided by their numbers alone.

    Their numbers are those of torchrun, SLURM, or what else Lightning knows of. A process that dies takes nothing with
    it: the others neither hear of it nor wait for it.

    Args:
        device: Of this process.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self.num_nodes = 1

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self._device

    def set_world_ranks(self) -> None:
        """Tell Lightning's own environment, which starts no processes here, how many there are."""
        if self.cluster_environment is not None:
            each = len(self.parallel_devices or [self._device])
            self.cluster_environment.set_global_rank(self.node_rank * each + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * each)

    def model_to_device(self) -> None:
        """The model was loaded where it is to be."""

    def barrier(self, name: str | None = None) -> None:
        """Wait for nobody."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What this process has."""
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """What this process has."""
        return tensor

    def all_gather(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """What this process has."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """What this process decides."""
        return decision

    def teardown(self) -> None:
        """Leave the model where it is."""


def make_trainer(device: torch.device, devices: int, nodes: int) -> Trainer:
    """What runs the loop in this process.

    Args:
        device: Of this process.
        devices: Processes of a machine.
        nodes: Machines.

    Raises:
        ConfigError: There are not so many devices, or torchrun or SLURM started another number of processes.
    """
    try:
        trainer = Trainer(
            accelerator=device.type,
            devices=devices,
            num_nodes=nodes,
            strategy=Independent(device),
            plugins=cluster_plugins() or None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            inference_mode=False,
            use_distributed_sampler=False,
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"--devices {devices} --nodes {nodes}: {str(error).splitlines()[0]}") from error
    if trainer.global_rank >= trainer.world_size:
        expected = f"there are {devices} x {nodes} processes; expected one from 0 to {trainer.world_size - 1}"
        raise ConfigError(f"this is process {trainer.global_rank}, by LOCAL_RANK and NODE_RANK: {expected}")
    return trainer


def quiet() -> None:
    """Silence what Lightning says of every program that is no training."""
    for harmless in (".*does not have many workers.*", ".*does not define.*", ".*is deprecated.*"):
        warnings.filterwarnings("ignore", harmless)
