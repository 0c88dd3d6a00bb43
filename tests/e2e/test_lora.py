"""LoRAs and DreamBooth as a user types them: trained from a few images, drawn with, told in the images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flagai_altdiff import load_model, lora
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.cli import main
from flagai_altdiff.training import session
from flagai_altdiff.training.callbacks import latest_state, read_log
from flagai_altdiff.training.config import TrainConfig, parse_config
from tests import tiny
from tests.data_files import noise_bytes

SMALL = ["-H", "64", "-W", "64", "--steps", "2", "-n", "1", "--no-safety-checker"]
FEW = ["--side", "64", "--steps", "4", "--batch-size", "2", "--learning-rate", "0.01"]
Errors = pytest.CaptureFixture[str]


def write_lora(path: Path, name: str, seed: int = 1) -> Path:
    model = tiny.fresh_model(name)
    lora.make_trainable(model, rank=2, alpha=2.0, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(".up"):
                parameter.fill_(0.05)
    lora.save_lora(path, lora.finished(model), model.config)
    return path


@pytest.fixture
def robot(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "robot.safetensors", "m9")


def generate(model: Path, out: Path, *words: str, status: int = 0) -> list[dict[str, Any]]:
    """Draw an image; the records of all images in the folder, each with what the image shows and its parameters."""
    assert main(["generate", "a cat", "-m", str(model), "-o", str(out), *SMALL, *words]) == status
    records = []
    for path in sorted((out / "samples").glob("*.png")):
        with Image.open(path) as image:
            record = json.loads(image.info["flagai_altdiff"])
            records.append({**record, "pixels": image.tobytes(), "parameters": image.info["parameters"]})
    return records


def test_an_image_tells_its_loras(m9_folder: Path, robot: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "style: 2, x.safetensors", "m9", seed=2)
    plain, one, both = (
        generate(m9_folder, tmp_path / name, *words)[0]
        for name, words in (
            ("plain", []),
            ("one", ["--lora", str(robot)]),
            ("both", ["--lora", f"{robot}:0.5", "--lora", f"{tmp_path}/style: 2, x.safetensors:-2"]),
        )
    )
    assert len({plain["pixels"], one["pixels"], both["pixels"]}) == 3
    assert "loras" not in plain and "Lora" not in plain["parameters"]
    first, second = both["loras"]
    assert one["loras"] == [{**first, "strength": 1.0}]
    assert (first["name"], first["strength"], len(first["sha256"])) == ("robot", 0.5, 10)
    assert (second["name"], second["strength"]) == ("style: 2, x", -2.0)
    assert f'Lora hashes: "robot: {first["sha256"]}"' in one["parameters"]
    assert f'Lora hashes: "robot: {first["sha256"]}, style: 2, x: {second["sha256"]}"' in both["parameters"]


def test_images_of_other_strengths_are_drawn_again_in_one_call(m9_folder: Path, robot: Path, tmp_path: Path) -> None:
    drawn = [generate(m9_folder, tmp_path / f"{x}", "--lora", f"{robot}:{x}")[0] for x in (0.8, 0.5)]
    files = [str(next((tmp_path / f"{x}" / "samples").glob("*.png"))) for x in (0.8, 0.5)]
    assert main(["redraw", *files, "-m", str(m9_folder), "--lora", str(robot), "-o", str(tmp_path / "again")]) == 0
    again = [Image.open(path).tobytes() for path in sorted((tmp_path / "again").rglob("0*.png"))]
    assert again == [record["pixels"] for record in drawn]


def test_strength_zero_draws_what_the_model_draws(m9_folder: Path, robot: Path, tmp_path: Path) -> None:
    plain = generate(m9_folder, tmp_path / "plain")[0]
    assert generate(m9_folder, tmp_path / "zero", "--lora", f"{robot}:0")[0]["pixels"] == plain["pixels"]


def test_resume_tells_runs_with_other_loras_apart(m9_folder: Path, robot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def count(*words: str) -> int:
        return len(generate(m9_folder, out, "--resume", "--skip-grid", *words))

    assert count() == count() == 1
    assert count("--lora", str(robot)) == count("--lora", f"{robot}:1") == 2
    assert count("--lora", f"{robot}:0.5") == 3
    write_lora(robot, "m9", seed=9)
    assert count("--lora", str(robot)) == 4, "another file of the same name"
    assert count("--lora", str(robot), "--lora", str(robot)) == 5
    assert count() == 5


@pytest.mark.parametrize("name", ["C:\\loras\\robot.safetensors", "a:b.safetensors", "robot:2", "机器人.safetensors"])
def test_names_with_colons(name: str, m9_folder: Path, robot: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    robot.rename(name)
    for typed, strength in ((name, 1.0), (f"{name}:0.25", 0.25), (f"{name}:-1e-1", -0.1)):
        (record,) = generate(m9_folder, tmp_path / str(strength), "--lora", typed)
        assert record["loras"][0]["strength"] == strength


def test_what_cannot_be_added_is_told_before_the_model_is_loaded(
    m9_folder: Path, m18_folder: Path, robot: Path, tmp_path: Path, capsys: Errors
) -> None:
    def refused(typed: object, *said: str, model: Path = m9_folder, status: int = 2) -> None:
        generate(model, tmp_path / "out", "--lora", str(typed), status=status)
        error = capsys.readouterr().err
        assert "--lora" in error or status == 1
        assert all(text in error for text in said), error
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "nothing.safetensors", "there is no", "nothing.safetensors")
    refused(f"{tmp_path}/nothing.safetensors:0.8", "there is no", "nothing.safetensors")
    refused(tmp_path, "the name of a file in that folder")
    refused(f"{robot}:strong", "a number behind the last colon", ":0.8")
    refused(f"{robot}:80", "a number from -10 to 10")
    refused(f"{robot}:nan", "a number from -10 to 10")
    refused("", "a file")
    # The weights of this one are broken, which would be told if they were looked at.
    hollow = tmp_path / "hollow"
    shutil.copytree(m18_folder, hollow)
    state = tiny.tiny_state("m18")
    weights = {key: value for key, value in state.items() if value.is_floating_point()}
    torch.save({key: torch.full_like(value, torch.nan) for key, value in weights.items()}, hollow / "model.ckpt")
    refused(robot, "is a LoRA for another model", model=hollow, status=1)
    (tmp_path / "page.safetensors").write_text("<html>")
    refused(tmp_path / "page.safetensors", "neither safetensors nor", status=1)
    refused(m9_folder / "model.ckpt", "is no LoRA", status=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(noise_bytes((80 + number, 70)))
    return folder


def train(what: str, model: Path, images: Path, *words: str, status: int = 0) -> None:
    assert main(["train", what, "-m", str(model), "--images", str(images), *FEW, *words]) == status


def test_a_lora_is_trained_and_drawn_with(
    m9_folder: Path, images: Path, tmp_path: Path, capsys: Errors, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    train("lora", m9_folder, images, "--prompt", "a robot", "--rank", "3", "--sheet", "a robot", "--sheet", "a cat")
    shown = capsys.readouterr()
    file = Path("runs/lora/1-lora/lora.safetensors")
    assert shown.out == f"{file}\n"
    assert f"altdiff generate -m {m9_folder} --lora {file} 'a robot'" in shown.err
    assert Image.open(file.with_name("sheet.png")).width > 2 * 128
    merged = load_model(file.with_name("model"), safety_checker=False)
    added = load_model(m9_folder, safety_checker=False)
    lora.add_lora(added, file)
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(added.state_dict()[name], weight, atol=1e-5, rtol=1e-5)
    assert {tensor.shape[0] for key, tensor in read_tensors(file).items() if "lora_down" in key} == {3}
    train("lora", m9_folder, images, "--prompt", "a robot", status=2)
    assert "it holds a run" in capsys.readouterr().err


def test_dreambooth_keeps_a_prior_averages_and_goes_on(m9_folder: Path, images: Path, tmp_path: Path) -> None:
    words = ["--prompt", "a robot", "--prior", str(tmp_path / "prior"), "--prior-count", "3", "--ema-decay", "0.5"]
    words += ["--class-prompt", "a cat", "--class-prompt", "a castle"]
    train("dreambooth", m9_folder, images, *words, "-o", str(tmp_path / "whole"))
    drawn = sorted(path.name for path in (tmp_path / "prior").iterdir())
    assert drawn == [f"0000{i}.{end}" for i in range(3) for end in ("png", "txt")]
    assert [(tmp_path / "prior" / f"0000{i}.txt").read_text() for i in range(3)] == ["a cat", "a castle", "a cat"]
    (tmp_path / "prior" / "00001.png").unlink()  # as if it had been interrupted
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    stage = tmp_path / "cut" / "1-dreambooth"
    shutil.rmtree(stage / "model")
    train("dreambooth", m9_folder, images, *words, "-o", str(tmp_path / "cut"), "--resume")
    models = (tmp_path / name / "1-dreambooth" / "model" for name in ("whole", "cut"))
    whole, cut = (load_model(folder, safety_checker=False).state_dict() for folder in models)
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items())
    assert len(read_log(stage / "log.csv")) == 4


def test_a_lora_that_was_cut_goes_on_to_the_same_file(m9_folder: Path, images: Path, tmp_path: Path) -> None:
    def config(name: str) -> TrainConfig:
        stage = {"stage": "lora", "steps": 6, "batch_size": 2, "side": 64, "learning_rate": 0.01, "ema_decay": 0.5}
        data = {"source": str(images), "caption": "a robot"}
        output = str(tmp_path / name)
        settings = {"model": str(m9_folder), "output": output, "stages": [stage], "data": data, "save_every": 4}
        return parse_config({**settings, "sheets": {"every": 0}})

    session.train(config("whole"))
    cut = tmp_path / "cut" / "1-lora"
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    newest = latest_state(cut / "states")
    assert newest is not None
    newest.unlink()
    shutil.rmtree(cut / "model")
    (cut / session.LORA).unlink()
    session.train(config("cut"), resume=True)
    whole, again = (read_tensors(tmp_path / name / "1-lora" / session.LORA) for name in ("whole", "cut"))
    assert whole.keys() == again.keys() and all(torch.equal(tensor, again[key]) for key, tensor in whole.items())


def test_images_that_somebody_put_there_are_the_prior(m9_folder: Path, images: Path, tmp_path: Path) -> None:
    prior = tmp_path / "cats"
    prior.mkdir()
    (prior / "tom.JPG").write_bytes(noise_bytes((70, 70)))
    words = ["--prompt", "a robot", "--prior", str(prior), "--class-prompt", "a cat", "-o", str(tmp_path / "run")]
    train("dreambooth", m9_folder, images, *words)
    assert [path.name for path in prior.iterdir()] == ["tom.JPG"]


def test_captions_may_lie_beside_the_images(m9_folder: Path, images: Path, tmp_path: Path, capsys: Errors) -> None:
    train("lora", m9_folder, images, "-o", str(tmp_path / "run"), status=1)
    assert "caption" in capsys.readouterr().err
    for path in list(images.iterdir()):
        path.with_suffix(".txt").write_text("a robot on a red background")
    train("lora", m9_folder, images, "-o", str(tmp_path / "run2"))


def test_flags_that_do_not_go_together(m9_folder: Path, images: Path, capsys: Errors) -> None:
    train("dreambooth", m9_folder, images, "--prompt", "a", "--prior", "x", status=2)
    assert "--class-prompt" in capsys.readouterr().err
    train("dreambooth", m9_folder, images, "--prompt", "a", "--rank", "3", status=2)
    assert "--rank is a LoRA's" in capsys.readouterr().err
    train("lora", m9_folder, images, "--prompt", "a", "--prior-count", "3", status=2)
    assert "--prior-count needs --prior DIR" in capsys.readouterr().err
    assert main(["train", "lora", "--prompt", "a robot"]) == 2
    assert "--images" in capsys.readouterr().err
    assert main(["train", "my.yaml", "--steps", "100", "-o", "second"]) == 2
    assert "my.yaml says what --steps and --output would say" in capsys.readouterr().err
