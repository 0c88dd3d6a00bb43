"""The training loop of every stage: schedule by step count, resumable, files replaced only when whole."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from tqdm import tqdm

from flagai_altdiff.errors import TrainingInterrupted
from flagai_altdiff.files import new_file
from flagai_altdiff.mini.recipe.stages import Stage

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")

StepLoss = Callable[[int], tuple[Tensor, dict[str, float]]]
"""Number of a batch -> loss to minimise and further numbers for the log. Draws its data from the number alone."""


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in place of the one that may be there; a reader finds the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=True) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, metadata)


def select_trainable(module: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Freeze every parameter whose name does not start with a match of ``pattern``.

    Args:
        module: What to train.
        pattern: Regular expression.

    Returns:
        The parameters that stay trainable, by name.
    """
    chosen: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(re.match(pattern, name) is not None)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def rate_at(stage: Stage, step: int) -> float:
    """Learning rate of a step: linear warm-up, then a half cosine."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.learning_rate * (stage.final_rate + (1 - stage.final_rate) * 0.5 * (1 + math.cos(math.pi * done)))


class TrainingState:
    """State of one stage: weights, moments of the optimiser, running average, step.

    Args:
        name: Name of the stage; names its files in the work folder.
        stage: The stage.
        module: What to train; its weights are changed in place.
        work: Folder of the run.
        shard: Which of the stage's shards this process computes; the first one writes the files.
    """

    def __init__(self, name: str, stage: Stage, module: nn.Module, work: Path, shard: int = 0) -> None:
        self.stage, self.module, self.step, self.shard = stage, module, 0, shard
        self.log_path = work / "log.jsonl"
        self.state_path = work / f"{name}.state.safetensors"
        self.name = name
        self.parameters = select_trainable(module, stage.trains)
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay
        )
        self.average = {n: p.detach().clone() for n, p in self.parameters.items()} if stage.ema else {}

    def save(self) -> None:
        """Write the state."""
        if self.shard:
            return
        tensors = {f"weights.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"average.{n}": p for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{moment}.{name}": self.optimiser.state[parameter][moment] for moment in MOMENTS}
        save_whole(tensors, self.state_path, {"step": str(self.step)})

    def resume(self) -> None:
        """Read the state, if there is one."""
        if not self.state_path.exists():
            return
        with safe_open(self.state_path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(self.state_path)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weights.{name}"])
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{moment: tensors[f"{moment}.{name}"] for moment in MOMENTS},
                }
                if self.average:
                    self.average[name].copy_(tensors[f"average.{name}"])
        logger.info("%s: resumed at step %d", self.name, self.step)

    def update(self, step_loss: StepLoss) -> dict[str, float]:
        """Take one step.

        Returns:
            Loss, gradient norm and the stage's own numbers.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = rate_at(self.stage, self.step)
        loss, numbers = step_loss(self.step * self.stage.shards + self.shard)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        for parameter, gradient in zip(self.parameters.values(), self._mean_over_shards(gradients), strict=True):
            parameter.grad = gradient
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimiser.step()
        self.step += 1
        decay = min(self.stage.ema, (1 + self.step) / (10 + self.step))
        if self.average:
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - decay)
        return {"loss": loss.item(), "grad_norm": norm.item(), **numbers}

    def _mean_over_shards(self, gradients: tuple[Tensor, ...]) -> Sequence[Tensor]:
        if self.stage.shards == 1:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        pieces = torch.split(flat.div_(self.stage.shards), [gradient.numel() for gradient in gradients])
        return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]

    def must_stop(self, deadline: float) -> bool:
        """Whether the deadline has come for any of the shards, so that all stop at the same step."""
        late = torch.tensor(float(time.time() > deadline))
        if self.stage.shards > 1:
            distributed.all_reduce(late)
        return bool(late > 0)

    def use_average(self) -> None:
        """Exchange the weights and their running average."""
        with torch.no_grad():
            for name, averaged in self.average.items():
                current = self.parameters[name].detach().clone()
                self.parameters[name].copy_(averaged)
                averaged.copy_(current)

    def log(self, numbers: dict[str, float]) -> None:
        """Append a line to the log file of the run."""
        if self.shard:
            return
        short = {key: float(f"{value:.5g}") for key, value in numbers.items()}
        line = {"stage": self.name, "step": self.step, "time": round(time.time(), 1), **short}
        with self.log_path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        logger.info("%s %d/%d: %s", self.name, self.step, self.stage.steps, shown)


def train(
    state: TrainingState,
    step_loss: StepLoss,
    *,
    deadline: float = math.inf,
    log_every: int = 50,
    save_every: int = 300,
    look: Callable[[], dict[str, float]] | None = None,
    look_every: int = 0,
) -> None:
    """Train a stage to its last step, from where its saved state left off.

    Args:
        state: The stage's state. At the end its module holds the result (the running average, where there is one).
        step_loss: Loss of one step.
        deadline: Time (of ``time.time()``) at which to stop and save.
        log_every: Steps between log lines; each holds means over its steps.
        save_every: Steps between saved states.
        look: Measures the averaged weights.
        look_every: Steps between looks; 0 for none.

    Raises:
        TrainingInterrupted: The deadline came first.
    """
    state.resume()
    sums: dict[str, float] = {}
    counted, since = 0, time.time()
    bar = tqdm(
        total=state.stage.steps,
        initial=state.step,
        desc=state.name,
        disable=bool(state.shard) or not sys.stderr.isatty(),
    )
    with bar:
        while state.step < state.stage.steps:
            for key, value in state.update(step_loss).items():
                sums[key] = sums.get(key, 0.0) + value
            counted += 1
            bar.update()
            if state.step % log_every == 0:
                seconds = (time.time() - since) / counted
                state.log({key: value / counted for key, value in sums.items()} | {"seconds": seconds})
                sums, counted, since = {}, 0, time.time()
            if state.step % save_every == 0:
                state.save()
            if look is not None and not state.shard and look_every and state.step % look_every == 0:
                state.use_average()
                state.log(look())
                state.use_average()
                since = time.time()
            if state.step < state.stage.steps and state.must_stop(deadline):
                state.save()
                raise TrainingInterrupted(
                    f"{state.name}: stopped at step {state.step} of {state.stage.steps}; run again to go on"
                )
    state.use_average()
