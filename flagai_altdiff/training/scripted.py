"""FlagAI's third door: its ``Trainer``, for scripts that bring their own model and data; Lightning does the work."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, seed_everything
from pytorch_lightning import Trainer as LightningTrainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from flagai_altdiff.errors import ConfigError, NotFiniteError
from flagai_altdiff.files import new_file
from flagai_altdiff.progress import bar_class

logger = logging.getLogger(__name__)

_LEFT_OUT = ("uid", "meta", "mode")
"""What a batch may carry that the model is not given."""
_DISTRIBUTED = {"pytorch": "auto", "pytorchDDP": "ddp"}
_WORKERS = 4
WEIGHTS, LATEST = "pytorch_model.bin", "latest_checkpointed_iteration.txt"


class Trainer:
    """Trains any model that gives its loss when it is called with a batch.

    Args:
        timers: Ignored, like ``tokenizer`` and the arguments of deepspeed.
        env_type: ``"pytorch"``, or ``"pytorchDDP"`` for several processes.
        pytorch_device: Where the model trains with ``"pytorch"``.
        experiment_name: Title of the log.
        batch_size: Of each process, where data are given as a dataset.
        gradient_accumulation_steps: Batches of a step.
        weight_decay: AdamW's; norms and biases have none.
        lr: AdamW's highest rate.
        warm_up: Share of all steps in which it is reached; then it falls to zero in a straight line.
        epochs: How often the data are gone through; 0 only evaluates.
        save_interval: Steps between two checkpoints.
        eval_interval: Steps between two evaluations of ``valid_dataset``.
        log_interval: Steps between two lines of the log.
        seed: Of all random numbers.
        fp16: Mixed precision on a GPU.
        clip_grad: Limit of the gradients' norm.
        save_dir: Folder of the checkpoints: ``<step>/pytorch_model.bin``; none are saved if it is empty.
        load_dir: Such a folder, whose newest checkpoint is loaded first.
        num_nodes: Machines, with ``"pytorchDDP"``.
        num_gpus: Processes on each machine, with ``"pytorchDDP"``.
        others: FlagAI's further arguments; what has no effect is named once.

    Raises:
        ConfigError: Another ``env_type``.
    """

    def __init__(
        self,
        timers: object = None,
        env_type: str = "pytorch",
        pytorch_device: str | torch.device = "cpu",
        experiment_name: str = "training",
        batch_size: int = 1,
        gradient_accumulation_steps: int = 1,
        weight_decay: float = 0.1,
        lr: float = 1e-3,
        warm_up: float = 0.1,
        epochs: int = 0,
        save_interval: int = 1000,
        eval_interval: int = 100,
        log_interval: int = 100,
        seed: int | None = 1234,
        fp16: bool = False,
        clip_grad: float = 1.0,
        checkpoint_activations: bool = False,
        tokenizer: object = None,
        save_dir: str | Path | None = "checkpoints",
        *,
        load_dir: str | Path | None = None,
        num_nodes: int = 1,
        num_gpus: int = 1,
        **others: object,
    ) -> None:
        if env_type not in _DISTRIBUTED:
            known = ", ".join(_DISTRIBUTED)
            raise ConfigError(f"env_type={env_type!r}: expected {known}; deepspeed and bmtrain are not here.")
        if checkpoint_activations or others:
            names = [*(["checkpoint_activations"] if checkpoint_activations else []), *others]
            logger.warning("Trainer: %s has no effect here", ", ".join(sorted(names)))
        self.env_type, self.experiment_name = env_type, experiment_name
        self.batch_size, self.epochs, self.seed, self.fp16 = batch_size, epochs, seed, fp16
        self.gradient_accumulation_steps, self.clip_grad = gradient_accumulation_steps, clip_grad
        self.lr, self.weight_decay, self.warm_up = lr, weight_decay, warm_up
        self.log_interval, self.eval_interval, self.save_interval = log_interval, eval_interval, save_interval
        self.save_dir = Path(save_dir) if save_dir else None
        self.load_dir = Path(load_dir) if load_dir else None
        self._device = torch.device(pytorch_device)
        self._devices, self._nodes = num_gpus, num_nodes

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        train_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        valid_dataset: Dataset[Any] | DataLoader[Any] | None = None,
        metric_methods: Sequence[tuple[str, Callable[[Any, Any], Any]]] = (),
        collate_fn: Callable[[list[Any]], Any] | None = None,
        find_unused_parameters: bool = True,
    ) -> None:
        """Train a model in place.

        Args:
            model: ``model(**batch)`` gives a mapping with ``loss`` (or a tuple that begins with the loss).
            optimizer: AdamW with the Trainer's rate if left out.
            lr_scheduler: Stepped with each step; warm-up and linear decay if left out, and no optimizer was given.
            train_dataset: Data, or a DataLoader.
            valid_dataset: The same for evaluations; their mean loss is logged.
            metric_methods: Name and function of (logits, labels), where outputs and batches have them.
            collate_fn: Makes batches out of samples.
            find_unused_parameters: For ``"pytorchDDP"``: whether some may get no gradient.

        Raises:
            NotFiniteError: The loss is no number any more.
        """
        if self.seed is not None and self.seed > 0:
            seed_everything(self.seed, verbose=False)
        if self.load_dir:
            _load_newest(model, self.load_dir)
        training = self._loader(train_dataset, collate_fn, shuffle=True)
        validation = self._loader(valid_dataset, collate_fn)
        module = _Scripted(model, self, optimizer, lr_scheduler, metric_methods)
        distributed = self.env_type != "pytorch"
        strategy = "ddp_find_unused_parameters_true" if distributed and find_unused_parameters else None
        trainer = LightningTrainer(
            accelerator="auto" if distributed else {"cuda": "gpu"}.get(self._device.type, self._device.type),
            devices=self._devices if distributed else ([self._device.index or 0] if self._device.type == "cuda" else 1),
            num_nodes=self._nodes,
            strategy=strategy or _DISTRIBUTED[self.env_type],
            precision="16-mixed" if self.fp16 and self._device.type == "cuda" else "32-true",
            max_epochs=self.epochs,
            accumulate_grad_batches=self.gradient_accumulation_steps,
            gradient_clip_val=self.clip_grad or None,
            val_check_interval=self.eval_interval if validation is not None and self.eval_interval else None,
            check_val_every_n_epoch=None if validation is not None and self.eval_interval else 1,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            callbacks=[_Reports(self)],
        )
        if self.epochs:
            trainer.fit(module, training, validation)
        elif validation is not None:
            trainer.validate(module, validation, verbose=False)
        model.to(self._device)

    def _loader(
        self, data: Dataset[Any] | DataLoader[Any] | None, collate: Callable[..., Any] | None, *, shuffle: bool = False
    ) -> DataLoader[Any] | None:
        if data is None or isinstance(data, DataLoader):
            return data
        workers = min(_WORKERS, (os.cpu_count() or 1) - 1)
        return DataLoader(data, self.batch_size, shuffle=shuffle, collate_fn=collate, num_workers=workers)


class _Scripted(LightningModule):
    """A script's model under Lightning."""

    def __init__(
        self,
        model: nn.Module,
        settings: Trainer,
        optimizer: torch.optim.Optimizer | None,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None,
        metrics: Sequence[tuple[str, Callable[[Any, Any], Any]]],
    ) -> None:
        super().__init__()
        self.model = model
        self._settings, self._given, self._metrics = settings, (optimizer, scheduler), metrics

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self._loss(self._output(batch))
        if not loss.isfinite():
            raise NotFiniteError(f"the loss of step {self.global_step + 1} is {float(loss)}; try a lower lr.")
        self.log("train/loss", loss.detach(), batch_size=1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the loss, and the metrics where there is something to compare."""
        output = self._output(batch)
        self.log("eval/loss", self._loss(output), batch_size=1)
        if isinstance(output, Mapping) and "logits" in output and "labels" in batch:
            for name, metric in self._metrics:
                self.log(f"eval/{name}", float(metric(output["logits"], batch["labels"])), batch_size=1)

    def configure_optimizers(self) -> Any:
        """The script's, or AdamW with warm-up and linear decay."""
        optimizer, scheduler = self._given
        if optimizer is None:
            optimizer = torch.optim.AdamW(_groups(self.model, self._settings.weight_decay), lr=self._settings.lr)
            scheduler = scheduler or LambdaLR(optimizer, self._factor)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _factor(self, step: int) -> float:
        steps = int(self.trainer.estimated_stepping_batches)
        warm = int(self._settings.warm_up * steps)
        return (step + 1) / (warm + 1) if step < warm else max((steps - step) / max(steps - warm, 1), 0.0)

    def _output(self, batch: Any) -> Any:
        return self.model(**{name: value for name, value in batch.items() if name not in _LEFT_OUT})

    def _loss(self, output: Any) -> Tensor:
        loss: Tensor | None = output["loss"] if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            loss = output[0]
        return loss


class _Reports(Callback):
    """Lines of the log, and checkpoints, as FlagAI's users know them."""

    def __init__(self, settings: Trainer) -> None:
        self._settings, self._step = settings, 0

    def on_train_batch_end(self, trainer: LightningTrainer, pl_module: LightningModule, *args: Any) -> None:
        """Log and save, if it is time."""
        step, settings = trainer.global_step, self._settings
        if step == self._step:
            return
        self._step = step
        if step % settings.log_interval == 0 and trainer.is_global_zero:
            loss, rate = float(trainer.callback_metrics["train/loss"]), trainer.optimizers[0].param_groups[0]["lr"]
            bar_class().write(f"{settings.experiment_name}: step {step}, loss {loss:.6g}, lr {rate:.3g}")
        if settings.save_dir and step % settings.save_interval == 0 and trainer.is_global_zero:
            assert isinstance(pl_module, _Scripted)
            save(pl_module.model, settings.save_dir, step)

    def on_validation_end(self, trainer: LightningTrainer, pl_module: LightningModule) -> None:
        """Say what the evaluation gave."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("eval/")}
        if trainer.is_global_zero:
            bar_class().write(f"{self._settings.experiment_name}: step {trainer.global_step}, {found}")


def save(model: nn.Module, folder: Path, step: int) -> Path:
    """Save a model's weights as ``<folder>/<step>/pytorch_model.bin``; the file."""
    target = folder / str(step) / WEIGHTS
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target, replace=True) as unfinished:
        torch.save(model.state_dict(), unfinished)
    with new_file(folder / LATEST, replace=True) as unfinished:
        unfinished.write_text(f"{step}\n", encoding="utf-8")
    return target


def _load_newest(model: nn.Module, folder: Path) -> None:
    from flagai_altdiff.checkpoint.reading import read_tensors

    steps = [int(path.parent.name) for path in folder.glob(f"*/{WEIGHTS}") if path.parent.name.isdecimal()]
    if not steps:
        raise ConfigError(f"load_dir={str(folder)!r}: it has no <step>/{WEIGHTS}.")
    model.load_state_dict(read_tensors(folder / str(max(steps)) / WEIGHTS))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with weight decay, and those without: norms and biases."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.ndim > 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
