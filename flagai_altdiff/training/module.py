"""A stage under Lightning: what learns, its optimizer and averages, its loss in any number of processes."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flagai_altdiff.errors import ConfigError, DataError, NotFiniteError, shown
from flagai_altdiff.models.ema import LitEma
from flagai_altdiff.training.config import StageSettings
from flagai_altdiff.training.muon import Muon, matrices_of
from flagai_altdiff.training.objectives import Batch, Objective, text_learns
from flagai_altdiff.training.sharding import in_place_of, make_whole, piece_like, whole

logger = logging.getLogger(__name__)

FIRST_LEARNING_RATE = 1e-9
Load = Callable[[int, int, int], Iterable[Batch]]


def trainable_names(model: nn.Module, pattern: str) -> set[str]:
    """The names of parameters that a pattern fits, from their beginning.

    Raises:
        ConfigError: There are none, or it is no pattern.
    """
    try:
        learns = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"trainable={shown(pattern)} is no pattern: {error}.") from error
    found = {name for name, _ in model.named_parameters() if learns.match(name)}
    if not found:
        raise ConfigError(f"trainable={shown(pattern)}: no parameter of the model has such a name.")
    return found


def choose_trainable(model: nn.Module, pattern: str) -> dict[str, nn.Parameter]:
    """Have the parameters of :func:`trainable_names` learn, and no others; errors as there."""
    names = trainable_names(model, pattern)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


class StageTraining(LightningModule):
    """One stage. What does not learn is bit for bit the same afterwards, and no part of a saved state.

    Args:
        objective: Has the model, and computes the losses of a batch.
        settings: Of the stage.
        load: First step, rank, number of processes -> that process's share of all batches from there on, without end;
            for each step as many as are accumulated.
        data: Digest of what positions mean, as of ``Layout``; it must be the same in all processes.
    """

    def __init__(self, objective: Objective, settings: StageSettings, load: Load, data: str = "") -> None:
        super().__init__()
        self.objective, self.settings, self._load, self._data = objective, settings, load, data
        self.model = objective.model
        self.trainable = choose_trainable(self.model, settings.pattern)
        decay = settings.row.ema_decay
        self.average = LitEma(self.model, decay) if decay else None
        self._step_loss = torch.zeros(())
        self._is_cut = False
        self._batches = _in_steps((), 1)

    @property
    def spares_some(self) -> bool:
        """Whether the loss may hang on some of what learns only: of a text encoder, each read-out leaves out a part."""
        return self.settings.row.kind != "diffusion" or text_learns(self.settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what a run that goes on must have, or should."""
        checkpoint |= self._noted

    @property
    def _noted(self) -> dict[str, Any]:
        row = self.settings.row
        return {"data": self._data, "batch_size": row.batch_size, "optimizer": self.settings.optimizer}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell of what is other than before, with which the run goes on otherwise than it would have.

        Raises:
            ConfigError: With another optimizer it cannot go on.
        """
        changed = {name for name, value in self._noted.items() if checkpoint.get(name, value) != value}
        if "optimizer" in changed:
            raise ConfigError(f"the saved state is of another optimizer: {checkpoint['optimizer']}")
        if "data" in changed:
            logger.warning("the data are not those that this stage began with: from here on it is another run")
        if "batch_size" in changed:
            was = checkpoint["batch_size"]
            logger.warning("this stage began with batch_size %d: it goes on elsewhere in the data", was)

    def on_train_start(self) -> None:
        """Have a run that goes on learn as its config says now, which may not be what it said at first."""
        row = self.settings.row
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(scheduler, LambdaLR)
        scheduler.base_lrs = [row.learning_rate for _ in scheduler.base_lrs]
        rate = row.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
        for group in scheduler.optimizer.param_groups:
            group |= {"lr": rate, "initial_lr": row.learning_rate, "weight_decay": row.weight_decay}
            group["betas"] = (0.9, self.settings.beta2)
        if self.average is not None:
            self.average.decay.fill_(row.ema_decay)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A batch's part of the step's loss, so that its gradients add up to those of the mean over all samples."""
        losses = self.objective(batch, self._gather)
        good = self._sum(torch.tensor(float(batch["good"]), device=self.device)).clamp(min=1)
        part = losses.sum() / good
        before = self._step_loss if batch["part"] else torch.zeros_like(part)
        self._step_loss = before.to(part.device) + self._sum(part.detach())
        if not self._step_loss.isfinite():
            raise NotFiniteError(f"the loss of step {self.global_step + 1} is {float(self._step_loss)}")
        self.log("loss", self._step_loss, logger=False, batch_size=1)  # LossLog writes it
        # Lightning divides by the accumulated batches, and takes the mean over the processes.
        return part * (self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimizer, which the averaged weights follow."""
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.follow(self.trainable)

    def train_dataloader(self) -> Iterable[Batch]:
        """The batches of this process from the step on at which the run stands.

        Raises:
            DataError: The processes see different data, of which their shares would not be all, and each once.
        """
        number = torch.tensor(int(self._data[:12] or "0", 16), device=self.device)
        if len(set(torch.as_tensor(self.all_gather(number)).flatten().tolist())) > 1:
            raise DataError(
                "the processes see different data; data.source must be the same, on a disk that they share."
            )
        batches = self._load(self.global_step, self.global_rank, self.trainer.world_size)
        self._batches = _in_steps(batches, self.trainer.accumulate_grad_batches)
        return self._batches

    def let_go_of_data(self) -> None:
        """End the processes that read them."""
        self._batches.close()

    def configure_optimizers(self) -> Any:
        """The optimizer, its learning rate warmed up from almost nothing, then constant or falling to nothing."""
        row, decay = self.settings.row, self.settings.decay
        optimizer = self._optimizer(row.learning_rate, (0.9, self.settings.beta2), row.weight_decay)

        def factor(step: int) -> float:
            if step < row.warmup_steps:
                first = FIRST_LEARNING_RATE / max(row.learning_rate, FIRST_LEARNING_RATE)
                return first + (1 - first) * step / row.warmup_steps
            if decay == "constant":
                return 1.0
            done = (step - row.warmup_steps) / max(row.steps - row.warmup_steps, 1)
            share = (1 + math.cos(math.pi * min(done, 1.0))) / 2
            return self.settings.final_rate + (1 - self.settings.final_rate) * share

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def _optimizer(self, lr: float, betas: tuple[float, float], weight_decay: float) -> Optimizer:
        if self.settings.optimizer == "muon":
            names = matrices_of(self.model)
            matrices = [parameter for name, parameter in self.trainable.items() if name in names]
            others = [parameter for name, parameter in self.trainable.items() if name not in names]
            return Muon(matrices, others, lr, betas=betas, weight_decay=weight_decay)
        fused = self.trainer.precision == "32-true" or None  # Lightning clips no gradients of a fused one otherwise
        parameters = list(self.trainable.values())
        return torch.optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What has been learnt, under the model's names, and the averaged weights."""
        averages = self.average.state_dict() if self.average is not None else {}
        learnt = {f"model.{name}": whole(parameter.detach()) for name, parameter in self.trainable.items()}
        return {**learnt, **{f"average.{name}": whole(value) for name, value in averages.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        """Take up what :meth:`state_dict` gave.

        Raises:
            ConfigError: It is of something else.
        """
        own = self.state_dict()
        differ = own.keys() ^ state_dict.keys()
        differ |= {name for name in own.keys() & state_dict.keys() if own[name].shape != state_dict[name].shape}
        if differ:
            expected = "go on with trainable, rank and ema_decay as they were, or begin in another folder"
            text = f"the saved state is of another stage: {len(differ)} names or sizes differ, {min(differ)!r} for one"
            raise ConfigError(f"{text}; {expected}.")
        nn.Module.load_state_dict(self, state_dict, strict=False)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run the block with the averaged weights, if there are any, in place of the trained ones.

        All processes must come here, in any of which the model then is whole.
        """
        if self._is_cut:
            best = self.average.copies() if self.average is not None else self.trainable
            with in_place_of(self.model, {name: whole(value.detach()) for name, value in best.items()}):
                yield
            return
        if self.average is None:
            yield
            return
        with self.average.in_place_of_parameters(self.model):
            yield

    def was_cut(self) -> None:
        """Take note that the parameters have become pieces, as the averages then must be."""
        self._is_cut = True
        self.trainable = {name: self.model.get_parameter(name) for name in self.trainable}
        if self.average is not None:
            cut = self.average.copies().items()
            self.average.take({name: piece_like(copy, self.trainable[name]) for name, copy in cut})

    def on_train_end(self) -> None:
        """Have what was cut whole again."""
        if not self._is_cut:
            return
        make_whole(self.model, self.trainable)
        self.trainable = {name: self.model.get_parameter(name) for name in self.trainable}
        if self.average is not None:
            self.average.take({name: whole(copy) for name, copy in self.average.copies().items()})
        self._is_cut = False

    def take_average(self) -> None:
        """Put the averaged weights, if there are any, in the place of the trained ones, for good."""
        if self.average is not None:
            self.average.copy_to(self.model)
            self.average = None

    def _sum(self, value: Tensor) -> Tensor:
        total: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[assignment]
        return total

    def _gather(self, value: Tensor) -> tuple[Tensor, int]:
        """Rows of all processes, in their order, and where this one's begin; each may have another number of them."""
        if self.trainer.world_size == 1:
            return value, 0
        counts = torch.as_tensor(self.all_gather(torch.tensor(len(value), device=value.device))).tolist()
        padded = torch.cat([value, value.new_zeros(max(counts) - len(value), *value.shape[1:])])
        rows: Tensor = self.all_gather(padded, sync_grads=value.requires_grad)  # type: ignore[assignment]
        found = torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])
        return found, sum(counts[: self.global_rank])


def _in_steps(batches: Iterable[Batch], parts: int) -> Generator[Batch, None, None]:
    """Batches that know which part of their step they are, and how many good samples the whole step has here."""
    source = iter(batches)
    while step := list(itertools.islice(source, parts)):
        good = sum(len(batch["position"]) for batch in step)
        yield from ({**batch, "part": part, "good": good} for part, batch in enumerate(step))
