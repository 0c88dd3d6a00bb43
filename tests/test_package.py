"""What is true of the package as a whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flagai_altdiff

ROOT = Path(__file__).parent.parent


def python(code: str, cwd: Path | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "flagai_altdiff" / "_shim")])}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_public_name_can_be_imported() -> None:
    for name in flagai_altdiff.__all__:
        value = getattr(flagai_altdiff, name)
        assert getattr(value, "__module__", "flagai_altdiff").startswith("flagai_altdiff")


def test_flagais_names_are_ours_and_importing_writes_nothing(tmp_path: Path) -> None:
    code = (
        "from flagai.auto_model.auto_loader import AutoLoader; from flagai.model.predictor.predictor import Predictor;"
        "import flagai_altdiff as ours; print(AutoLoader is ours.AutoLoader and Predictor is ours.Predictor)"
    )
    assert python(code, cwd=tmp_path) == "True"
    assert list(tmp_path.iterdir()) == []


def test_the_embedded_model_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert flagai_altdiff.load_model("altdiffusion-MINI").spec.name == "AltDiffusion-mini"
