"""A model under Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor

from flagai_altdiff.models import LatentDiffusion


class DiffusionTraining(LightningModule):
    """Trains what a model leaves trainable: its UNet, and its text encoder where the config says so.

    The state dict is the model's own, under LDM's names: a Trainer saves checkpoints that ``load_model`` reads.

    Args:
        model: Trained in place. A batch holds images under its ``first_stage_key`` and captions under its
            ``cond_stage_key``, see ``LatentDiffusion.get_input``.
        learning_rate: AdamW's, constant.
        weight_decay: AdamW's.
    """

    def __init__(self, model: LatentDiffusion, *, learning_rate: float = 1e-4, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.model = model
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch, a scalar."""
        latents, captions = self.model.get_input(batch, self.model.first_stage_key)
        loss, values = self.model(latents, captions)
        logged = {f"train/{name}": value for name, value in values.items()}
        self.log_dict(logged, prog_bar=True, batch_size=len(latents))
        return loss

    def on_train_batch_end(self, *args: object) -> None:
        """Let the averaged weights follow, where the model keeps some."""
        if self.model.model_ema is not None:
            self.model.model_ema(self.model.model)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.learning_rate, weight_decay=self.weight_decay)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)
