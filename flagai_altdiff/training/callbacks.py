"""What happens beside the training: states on disk, the log, sheets of images, the bar, and stopping."""

from __future__ import annotations

import csv
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from flagai_altdiff.errors import DiskError, NotFiniteError
from flagai_altdiff.files import new_file
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.training.sharding import own

logger = logging.getLogger(__name__)

STATES, STATE_PATTERN = "step-*.ckpt", "step-{:08d}.ckpt"
KEPT_STATES = 2


def latest_state(folder: Path) -> Path | None:
    """The newest state of a stage; ``None`` if there is none."""
    return max(folder.glob(STATES), default=None)


def ends_step(trainer: Trainer) -> bool:
    """Whether the batch at hand is the last of those whose gradients are added up for a step."""
    return (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0


class StateFiles(TorchCheckpointIO):
    """Writes a state whole or not at all, and keeps the newest two.

    Attributes:
        problem: Why the last one could not be written, for a ``DiskError``, or ``None``. It is not raised there: the
            other processes are waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.problem: tuple[str, int | None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """As Lightning asks for it, in the first process."""
        target, self.problem = Path(path), None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in target.parent.glob(f".{STATES}.*.tmp"):
                abandoned.unlink()
            with new_file(target, replace=True) as unfinished:
                torch.save(checkpoint, unfinished)
            for old in sorted(target.parent.glob(STATES))[:-KEPT_STATES]:
                old.unlink()
        except (OSError, RuntimeError) as error:  # torch says of a full disk that a stream failed
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            text = f"{target} cannot be saved: {reason}. The states before it are whole; make room and go on."
            self.problem = text, getattr(error, "errno", None)


class SaveStates(Callback):
    """Saves the whole state of the run every so many steps, at the end, and before it is stopped.

    Args:
        folder: Of the states.
        every: Steps.
        files: Writes them.
    """

    def __init__(self, folder: Path, every: int, files: StateFiles) -> None:
        self._folder, self._every, self._files = folder, every, files

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save, if it is time."""
        step = trainer.global_step
        if ends_step(trainer) and (step % self._every == 0 or step == trainer.max_steps or trainer.should_stop):
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save the state under its step's number; all processes take part.

        Raises:
            DiskError: It cannot be written.
            NotFiniteError: It is worth nothing, because the gradients of the last step were no numbers.
        """
        learnt = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
        broken = not all(bool(own(parameter.detach()).isfinite().all()) for parameter in learnt)
        if trainer.strategy.reduce_boolean_decision(broken, all=False):
            raise NotFiniteError(f"the weights after step {trainer.global_step} are no numbers")
        trainer.save_checkpoint(self._folder / STATE_PATTERN.format(trainer.global_step))
        problem = trainer.strategy.broadcast(self._files.problem)
        if problem is not None:
            raise DiskError(*problem)


class LossLog(Callback):
    """Writes a line for each step into a CSV file, and to the Trainer's loggers.

    A run that goes on from a step drops the lines behind it.

    Args:
        path: The file.
    """

    COLUMNS = ("step", "loss", "learning_rate", "samples_per_second")

    def __init__(self, path: Path, batch_size: int) -> None:
        self._path, self._batch_size = path, batch_size
        self._began, self._rate = time.perf_counter(), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what is known up to the step that the run goes on from."""
        if trainer.is_global_zero:
            rows = [row for row in read_log(self._path) if row["step"] <= trainer.global_step]
            with new_file(self._path, replace=True) as path, open(path, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
        self._began = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Note the learning rate, which is the next step's when this one is over."""
        self._rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Tensor | Mapping[str, Any] | None, *args: Any
    ) -> None:
        """Write the step's line.

        Raises:
            DiskError: It cannot be written.
        """
        if not (ends_step(trainer) and trainer.is_global_zero):
            return
        now = time.perf_counter()
        speed, self._began = self._batch_size / max(now - self._began, 1e-9), now
        loss = float(trainer.callback_metrics["loss"])
        row = (trainer.global_step, repr(loss), repr(self._rate), f"{speed:.3g}")
        try:
            with open(self._path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(row)
        except OSError as error:
            text = f"{self._path} cannot be written: {error.strerror}. The states are whole; make room and go on."
            raise DiskError(text, error.errno) from error
        for logger in trainer.loggers:
            logger.log_metrics(dict(zip(self.COLUMNS[1:], map(float, row[1:]), strict=True)), trainer.global_step)


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; none if there is no such file. A last line that was cut is left out."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return []
    return [{"step": int(row["step"]), **{k: float(row[k]) for k in LossLog.COLUMNS[1:]}} for row in rows]


class EveryNSteps(Callback):
    """Calls a function every so many steps, in all processes.

    Args:
        every: Steps; 0 never.
        act: Called with the number of the step.
    """

    def __init__(self, every: int, act: Callable[[int], object]) -> None:
        self._every, self._act = every, act

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Act, if it is time."""
        if ends_step(trainer) and self._every and trainer.global_step % self._every == 0:
            self._act(trainer.global_step)


class Bar(Callback):
    """One bar: steps, samples per second, time left, loss."""

    def __init__(self, title: str, batch_size: int) -> None:
        self._title, self._batch_size = title, batch_size
        self._bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show it."""
        hidden = not (trainer.is_global_zero and show_bars())
        self._bar = bar_class()(
            total=trainer.max_steps, initial=trainer.global_step, desc=self._title, unit="step", disable=hidden
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move it."""
        self._bar.update(trainer.global_step - self._bar.n)
        if not self._bar.disable:
            rate = self._bar.format_dict["rate"] or 0.0
            loss = float(trainer.callback_metrics["loss"])
            self._bar.set_postfix_str(f"{rate * self._batch_size:.3g} samples/s, loss {loss:.4g}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take it away."""
        if self._bar is not None:
            self._bar.close()


class StopAsked(Callback):
    """Lets Ctrl-C and SIGTERM end the run after the step that is being made; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, where signals arrive."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Tell the Trainer before a step's last batch, which then is the last; any process may have been asked."""
        if not ends_step(trainer):
            return
        asked = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        trainer.should_stop = trainer.should_stop or asked
        self.asked = trainer.should_stop

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put back what was there."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
