"""Scripts in the manner of FlagAI's README and examples run unchanged, as processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests import tiny

README = """
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

loader = AutoLoader(task_name="text2img",  # contrastive learning is not here
                    model_name="AltDiffusion-m18",
                    model_dir="./checkpoints")
model = loader.get_model()
model.eval()
model.to(device)
predictor = Predictor(model)
prompt = "Anime portrait of a castle on a hill by (artist), 4k"
predictor.predict_generate_images(prompt, H=64, W=64, ddim_steps=2, n_samples=2)
"""

GENERATE = """
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

loader = AutoLoader(task_name="text2img", model_name="AltDiffusion", model_dir="./checkpoints", fp16=False)
model = loader.get_model()
model.eval()
model.to("cuda" if torch.cuda.is_available() else "cpu")
predictor = Predictor(model)

prompt = "一只戴着帽子的小狗坐在草地上, a photo of a cat"
negative_prompt = "lowres, bad anatomy, bad hands, text, error, missing fingers, fewer digits, cropped, " * 4
predictor.predict_generate_images(
    prompt,
    negative_prompt=negative_prompt,
    outpath="./AltDiffusionOutputs",
    H=64, W=96, ddim_steps=2, n_samples=1, seed=553124,
)
"""


def run(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("script", "name", "family", "size", "count"),
    [(README, "AltDiffusion-m18", "m18", (64, 64), 2), (GENERATE, "AltDiffusion", "m9", (96, 64), 1)],
    ids=["README", "generate"],
)
def test_pictures_appear(
    script: str,
    name: str,
    family: str,
    size: tuple[int, int],
    count: int,
    tmp_path: Path,
    script_environment: dict[str, str],
) -> None:
    tiny.write_flagai_folder(tmp_path / "checkpoints" / name, family)
    done = run(script, tmp_path, script_environment)
    assert done.returncode == 0, done.stderr
    samples = sorted((tmp_path / "AltDiffusionOutputs" / "samples").iterdir())
    assert [p.name for p in samples] == [f"{i:05d}.png" for i in range(count)]
    assert {Image.open(p).size for p in samples} == {size}
    assert (tmp_path / "AltDiffusionOutputs" / "grid-0000.png").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["AltDiffusionOutputs", "checkpoints"]
    assert done.stdout == ""
    assert "NOT checked" in done.stderr
