"""What the engine asks of a stage here: batches that the number of a step alone decides, and the losses of each row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flagai_altdiff.files import new_file
from flagai_altdiff.training.module import Load
from flagai_altdiff.training.objectives import Batch, Gather

Draw = Callable[[int], Mapping[str, Tensor]]
"""Number of a step -> its samples, each a row in every tensor."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage's part of the work; an :class:`~flagai_altdiff.training.objectives.Objective`.

    Args:
        model: What learns.
        draw: Draws the samples of a step.
        losses: Batch and what gathers rows of all processes -> (B,), the loss of each sample.
    """

    model: nn.Module
    draw: Draw
    losses: Callable[[Batch, Gather], Tensor]

    def __call__(self, batch: Batch, gather: Gather) -> Tensor:
        """Losses of the rows that this process has."""
        return self.losses(batch, gather)[: len(batch["position"])]

    def load(self) -> Load:
        """Every process draws the whole step and keeps its rows, so that their number changes nothing.

        One that has none computes the first, which does not count: the others wait for its gradients.
        """

        def load(first: int, rank: int, world: int) -> Iterator[Batch]:
            for step in itertools.count(first):
                drawn = self.draw(step)
                count = len(range(rank, len(next(iter(drawn.values()))), world))
                rows = {name: tensor[rank::world] if count else tensor[:1] for name, tensor in drawn.items()}
                yield {**rows, "position": torch.arange(count)}

        return load


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place of the one that may be there; a reader finds the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=True) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)
