"""The processes of a run, before and beside what Lightning knows of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from flagai_altdiff.errors import ConfigError

_PAUSE_S = 0.2


def is_first() -> bool:
    """Whether this process is the first of all that torchrun, SLURM or Lightning started."""
    named = next((names for names in (("RANK",), ("NODE_RANK", "LOCAL_RANK")) if names[-1] in os.environ), None)
    return all(int(os.environ.get(name, 0)) == 0 for name in named or ("SLURM_PROCID",))


def started() -> int | None:
    """How many processes torchrun or SLURM's ``srun`` started; ``None`` where neither did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(os.environ["SLURM_NTASKS"])
    return None


def number() -> int:
    """Which of the processes this is that torchrun or ``srun`` started; 0 where neither did."""
    name = "RANK" if "TORCHELASTIC_RUN_ID" in os.environ else "SLURM_PROCID"
    return int(os.environ.get(name, 0)) if started() else 0


def check_started(devices: int, nodes: int, where: str = "") -> None:
    """Refuse what would be several runs in one folder, or wait for processes that nobody starts.

    Args:
        devices: Processes of a machine.
        nodes: Machines.
        where: What the message begins with.

    Raises:
        ConfigError: torchrun or SLURM started another number of processes.
    """
    there, expected = started(), devices * nodes
    if there not in (None, expected):
        raise ConfigError(
            f"{where}{there} processes were started, and devices={devices} times nodes={nodes} is {expected}. "
            "Let devices be the processes on a node, and nodes the number of nodes."
        )


def cluster_plugins() -> list[Any]:
    """What Lightning must be told of the cluster: SLURM's own way of going on knows nothing of ours."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def wait_until(ready: Callable[[], bool]) -> None:
    """Wait for what other processes are making; longer than a barrier would, whose time is limited."""
    while not ready():
        time.sleep(_PAUSE_S)


def meet() -> None:
    """Wait until all processes are here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
