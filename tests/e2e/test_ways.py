"""More ways to draw, through every door: the command line, FlagAI's call, AutoLoader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagai_altdiff import AutoLoader, Predictor
from flagai_altdiff.cli import main
from flagai_altdiff.metadata import read_record
from tests import tiny

SMALL = ["--steps", "3", "--seed", "1", "-n", "1", "--no-safety-checker", "--skip-grid"]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


def drawn(folder: Path, model: Path, *words: str) -> list[Path]:
    assert main(["generate", *words, "-m", str(model), *SMALL, "--outdir", str(folder)]) == 0
    return sorted((folder / "samples").iterdir())


def test_on_the_command_line(m9_folder: Path, picture: Path, tmp_path: Path) -> None:
    begun = ["a cat", "--init-image", str(picture)]
    for number, (words, size) in enumerate(
        (
            ([*begun, "--strength", "0.7"], (64, 64)),
            ([*begun, "--mask", "8,8,40,40", "--mask-feather", "4", "--strength", "1"], (64, 64)),
            ([*begun, "--outpaint", "left=32,bottom=16"], (96, 80)),
            ([*begun, "--mask", "8,8,24,24", "--mask-full-resolution", "-H", "64", "-W", "64"], (64, 64)),
            (["a cat | a dog", "-H", "64", "-W", "160", "--window", "64", "--stretches"], (160, 64)),
            (["a cat", "-H", "64", "-W", "64", "--hires", "2", "--hires-upscaler", "latent"], (128, 128)),
            (["a (cat:1.3) BREAK dog", "--prompt-syntax", "weighted", "-H", "64", "-W", "64"], (64, 64)),
            (["a cat", "-H", "64", "-W", "64", "--sampler", "DPM++ 2M Karras", "--seamless", "xy"], (64, 64)),
        )
    ):
        (file,) = drawn(tmp_path / str(number), m9_folder, *words)
        assert Image.open(file).size == size
        assert read_record(file)["model"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--strength", "0.5"], "--strength=0.5: it has no effect without --init-image"),
        (["--init-image", "gone.png"], "--init-image=.*No such file"),
        (["--stretches"], "--stretches=True: it has no effect without --window"),
        (["--sampler", "DPM3"], "DPM3"),
        (["--init-image", "gone.png", "--ground", "no colour"], "--init-image=.*No such file"),
        (["--outpaint", "up=3"], "--outpaint='up=3': expected sides"),
        (["--sampler", "DPM++ 2M Karras", "--grid", "trailing"], "--grid='trailing': contradicts"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["generate", "a cat", *words, "--outdir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert re.search(message, shown) and "loading" not in shown
    assert not (tmp_path / "out").exists()


def test_a_file_with_a_request_on_each_line(m9_folder: Path, picture: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a cat", "H": 64, "W": 64},
        {"prompt": "a dog", "init_image": str(picture), "strength": 0.6, "seed": 9},
        {"prompts": ["a", "b"], "height": 64, "width": 96, "sampler": "Euler a"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    files = drawn(tmp_path / "out", m9_folder, "--from-file", str(file))
    assert [Image.open(path).size for path in files] == [(64, 64), (64, 64), (96, 64), (96, 64)]
    assert [read_record(path)["request_seed"] for path in files] == [1, 9, 1, 1]
    file.write_text('{"prompt": "a cat", "step": 3}')
    assert main(["generate", "--from-file", str(file), "-m", str(m9_folder)]) == 2


def test_flagais_call_takes_them(m9_folder: Path, picture: Path, tmp_path: Path) -> None:
    loader = AutoLoader(task_name="img2img", model_name=str(m9_folder), safety_checker=False)
    predictor = Predictor(loader.get_model())
    result = predictor.predict_generate_images(
        tiny.CAT, tmp_path / "out", n_samples=2, ddim_steps=4, init_image=picture, strength=0.5, mask_image="0,0,32,64"
    )
    given = np.asarray(Image.open(picture))
    assert len(result.images) == 2
    assert all((np.asarray(image)[:, 32:] == given[:, 32:]).all() for image in result.images)
    with pytest.raises(TypeError, match="did you mean 'init_image'"):
        predictor.predict_generate_images(tiny.CAT, tmp_path / "out", inti_image=picture)
