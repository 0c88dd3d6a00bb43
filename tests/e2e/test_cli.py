"""The command ``altdiff`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagai_altdiff import __version__
from flagai_altdiff.cli import main
from flagai_altdiff.registry import MODELS
from flagai_altdiff.request import OPTIONS

SMALL = ["-H", "64", "-W", "64", "--steps", "2", "-n", "1", "--no-safety-checker"]


def run(*words: str, status: int = 0) -> None:
    assert main(list(words)) == status


def usage_error(*words: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    assert exit_.value.code == 2


def test_generate_draws_and_names_its_files(
    m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", "a cat", "一只猫", "-m", str(m9_folder), "-o", str(tmp_path / "out"), *SMALL)
    named = capsys.readouterr().out.split()
    assert named == [
        str(tmp_path / "out" / name) for name in ("samples/00000.png", "samples/00001.png", "grid-0000.png")
    ]
    assert Image.open(named[0]).size == (64, 64)


def test_little_memory_draws_the_same(m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ("normal", "low", "lowest")
    for mode in modes:
        out = str(tmp_path / mode)
        run("generate", "a cat", "-m", str(m9_folder), "-o", out, *SMALL, "--memory", mode, "--seed", "7")
    images = [np.asarray(Image.open(tmp_path / mode / "samples" / "00000.png")).astype(int) for mode in modes]
    assert all(np.abs(image - images[0]).max() <= 1 for image in images)
    usage_error("generate", "a cat", "--memory", "least")
    assert "'lowest'" in capsys.readouterr().err


def test_the_embedded_model_says_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", "a red unicycle", "猫", "-n", "1", "--steps", "2", "--skip-grid", "-o", str(tmp_path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "knows nothing" in line]
    assert "'a red unicycle'" in line and "bicycle" in line and "things.json" in line


@pytest.mark.parametrize("spelling", ["--negative-prompt", "--negative_prompt"])
@pytest.mark.parametrize("steps", ["--steps", "--ddim_steps", "--ddim-steps"])
def test_flags_have_every_spelling(spelling: str, steps: str, m9_folder: Path, tmp_path: Path) -> None:
    words = ["-m", str(m9_folder), "--outdir", str(tmp_path), "--H", "64", "--W", "64", steps, "2", "--n_samples", "1"]
    run("generate", "a cat", spelling, "blurry", "--skip_grid", "--scale", "3", *words)
    record = json.loads(Image.open(tmp_path / "samples" / "00000.png").info["flagai_altdiff"])
    assert (record["negative_prompt"], record["steps"], record["guidance_scale"]) == ("blurry", 2, 3.0)


def test_prompts_from_a_file(m18_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffa cat\r\n\r\nقطة\r\n一只猫".encode())
    run("generate", "--from-file", str(prompts), "-m", str(m18_folder), "-o", str(tmp_path), *SMALL)
    records = [json.loads(Image.open(p).info["flagai_altdiff"]) for p in sorted((tmp_path / "samples").iterdir())]
    assert [r["prompt"] for r in records] == ["a cat", "قطة", "一只猫"]


def test_wrong_words_are_usage_errors(m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage_error()
    usage_error("draw")
    run("train", status=2)
    run("generate", "a cat", "--sampler", "ddimm", status=2)
    assert "ddim" in capsys.readouterr().err
    run("generate", status=2)
    run("generate", "a cat", "-m", "AltDiffusion-m81", status=2)
    assert "Did you mean 'AltDiffusion-m18'?" in capsys.readouterr().err
    run("generate", "a cat", "-m", str(m9_folder), "-o", str(tmp_path / "out"), "-H", "70", "-W", "72", status=2)
    error = capsys.readouterr().err
    assert "--W=72" in error
    assert "multiples of 16 px; the nearest is 64 or 80" in error
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_is_a_failure(m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((m9_folder / "model.ckpt").read_bytes()[:10_000])
    (tmp_path / "sentencepiece.bpe.model").write_bytes((m9_folder / "sentencepiece.bpe.model").read_bytes())
    run("generate", "a cat", "-m", str(broken), "-o", str(tmp_path / "out"), status=1)
    assert str(broken) in capsys.readouterr().err


def test_models_lists_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("models")
    text = capsys.readouterr().out
    assert all(name in text for name in MODELS)
    assert "en zh es fr ru ja ko ar it (9)" in text
    run("models", "--json")
    assert {m["name"] for m in json.loads(capsys.readouterr().out)} == set(MODELS)


def test_doctor_sees_the_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--model-dir", str(tmp_path)])
    text = capsys.readouterr().out
    assert __version__ in text
    for topic in ("torch", "import flagai", "cpu", "memory", "disk", "AltDiffusion-m18"):
        assert topic in text
    assert "! import flagai" not in text, "ours is no trouble"


def test_doctor_finds_the_real_flagai(tmp_path: Path) -> None:
    place = tmp_path / "flagai"
    place.mkdir()
    (place / "__init__.py").touch()
    (place / "data").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "flagai_altdiff", "doctor"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip uninstall flagai" in done.stdout


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "altdiff generate" in text
    assert "exit status" in text
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert "34234" in capsys.readouterr().out


def test_no_colour_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run("generate", "a cat", "-m", "nothing", status=2)
    assert "\033" not in capsys.readouterr().err


@pytest.mark.fault(121)
def test_a_prompt_that_looks_like_a_flag_is_not_changed(m9_folder: Path, tmp_path: Path) -> None:
    words = ["-m", str(m9_folder), "-o", str(tmp_path), *SMALL]
    run("generate", "--no_text red heart", "--skip_grid", *words)
    run("generate", "--skip_grid", *words, "--", "--n_samples", "--no_text=a b")
    records = [json.loads(Image.open(p).info["flagai_altdiff"]) for p in sorted((tmp_path / "samples").iterdir())]
    assert [r["prompt"] for r in records] == ["--no_text red heart", "--n_samples", "--no_text=a b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eta", "2"], "--eta=2.0: expected a number from 0 to 1"),
        (["--eta", "0.5", "--plms"], "--eta=0.5: eta must be 0 for PLMS"),
        (["--plms", "--sampler", "ddim"], "--plms=True: contradicts --sampler ddim"),
        (["--steps", "0"], "--steps=0: expected a whole number from 1 to 1000"),
        (["--n-rows", "-1"], "--n-rows=-1: expected a whole number"),
        (["--cfg-scale", "nan"], "--scale=nan: expected a number"),
        (["--seed", "-1", "--resume"], "--seed=-1: resume needs the seed"),
        (["--skip-save", "--resume"], "--skip-save=True: nothing is saved"),
        (["--from-file", "missing.txt"], "two sources of prompts"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    words: list[str], message: str, m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("generate", "a cat", "-m", str(m9_folder), "-o", str(tmp_path / "out"), *words, status=2)
    error = capsys.readouterr().err
    assert message in error
    assert "loading" not in error
    assert not (tmp_path / "out").exists()


def test_every_option_has_its_flags_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    for option in OPTIONS.values():
        assert all(flag in text for flag in option.flags)


def test_comments_of_a_prompt_file_are_left_out(m9_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# animals\na cat\n")
    run("generate", "--from-file", str(prompts), "--comments", "-m", str(m9_folder), "-o", str(tmp_path), *SMALL)
    assert len(list((tmp_path / "samples").iterdir())) == 1


@pytest.mark.fault(118)
def test_a_folder_whose_name_is_no_text_is_printed(
    m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\xe8"
    words: list[str | bytes] = [
        sys.executable,
        "-m",
        "flagai_altdiff",
        "generate",
        "a cat",
        "-m",
        str(m9_folder),
        *SMALL,
    ]
    words += ["-o", folder]
    environment = {**script_environment, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff\\udce8/samples/00000.png" in done.stdout
    assert os.listdir(folder + b"/samples") == [b"00000.png"]
