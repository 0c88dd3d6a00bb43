"""Whole runs, as a config says: every stage and chains of them, cut, resumed, in two processes, with broken data."""

from __future__ import annotations

import json
import logging
import multiprocessing
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AltCLIPModel

from flagai_altdiff.auto_loader import AutoLoader
from flagai_altdiff.cli import main
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    InvalidRequestError,
    MissingDependencyError,
    NotFiniteError,
)
from flagai_altdiff.hub import client
from flagai_altdiff.loading import load_model, load_path
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import TrainConfig, parse_config
from flagai_altdiff.training.session import train
from tests import tiny
from tests.data_files import plain_shard
from tests.servers import Fault, serve

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL: dict[str, Any] = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3}
DRAW = {**SMALL, "side": 64}


def settings(model: Path | str, source: Path | str, output: Path, *stages: Any, **more: Any) -> dict[str, Any]:
    """The data of a config."""
    return {
        "model": str(model),
        "output": str(output),
        "stages": list(stages),
        "save_every": 2,
        "sheets": {"every": 2, "prompts": ["a cat"], "steps": 1, **more.pop("sheets", {})},
        "machine": {"accelerator": "cpu", **more.pop("machine", {})},
        "data": {"source": str(source), **more.pop("data", {})},
        **more,
    }


def config(*args: Any, **more: Any) -> TrainConfig:
    return parse_config(settings(*args, **more))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_log(folder / "log.csv")]


def images_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): Image.open(path).size for path in folder.rglob("*.png")}


@pytest.mark.parametrize("stage", ["alignment", "quality", "guidance", "dreambooth", "lora"])
def test_a_stage_gives_a_model_that_opens_everywhere(
    stage: str, m9_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    found = train(config(m9_folder, image_folder, tmp_path / "run", {"stage": stage, **DRAW}))
    folder = tmp_path / "run" / f"1-{stage}"
    assert found == folder / "model"
    assert len(losses(folder)) == 3
    assert images_of(folder).keys() == {"log.png", "sheet.png", "sheets/step-00000002.png"}
    assert (folder / "lora.safetensors").is_file() is (stage == "lora")
    model = load_model(found, safety_checker=False)
    before = load_path(m9_folder).state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    convert(found, tmp_path / "diffusers", "diffusers")
    loader = AutoLoader("text2img", str(tmp_path / "diffusers"), safety_checker=False)
    again = loader.get_model().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_chain_starts_each_stage_from_the_one_before(m9_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    names = ("alignment", "quality", "guidance")
    stages = [{"stage": name, **DRAW} for name in names]
    last = train(config(m9_folder, image_folder, tmp_path / "run", *stages))
    assert last == tmp_path / "run" / "3-guidance" / "model"
    models = [m9_folder, *(tmp_path / "run" / f"{i}-{name}" / "model" for i, name in enumerate(names, 1))]
    before, aligned, *_ = (load_path(path).state_dict() for path in models)
    changed = {name for name, tensor in aligned.items() if not torch.equal(tensor, before[name])}
    assert changed and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    # The second stage alone, from the first one's model, is the second stage of the chain.
    alone = train(config(models[1], image_folder, tmp_path / "alone", stages[1]))
    expected = load_path(models[2]).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_path(alone).state_dict().items())


def test_a_student_becomes_a_matching_model(
    clip_folder: Path, xlmr_folder: Path, text_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    taught = train(
        config(
            "AltCLIP-XLMR-L",
            text_file,
            tmp_path / "taught",
            {"stage": "teacher", **SMALL},
            teacher=str(clip_folder),
            student=str(xlmr_folder),
        )
    )
    tuned = train(config(taught, image_folder, tmp_path / "tuned", {"stage": "contrastive", **SMALL}))
    assert (tmp_path / "taught" / "1-teacher" / "log.png").is_file()
    start, after = (load_matching_model(folder).state_dict() for folder in (taught, tuned))
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, start[name])}
    assert changed == {"text_model"}
    assert isinstance(AltCLIPModel.from_pretrained(tuned), AltCLIPModel)
    model = AutoLoader("txt_img_matching", str(tuned)).get_model()
    assert model.get_text_features(model.token_ids(["a cat"])).shape == (1, 24)


def test_both_matching_stages_in_one_chain(
    clip_folder: Path, xlmr_folder: Path, tmp_path: Path, image_folder: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    rows = [{"file_name": f"{n}.png", "captions": {"en": f"cat {n}", "de": f"Katze {n}"}} for n in range(10)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stages = [{"stage": name, **SMALL} for name in ("teacher", "contrastive")]
    towers = {"teacher": str(clip_folder), "student": str(xlmr_folder)}
    last = train(config("AltCLIP-XLMR-L", data, tmp_path / "run", *stages, **towers))
    assert load_matching_model(last).config.projection_dim == 24
    assert len(losses(tmp_path / "run" / "2-contrastive")) == 3


# Interruptions


def command(path: Path, data: dict[str, Any]) -> list[str]:
    path.write_text(json.dumps(data))
    return [sys.executable, "-m", "flagai_altdiff", "train", str(path)]


def test_a_chain_that_was_killed_in_its_second_stage_goes_on(
    m9_folder: Path, image_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    stages = [{"stage": "alignment", **DRAW}, {"stage": "guidance", **DRAW, "steps": 8}]
    expected = train(config(m9_folder, image_folder, tmp_path / "whole", *stages, sheets={"every": 0, "steps": 1}))
    data = settings(m9_folder, image_folder, tmp_path / "cut", *stages, sheets={"every": 0, "steps": 1})
    words = command(tmp_path / "my.yaml", data)
    process = subprocess.Popen(words, env=script_environment, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while len(losses(tmp_path / "cut" / "2-guidance")) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "2-guidance" / "model").exists()
    again = subprocess.run(words, env=script_environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "it holds a run; add --resume" in again.stderr
    done = subprocess.run([*words, "--resume"], env=script_environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip())
    assert found == tmp_path / "cut" / "2-guidance" / "model"
    assert losses(found.parent) == losses(expected.parent)
    same = load_path(expected).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in load_path(found).state_dict().items())
    # What is done is not done again.
    assert train(parse_config(data), resume=True) == found


def test_ctrl_c_says_how_to_go_on(
    m9_folder: Path, image_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    data = settings(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW, "steps": 500})
    process = subprocess.Popen(
        command(tmp_path / "my.yaml", data), env=script_environment, text=True, stderr=subprocess.PIPE
    )
    until = time.monotonic() + 120
    while len(losses(tmp_path / "run" / "1-quality")) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert f"Go on with: altdiff train {tmp_path / 'my.yaml'} --resume" in errors
    steps = len(losses(tmp_path / "run" / "1-quality"))
    assert [path.name for path in (tmp_path / "run" / "1-quality" / "states").iterdir()][-1:] != []
    assert steps < 500


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    m9_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    run = config(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW})
    monkeypatch.setattr("flagai_altdiff.checkpoint.saving.write_safetensors", full)
    with pytest.raises(DiskError, match=r"No space left on device\. The states are whole; make room .*--resume"):
        train(run)
    monkeypatch.undo()
    before = losses(tmp_path / "run" / "1-quality")
    load_path(train(run, resume=True))
    assert losses(tmp_path / "run" / "1-quality") == before
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_the_processes_that_read_end_with_the_run(m9_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    before = set(multiprocessing.active_children())
    train(config(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW}, data={"workers": 2}))
    assert set(multiprocessing.active_children()) <= before


# Several processes


def test_processes_that_see_different_data_are_stopped(
    m9_folder: Path, image_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    """Each in a folder of its own, where the same name means other images."""
    for rank in (0, 1):
        shutil.copytree(image_folder, tmp_path / str(rank) / "images")
    (tmp_path / "1" / "images" / "0.png").unlink()
    run = settings(m9_folder, "images", tmp_path / "run", {"stage": "quality", **DRAW}, sheets={"every": 0})
    words = command(tmp_path / "run.yaml", {**run, "machine": {"accelerator": "cpu", "devices": 2}})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    done = subprocess.run(
        [sys.executable, *torchrun, "sh", "-c", f"cd $LOCAL_RANK && {shlex.join(words)}"],
        env={**script_environment, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode and "the processes see different data" in done.stderr, done.stderr[-3000:]
    assert not list((tmp_path / "run").rglob("model"))


def test_other_data_are_told_of_when_a_run_goes_on(
    m9_folder: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    run = config(m9_folder, images, tmp_path / "run", {"stage": "quality", **DRAW})
    train(run)
    for again, told in (("same", 0), ("fewer", 1)):
        if again == "fewer":
            (images / "0.png").unlink()
        shutil.rmtree(tmp_path / "run" / "1-quality" / "model")
        train(run, resume=True)
        assert len([r for r in caplog.records if "are not those that this stage began with" in r.message]) == told


# What is wrong


def test_broken_images_are_named_once_and_left_out(
    m9_folder: Path, image_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(image_folder, whole)
    for name in ("3", "7"):
        for ending in ("png", "txt"):
            (whole / f"{name}.{ending}").unlink()
    with caplog.at_level(logging.WARNING):
        train(config(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW, "steps": 8}))
    named = [record.message for record in caplog.records if "left out of training" in record.message]
    assert sorted(line.split(": ")[1] for line in named) == ["3.png", "7.png"]
    assert all(loss > 0 for loss in losses(tmp_path / "run" / "1-quality"))


def test_a_loss_that_is_no_number_keeps_the_last_state(m9_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    wild = {**DRAW, "steps": 300, "learning_rate": 10.0, "warmup_steps": 0, "clip_norm": 0.0}
    run = config(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **wild}, sheets={"every": 0})
    with pytest.raises(
        NotFiniteError, match=r"the loss of step \d+ is (nan|inf); no state was saved before it\. Try a lower"
    ):
        train(run)
    assert not (tmp_path / "run" / "1-quality" / "model").exists()


def test_an_output_that_is_taken_stays_as_it_is(m9_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_bytes(b"x")
    with pytest.raises(InvalidRequestError, match="it holds a run; add --resume"):
        train(config(m9_folder, image_folder, tmp_path / "mine", {"stage": "quality", **DRAW}))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["photo.png"]
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((InvalidRequestError, DiskError), match="file"):
        train(config(m9_folder, image_folder, tmp_path / "file", {"stage": "quality", **DRAW}))


@pytest.mark.parametrize(
    ("stages", "more", "error", "match"),
    [
        (["teacher", "quality"], {}, ConfigError, "two runs"),
        (["teacher"], {}, ConfigError, "needs a teacher"),
        ([{"stage": "quality", "side": 100}], {}, InvalidRequestError, "side=100: expected a multiple of 16"),
        ([{**DRAW, "trainable": "nothing"}], {}, ConfigError, "no parameter"),
        ([{**DRAW, "trainable": "("}], {}, ConfigError, "trainable"),
        ([{**DRAW, "accumulate": 9}], {}, InvalidRequestError, "batch_size=4: expected at least accumulate"),
        ([DRAW], {"data": {"cache": True}}, ConfigError, "crop: centre"),
        ([{**DRAW, "trainable": ".*"}], {"data": {"cache": True, "crop": "centre"}}, ConfigError, "text encoder"),
        ([DRAW], {"data": {"prior": "p"}}, ConfigError, "prior_caption"),
        ([DRAW], {"data": {"source": "nowhere"}}, DataError, "nowhere does not exist"),
        ([DRAW], {"data": {"source": ["drawn:de", "nowhere"]}}, DataError, "nowhere|drawn"),
        ([DRAW], {"machine": {"accelerator": "tpu9"}}, ConfigError, "machine"),
        ([DRAW], {"machine": {"strategy": "fast"}}, ConfigError, "machine"),
        ([DRAW], {"machine": {"precision": "16"}}, ConfigError, "machine.precision=16 is for GPUs. Set bf16 or 32"),
        ([DRAW], {"model": "nobody"}, Exception, "nobody"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    stages: list[Any],
    more: dict[str, Any],
    error: type[Exception],
    match: str,
    m9_folder: Path,
    image_folder: Path,
    tmp_path: Path,
) -> None:
    model = more.pop("model", m9_folder)
    with pytest.raises(error, match=match):
        train(config(model, image_folder, tmp_path / "run", *stages, **more))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_folder_that_is_no_teacher(m9_folder: Path, text_file: Path, tmp_path: Path) -> None:
    run = config("AltCLIP-XLMR-L", text_file, tmp_path / "run", {"stage": "teacher", **SMALL}, teacher=str(m9_folder))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        train(run)


def test_a_student_of_another_width_is_refused(clip_folder: Path, text_file: Path, tmp_path: Path) -> None:
    student = tiny.write_altclip_folder(tmp_path / "match")
    run = config(student, text_file, tmp_path / "run", {"stage": "teacher", **SMALL}, teacher=str(clip_folder))
    with pytest.raises(ConfigError, match=r"teacher's feature has 32 numbers, that of .*match has 40"):
        train(run)


def test_a_server_that_dies_while_training_ends_the_run_and_another_goes_on(
    m9_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    files = {f"/{i}.tar": plain_shard(4, 4 * i) for i in range(2)}
    path, log = tmp_path / "run.yaml", tmp_path / "run" / "1-quality" / "log.csv"
    with serve(files={**files, "/0_stats.json": b'{"successes": 4}', "/1_stats.json": b'{"successes": 4}'}) as server:
        source, stage = f"{server.url}/{{0..1}}.tar", {"stage": "quality", **DRAW, "steps": 6, "batch_size": 1}

        def run(*words: str, **data: Any) -> int:
            data |= {"fetched": str(tmp_path / "shards")}
            path.write_text(json.dumps(settings(m9_folder, source, tmp_path / "run", stage, data=data)))
            monkeypatch.setattr(sys, "argv", ["altdiff", "train", str(path), *words])
            return main(sys.argv[1:])

        server.always["/1.tar"] = Fault(status=500)
        assert run() == 1
        said = capsys.readouterr().err
        assert "1.tar cannot be had: " in said and "HTTP 500" in said and "data.skip_shards: true" in said
        assert said.rstrip().endswith(f"Go on with: altdiff train {path} --resume")
        assert run("--resume", skip_shards=True) == 0, "what the dead server has is left out"
    assert [row["step"] for row in read_log(log)] == [1, 2, 3, 4, 5, 6]
    assert [found.name for found in (tmp_path / "shards").rglob("*.tar")] == ["0.tar"]


def test_a_log_for_tensorboard(m9_folder: Path, image_folder: Path, tmp_path: Path) -> None:
    run = config(
        m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW}, tensorboard=True, sheets={"every": 0}
    )
    train(run)
    (file,) = (tmp_path / "run" / "1-quality" / "tensorboard").glob("events.*")
    scalars = list(read_scalars(file))
    assert {name for name, _, _ in scalars} == {"loss", "learning_rate", "samples_per_second"}
    assert [step for name, step, _ in scalars if name == "loss"] == [1, 2, 3]
    written = [value for name, _, value in scalars if name == "loss"]
    assert written == pytest.approx(losses(tmp_path / "run" / "1-quality"), rel=1e-5)


def read_scalars(file: Path) -> Iterator[tuple[str, int, float]]:
    """Name, step and value of each number in a file of events; TensorBoard itself would bring forty packages."""
    from tensorboardX.proto.event_pb2 import Event

    data, place = file.read_bytes(), 0
    while place < len(data):  # length, its check, the record, its check
        length = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + length])
        yield from ((value.tag, event.step, value.simple_value) for value in event.summary.value)
        place += length + 16


def test_tensorboard_that_is_not_there_is_named(
    m9_folder: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    run = config(m9_folder, image_folder, tmp_path / "run", {"stage": "quality", **DRAW}, tensorboard=True)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flagai_altdiff\[tensorboard\]'"):
        train(run)
    assert not (tmp_path / "run").exists()


def test_texts_without_english_are_no_lesson(clip_folder: Path, xlmr_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "de.jsonl").write_text("\n".join(json.dumps({"de": f"Katze {n}"}) for n in range(50)))
    towers = {"teacher": str(clip_folder), "student": str(xlmr_folder)}
    run = config("x", tmp_path / "de.jsonl", tmp_path / "run", {"stage": "teacher", **SMALL, "steps": 100}, **towers)
    with pytest.raises(DataError, match="no English text"):
        train(run)
    assert not list((tmp_path / "run").rglob("model"))
