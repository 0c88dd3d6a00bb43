"""The engine on tiny models: what learns, what stays, and that neither interruptions nor processes change anything."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flagai_altdiff.errors import ConfigError, DiskError, NotFiniteError, TrainingInterrupted
from flagai_altdiff.loading import load_path
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.training.callbacks import latest_state, read_log
from flagai_altdiff.training.config import MachineConfig, StageConfig
from flagai_altdiff.training.module import Load, StageTraining
from flagai_altdiff.training.objectives import Batch, ContrastiveTuning, Denoising, Objective, TeacherLearning
from flagai_altdiff.training.run import fit
from flagai_altdiff.training.stages import STAGES
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = 4
IMAGES = torch.rand(10, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(first: int, rank: int, world: int) -> Iterator[Batch]:
    """Batches of four, of which each process gets its share."""
    for number in itertools.count(first):
        positions = list(range(BATCH * number, BATCH * (number + 1)))[rank::world]
        yield {
            "image": IMAGES[[position % 10 for position in positions]],
            "caption": [tiny.SENTENCES[position % 3] for position in positions],
            "key": [str(position) for position in positions],
            "english": [tiny.SENTENCES[0] for _ in positions],
            "epoch": 0,
            "position": torch.tensor(positions),
        }


def halves(first: int, rank: int, world: int) -> Iterator[Batch]:
    """The same, where two batches are a step."""
    return load(2 * first, rank, world)


def small(first: int, rank: int, world: int) -> Iterator[Batch]:
    """The same with images as large as the tiny image tower takes."""
    return ({**batch, "image": batch["image"][:, :, :28, :28]} for batch in load(first, rank, world))


def config(stage: str = "quality", **changes: Any) -> StageConfig:
    return StageConfig(
        stage=stage, **{"steps": 8, "batch_size": BATCH, "warmup_steps": 3, "learning_rate": 1e-3, **changes}
    )


def train(model: Any, folder: Path, stage: str = "quality", loader: Load = load, **changes: Any) -> StageTraining:
    settings = config(stage, **changes).settings(64)
    objective: Objective = Denoising(model, settings, seed=1)
    training = StageTraining(objective, settings, loader)
    fit(training, folder, save_every=3, machine=MachineConfig(accelerator="cpu"))
    return training


def copied(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model: torch.nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.csv")]


@pytest.mark.parametrize("stage", [name for name, row in STAGES.items() if row.kind == "diffusion" and not row.rank])
@pytest.mark.parametrize("trainable", [None, "cross_attention", "cross_attention_kv", r"model\..*\.out\.2\."])
def test_a_step_changes_exactly_what_the_stage_says(
    stage: str, trainable: str | None, m9_folder: Path, tmp_path: Path
) -> None:
    model = load_path(m9_folder)
    before = copied(model)
    training = train(model, tmp_path, stage, trainable=trainable, steps=1, warmup_steps=0)
    unet = {name for name in before if name.startswith("model.diffusion_model.")}
    marks = {
        "unet": "",
        "cross_attention": ".attn2.",
        "cross_attention_kv": ".attn2.to_",
        r"model\..*\.out\.2\.": ".out.2.",
    }
    expected = {name for name in unet if marks[training.settings.row.trainable] in name}
    if training.settings.row.trainable == "cross_attention_kv":
        expected = {name for name in expected if ".to_k." in name or ".to_v." in name}
    assert expected and changed(model, before) == expected


def test_the_text_encoder_learns_where_a_stage_says_so(m9_folder: Path, tmp_path: Path) -> None:
    model = load_path(m9_folder)
    before = copied(model)
    train(model, tmp_path, trainable=r"cond_stage_model\.|model\.diffusion_model\.", steps=1)
    assert {name.split(".")[0] for name in changed(model, before)} == {"cond_stage_model", "model"}


def test_a_run_that_was_cut_gives_the_same_curve_and_weights(m9_folder: Path, tmp_path: Path) -> None:
    whole, cut = load_path(m9_folder), load_path(m9_folder)
    train(whole, tmp_path / "whole", loader=halves, decay="cosine", accumulate=2, batch_size=8)
    expected = losses(tmp_path / "whole")

    def ends(first: int, rank: int, world: int) -> Iterator[Batch]:
        yield from itertools.islice(halves(first, rank, world), 9)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(cut, tmp_path / "cut", loader=ends, decay="cosine", accumulate=2, batch_size=8)
    assert latest_state(tmp_path / "cut" / "states") is not None
    again = load_path(m9_folder)
    train(again, tmp_path / "cut", loader=halves, decay="cosine", accumulate=2, batch_size=8)
    assert losses(tmp_path / "cut") == expected and len(expected) == 8
    assert not changed(again, copied(whole))


PROCESS = """
import sys
from pathlib import Path
from flagai_altdiff.loading import load_path
from tests.unit.training import test_engine as engine
from flagai_altdiff.training.config import MachineConfig
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.objectives import Denoising
from flagai_altdiff.training.run import fit
import torch
torch.set_num_threads(1)
folder, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
settings = engine.config(steps=steps).settings(64)
training = StageTraining(Denoising(load_path(folder), settings, seed=1), settings, engine.load)
fit(training, out, save_every=2, machine=MachineConfig(accelerator="cpu"))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_was_ended_goes_on(
    how: signal.Signals, m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    def run(steps: int, out: Path) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PROCESS, str(m9_folder), str(out), str(steps)]
        return subprocess.Popen(words, env=script_environment, text=True, stderr=subprocess.PIPE)

    steps, out = 12, tmp_path / "cut"
    process = run(steps, out)
    until = time.monotonic() + 120
    while len(read_log(out / "log.csv")) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert len(read_log(out / "log.csv")) < steps
    assert "TrainingInterrupted" in errors and "its state is saved" in errors
    assert run(steps, out).wait(timeout=120) == 0
    train(load_path(m9_folder), tmp_path / "whole", steps=steps)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_loss_that_is_no_number_stops_it_and_keeps_the_last_state(m9_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"the loss of step \d+ is (nan|inf)"):
        train(load_path(m9_folder), tmp_path, steps=200, learning_rate=9.0, warmup_steps=0, clip_norm=0.0)
    state = latest_state(tmp_path / "states")
    assert state is None or all(
        value.isfinite().all() for value in torch.load(state, weights_only=False)["state_dict"].values()
    )


def test_weights_that_are_no_numbers_are_no_state(m9_folder: Path, tmp_path: Path) -> None:
    """The loss of the step is one, its gradients are not."""
    model = load_path(m9_folder)
    steps = itertools.count()
    bias = model.get_parameter("model.diffusion_model.out.2.bias")
    bias.register_hook(lambda gradient: gradient * (torch.inf if next(steps) == 3 else 1))
    settings = config().settings(64)
    training = StageTraining(Denoising(model, settings, seed=1), settings, load)
    with pytest.raises(NotFiniteError, match=r"weights after step 4 .*step-00000003.ckpt is the last good state"):
        fit(training, tmp_path, save_every=1, machine=MachineConfig(accelerator="cpu"))
    assert not list((tmp_path / "states").glob("*4.ckpt"))


def test_a_full_disk_keeps_the_states_before(m9_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.save
    count = itertools.count()

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskError, match=r"No space left.*make room"):
        train(load_path(m9_folder), tmp_path)
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["step-00000003.ckpt"]
    monkeypatch.undo()
    train(load_path(m9_folder), tmp_path)
    assert len(losses(tmp_path)) == 8


def test_the_average_follows_as_the_paper_says(m9_folder: Path, tmp_path: Path) -> None:
    model = load_path(m9_folder)
    trail = []

    class Watched(StageTraining):
        def on_train_batch_end(self, *args: object) -> None:
            trail.append(self.model.get_parameter("model.diffusion_model.out.2.bias").detach().clone())

    start = model.get_parameter("model.diffusion_model.out.2.bias").detach().clone()
    settings = config(steps=2, warmup_steps=0).settings(64)
    training = Watched(Denoising(model, settings, seed=1), settings, load)
    fit(training, tmp_path, save_every=9, machine=MachineConfig(accelerator="cpu"))
    training.take_average()
    bias = model.get_parameter("model.diffusion_model.out.2.bias")
    # min(0.9999, (1 + n) / (10 + n)) of the old average stays
    torch.testing.assert_close(bias, start.lerp(trail[0], 1 - 2 / 11).lerp(trail[1], 1 - 3 / 12), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["teacher", "contrastive"])
def test_the_text_tower_learns_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model: AltCLIP = load_matching_model(tiny.write_altclip_folder(tmp_path / "m"))
    before = copied(model)
    settings = config(kind, steps=30, learning_rate=3e-3).settings(28)
    wanted = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))

    def teach(texts: list[str]) -> Tensor:
        return wanted.expand(len(texts), -1)

    objective: Objective = TeacherLearning(model, teach, settings) if kind == "teacher" else ContrastiveTuning(model)
    training = StageTraining(objective, settings, small)
    fit(training, tmp_path / "run", save_every=100, machine=MachineConfig(accelerator="cpu"))
    assert {name.split(".")[0] for name in changed(model, before)} == {"text_model"}
    curve = losses(tmp_path / "run")
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])


def test_a_state_of_another_stage_is_refused(m9_folder: Path, tmp_path: Path) -> None:
    train(load_path(m9_folder), tmp_path, steps=3)
    with pytest.raises(ValueError, match="of another stage"):
        train(load_path(m9_folder), tmp_path, trainable="cross_attention", steps=4)


def test_an_interrupted_stage_says_so(m9_folder: Path, tmp_path: Path) -> None:
    model: LatentDiffusion = load_path(m9_folder)
    settings = config().settings(64)

    def ends(first: int, rank: int, world: int) -> Iterator[Batch]:
        for number, batch in enumerate(load(first, rank, world)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    training = StageTraining(Denoising(model, settings, seed=1), settings, ends)
    with pytest.raises(TrainingInterrupted, match=r"stopped after step [234]"):
        fit(training, tmp_path, save_every=100, machine=MachineConfig(accelerator="cpu"))
    assert latest_state(tmp_path / "states") is not None


@pytest.mark.parametrize("part", [0, 1])
def test_a_signal_within_a_step_loses_none(part: int, m9_folder: Path, tmp_path: Path) -> None:
    settings = config(accumulate=2, batch_size=8).settings(64)

    class Interrupted(Denoising):
        def __call__(self, batch: Batch, gather: Any) -> Tensor:
            if batch["position"][0] == BATCH * (2 * 4 + part):
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__call__(batch, gather)

    training = StageTraining(Interrupted(load_path(m9_folder), settings, seed=1), settings, halves)
    with pytest.raises(TrainingInterrupted, match=r"after step [56]; its state is saved"):
        fit(training, tmp_path, save_every=100, machine=MachineConfig(accelerator="cpu"))
    state = latest_state(tmp_path / "states")
    assert state is not None and state.name == f"step-{len(losses(tmp_path)):08d}.ckpt"


def test_a_run_that_goes_on_learns_as_its_config_says_now(
    m9_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(load_path(m9_folder), tmp_path, steps=3, ema_decay=0.9, batch_size=8)
    changes: dict[str, Any] = {"steps": 6, "learning_rate": 2e-5, "weight_decay": 0.5, "beta2": 0.9, "ema_decay": 0.5}
    training = train(load_path(m9_folder), tmp_path, **changes)
    assert [row["learning_rate"] for row in read_log(tmp_path / "log.csv")][3:] == [2e-5] * 3
    state = latest_state(tmp_path / "states")
    assert state is not None
    (group,) = torch.load(state, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.9))
    assert training.average is not None and float(training.average.decay) == 0.5
    assert "began with batch_size 8" in caplog.text


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"trainable": "cross_attention"}, {"ema_decay": 0.0}])
def test_a_run_that_cannot_go_on_says_so(changes: dict[str, Any], m9_folder: Path, tmp_path: Path) -> None:
    train(load_path(m9_folder), tmp_path, steps=3)
    with pytest.raises(ConfigError, match="the saved state is of another"):
        train(load_path(m9_folder), tmp_path, **changes)


def test_a_state_runs_no_code(m9_folder: Path, tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "harm",))

    train(load_path(m9_folder), tmp_path, steps=3)
    state = latest_state(tmp_path / "states")
    assert state is not None
    torch.save({**torch.load(state, weights_only=True), "more": Harmful()}, state)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        train(load_path(m9_folder), tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_log_that_cannot_be_written_is_a_disks_fault(m9_folder: Path, tmp_path: Path) -> None:
    def breaking(first: int, rank: int, world: int) -> Iterator[Batch]:
        for number, batch in enumerate(load(first, rank, world)):
            if number == 5:
                (tmp_path / "log.csv").unlink()
                (tmp_path / "log.csv").mkdir()
            yield batch

    with pytest.raises(DiskError, match=r"log.csv cannot be written: .*directory.* The states are whole"):
        train(load_path(m9_folder), tmp_path, loader=breaking)
