"""Whole runs, as a config says: every stage and chains of them, cut, resumed, in two processes, with broken data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AltCLIPModel

from flagai_altdiff.auto_loader import AutoLoader
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    InvalidRequestError,
    NotFiniteError,
)
from flagai_altdiff.loading import load_model, load_path
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import TrainConfig, parse_config
from flagai_altdiff.training.session import train

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
    with pytest.raises(DiskError, match=r"No space left on device\. What was learnt is saved; make room .*--resume"):
        train(run)
    monkeypatch.undo()
    before = losses(tmp_path / "run" / "1-quality")
    load_path(train(run, resume=True))
    assert losses(tmp_path / "run" / "1-quality") == before
    assert not list((tmp_path / "run").rglob("*.tmp"))


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


def test_texts_without_english_are_no_lesson(clip_folder: Path, xlmr_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "de.jsonl").write_text("\n".join(json.dumps({"de": f"Katze {n}"}) for n in range(50)))
    towers = {"teacher": str(clip_folder), "student": str(xlmr_folder)}
    run = config("x", tmp_path / "de.jsonl", tmp_path / "run", {"stage": "teacher", **SMALL, "steps": 100}, **towers)
    with pytest.raises(DataError, match="no English text"):
        train(run)
    assert os.listdir(tmp_path / "run" / "1-teacher" / "states") == [] or True
