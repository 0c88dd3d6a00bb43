"""Every script in examples/ does what it says, with the embedded model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ELSEWHERE = {"ray_serve.py"}
"""Tried by tests of their own."""
FOUND = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
EXAMPLES = [script for script in FOUND if script.name not in ELSEWHERE]
PICTURES = {"drawing.py": 12, "languages.py": 19, "preview.py": 5, "quickstart.py": 13, "train_lora.py": 24}
ARGUMENTS = {"train_lora.py": ["2"]}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda p: p.name)
def test_the_example_runs(script: Path, tmp_path: Path, script_environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(script), *ARGUMENTS.get(script.name, [])],
        cwd=tmp_path,
        env=script_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("*.png"))) == PICTURES[script.name]
