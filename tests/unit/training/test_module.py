"""A real Trainer on tiny models: what learns, what follows, and what is saved."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.training.module import DiffusionTraining
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def batches(conditioning: str | Tensor) -> DataLoader[Any]:
    """Two batches of two images, with captions or text states."""
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return DataLoader([{"image": image, "caption": conditioning} for image in images], batch_size=2)  # type: ignore[arg-type]


def states(model: LatentDiffusion) -> Tensor:
    return torch.randn(77, model.config.unet.context_dim, generator=torch.Generator().manual_seed(1))


def new_trainer(folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def copy_of_state(model: LatentDiffusion) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: LatentDiffusion, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_two_steps_change_exactly_the_unet(m9_folder: Path, tmp_path: Path) -> None:
    model = load_path(m9_folder)
    before = copy_of_state(model)
    trainer = new_trainer(tmp_path)
    trainer.fit(DiffusionTraining(model, learning_rate=1e-3), batches(tiny.CAT))
    assert trainer.global_step == 2
    assert trainer.callback_metrics["train/loss_simple"] > 0
    assert changed(model, before) == {f"model.{name}" for name, _ in model.model.named_parameters()}


def test_the_text_encoder_learns_where_the_config_says_so(m9_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(m9_folder, folder)
    tiny.write_config(folder / "config.yaml", tiny.M9, cond_stage_trainable=True)
    model = load_path(folder)
    before = copy_of_state(model)
    new_trainer(tmp_path).fit(DiffusionTraining(model, learning_rate=1e-3), batches(tiny.CAT))
    assert {name.split(".")[0] for name in changed(model, before)} == {"model", "cond_stage_model"}


def test_the_average_follows_each_step(tmp_path: Path) -> None:
    model = tiny.fresh_model("m9", use_ema=True)
    assert model.model_ema is not None
    bias = model.get_parameter("model.diffusion_model.out.2.bias")
    average = model.model_ema.get_buffer("diffusion_modelout2bias")
    trail = [average.clone()]

    class Watched(DiffusionTraining):
        def on_train_batch_end(self, *args: object) -> None:
            trail.append(bias.detach().clone())
            super().on_train_batch_end(*args)

    before = copy_of_state(model)
    new_trainer(tmp_path).fit(Watched(model, learning_rate=1e-2), batches(states(model)))
    # min(0.9999, (1 + n) / (10 + n)) of the old average stays
    torch.testing.assert_close(average, trail[0].lerp(trail[1], 1 - 2 / 11).lerp(trail[2], 1 - 3 / 12))
    assert int(model.model_ema.num_updates) == 2
    averages = {name for name in before if name.startswith("model_ema.")} - {"model_ema.decay"}
    assert {name for name in changed(model, before) if not name.startswith("model.")} == averages


def test_what_a_trainer_saves_is_a_checkpoint(m9_folder: Path, tmp_path: Path) -> None:
    model = load_path(m9_folder)
    trainer = new_trainer(tmp_path)
    trainer.fit(DiffusionTraining(model, learning_rate=1e-3), batches(tiny.CAT))
    folder = tmp_path / "model"
    shutil.copytree(m9_folder, folder)
    trainer.save_checkpoint(folder / "model.ckpt")
    assert not changed(load_path(folder), model.state_dict())
    resumed = load_path(m9_folder)
    again = new_trainer(tmp_path)
    again.fit(DiffusionTraining(resumed), batches(tiny.CAT), ckpt_path=folder / "model.ckpt")
    assert again.global_step == 2
    assert not changed(resumed, model.state_dict()), "the two steps were done already"
