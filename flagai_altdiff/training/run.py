"""A run: its stages one after the other, each from the model that the one before gave."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.accelerators.cpu import CPUAccelerator
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import DDPStrategy, Strategy

from flagai_altdiff.errors import ConfigError, MissingDependencyError, NotFiniteError, TrainingInterrupted
from flagai_altdiff.training.callbacks import (
    Bar,
    EveryNSteps,
    LossLog,
    SaveStates,
    StateFiles,
    StopAsked,
    latest_state,
)
from flagai_altdiff.training.checkpointing import computed_twice
from flagai_altdiff.training.config import MachineConfig
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.processes import cluster_plugins, is_first
from flagai_altdiff.training.sharding import Sharded

logger = logging.getLogger(__name__)

STATES = "states"


def fit(
    training: StageTraining,
    folder: Path,
    *,
    save_every: int,
    machine: MachineConfig,
    sheet_every: int = 0,
    draw_sheet: Callable[[int], object] = lambda step: None,
    tensorboard: bool = False,
) -> None:
    """Train one stage to its end, from its newest state if there is one.

    Args:
        training: The stage.
        folder: Of its states (``states/``) and its log (``log.csv``).
        save_every: Steps between two states.
        machine: What it runs on.
        sheet_every: Steps between two calls of ``draw_sheet``; 0 is none.
        draw_sheet: Called with the step.
        tensorboard: Whether the log is written for TensorBoard as well.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
        NotFiniteError: The loss is no number any more.
        DiskError: A state cannot be saved.
    """
    settings = training.settings
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
    files = StateFiles()
    trainer = _trainer(
        training,
        machine,
        folder,
        [
            StopAsked(),
            LossLog(folder / "log.csv", settings.row.batch_size),
            Bar(settings.row.name, settings.row.batch_size),
            SaveStates(folder / STATES, save_every, files),
            EveryNSteps(sheet_every, draw_sheet),
        ],
        files,
        event_log(folder) if tensorboard else None,
    )
    state = latest_state(folder / STATES)
    if state is not None:
        logger.info("%s goes on from %s", settings.row.name, state)
    with computed_twice(training.model, machine.checkpoint_activations), warnings.catch_warnings():
        for harmless in (
            ".*does not have many workers.*",
            ".*in eval mode at the start.*",
            ".*is deprecated, use.*",
            ".*broadcast_buffers. is deprecated.*",
        ):
            warnings.filterwarnings("ignore", harmless)
        try:
            trainer.fit(training, ckpt_path=state, weights_only=True if state else None)
        except NotFiniteError as error:
            good = latest_state(folder / STATES)
            kept = f"{good} is the last good state" if good else "no state was saved before it"
            text = f"{error}; {kept}. Try a lower learning rate, a longer warm-up, or precision: bf16."
            raise NotFiniteError(text) from error
        finally:
            training.let_go_of_data()
    if trainer.global_step < settings.row.steps:
        raise TrainingInterrupted(
            f"{settings.row.name} was stopped after step {trainer.global_step}; its state is saved."
        )


def event_log(folder: Path) -> TensorBoardLogger:
    """A logger for TensorBoard; its folder appears with the first step.

    Args:
        folder: Of the stage.

    Raises:
        MissingDependencyError: TensorBoard is not installed.
    """
    try:
        return TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "tensorboard: true needs TensorBoard: pip install 'flagai_altdiff[tensorboard]'"
        ) from error


def _trainer(
    training: StageTraining,
    machine: MachineConfig,
    folder: Path,
    callbacks: list[Callback],
    files: StateFiles,
    events: TensorBoardLogger | None,
) -> Trainer:
    settings = training.settings
    try:
        trainer = Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy=_strategy(machine, spares_some=training.spares_some),
            precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[machine.precision],  # type: ignore[arg-type]
            max_steps=settings.row.steps,
            max_epochs=-1,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.clip_norm or None,
            logger=events or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=callbacks,
            plugins=[files, *cluster_plugins()],
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"machine: {str(error).splitlines()[0]}") from error
    if machine.precision == "16" and isinstance(trainer.accelerator, CPUAccelerator):
        raise ConfigError("machine.precision=16 is for GPUs. Set bf16 or 32 on a CPU.")
    return trainer


def _strategy(machine: MachineConfig, *, spares_some: bool) -> str | Strategy:
    """Among several processes, DDP without its second copy of the gradients, and without sending the averages about.

    Lightning's own FSDP is for GPUs only, clips no gradients, and saves nothing of a module that chooses what it saves.
    """
    several = machine.devices * machine.nodes > 1
    if machine.strategy == "fsdp":
        return Sharded() if several else "auto"
    if machine.strategy in ("auto", "ddp") and several:
        return DDPStrategy(find_unused_parameters=spares_some, gradient_as_bucket_view=True, broadcast_buffers=False)
    return machine.strategy
