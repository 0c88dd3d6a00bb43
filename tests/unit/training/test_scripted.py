"""FlagAI's Trainer: its scripts' calls, what it saves, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from flagai_altdiff.errors import ConfigError, NotFiniteError
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.training.scripted import Trainer
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*")


class Line(nn.Module):
    """Learns y = 2 x, and gives its loss in the way that a test asks for."""

    def __init__(self, gives: str = "dict") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.bias = nn.Parameter(torch.ones(1))
        self.gives = gives

    def forward(self, x: Tensor, y: Tensor) -> Any:
        loss = ((x @ self.weight - y) ** 2).mean()
        return {"dict": {"loss": loss, "logits": x}, "tuple": (loss, x)}[self.gives]


def collate(samples: list[float]) -> dict[str, Any]:
    x = torch.tensor(samples)[:, None]
    return {"x": x, "y": 2 * x, "uid": "not for the model"}


def trained(tmp_path: Path, model: nn.Module, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"epochs": 20, "lr": 0.1, "batch_size": 4, "save_dir": tmp_path, "log_interval": 5}
    trainer = Trainer(env_type="pytorch", **{**settings, **options})
    trainer.train(model=model, train_dataset=[0.1 * i for i in range(10)], collate_fn=collate)  # type: ignore[arg-type]
    return trainer


@pytest.mark.parametrize("gives", ["dict", "tuple"])
def test_a_model_learns_by_its_own_loss(gives: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Line(gives)
    trained(tmp_path, model)
    assert float(model.weight) == pytest.approx(2, abs=0.2)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("training: step 5, loss ") and len(lines) == 12


def test_checkpoints_are_saved_and_taken_up(tmp_path: Path) -> None:
    model = Line()
    trained(tmp_path, model, save_interval=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["latest_checkpointed_iteration.txt", *map(str, range(7, 61, 7))]
    )
    again = Line()
    trained(tmp_path / "new", again, load_dir=tmp_path, epochs=1, lr=0.0)
    state = torch.load(tmp_path / "56" / "pytorch_model.bin", weights_only=True)
    assert float(again.weight) == float(state["weight"])


def test_no_step_is_missed_where_batches_are_accumulated(tmp_path: Path) -> None:
    """Three batches of an epoch are two steps."""
    trained(tmp_path, Line(), epochs=3, gradient_accumulation_steps=2, save_interval=1)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == set("123456")


def test_the_rate_rises_and_falls_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path, Line(), log_interval=1, epochs=10, lr=1.0, warm_up=0.5)
    rates = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert (
        len(rates) == 30 and max(rates) == rates[14] == 1.0 and rates[0] < rates[7] < rates[14] > rates[20] > rates[28]
    )


def test_a_dataloader_an_optimizer_and_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Line()
    loader: DataLoader[Any] = DataLoader([1.0, 2.0], batch_size=1, collate_fn=collate)  # type: ignore[arg-type]
    trainer = Trainer(epochs=3, eval_interval=2, save_dir=None, seed=None, log_interval=100)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer.train(model, sgd, train_dataset=loader, valid_dataset=loader)
    assert capsys.readouterr().out.count("eval/loss") == 3
    assert float(model.bias) == 1.0, "what gets no gradient stays"


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path) -> None:
    model = Line()
    model.weight.data.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="step 1"):
        trained(tmp_path, model)


def test_other_engines_are_named() -> None:
    with pytest.raises(ConfigError, match="deepspeed"):
        Trainer(env_type="deepspeed")


class Pictures(Dataset[tuple[Any, str]]):
    """As the example's CIFAR10: a prepared image and the name of its class."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> tuple[Any, str]:
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        return self.transform(Image.fromarray(pixels)), ["cat", "hat"][i % 2]


def test_altclip_is_tuned_as_flagais_example_does_it(tmp_path: Path) -> None:
    model = load_matching_model(tiny.write_altclip_folder(tmp_path / "m"))
    tokenizer = model.tokenizer
    assert tokenizer is not None

    def gather(batch: list[tuple[Any, str]]) -> dict[str, Tensor]:
        images = torch.tensor(np.array([b[0]["pixel_values"][0] for b in batch]))
        texts = [tokenizer(f"a photo of a {b[1]}", padding="max_length", truncation=True, max_length=20) for b in batch]
        return {"pixel_values": images, "input_ids": torch.tensor([text["input_ids"] for text in texts])}

    before = model.visual_projection.weight.detach().clone()
    trainer = Trainer(
        env_type="pytorch",
        pytorch_device=torch.device("cpu"),
        experiment_name="clip_finetuning",
        batch_size=4,
        lr=1e-4,
        epochs=2,
        log_interval=10,
    )
    trainer.train(model=model, train_dataset=Pictures(model.transform), collate_fn=gather)
    assert not torch.equal(model.visual_projection.weight, before)
