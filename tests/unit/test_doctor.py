"""What the report on a machine says, and what it does not load for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flagai_altdiff.doctor import Finding, examine

LOADS = """
import sys
from pathlib import Path
from flagai_altdiff.doctor import examine
assert len(list(examine(Path(sys.argv[1])))) > 10
print(sorted({"transformers", "pytorch_lightning", "requests", "flagai"} & set(sys.modules)))
"""
ROOT = Path(__file__).parent.parent.parent


def advice(model_dir: Path) -> list[Finding]:
    """But for the processor, which tests keep busy."""
    return [finding for finding in examine(model_dir) if finding.advice and finding.topic != "cpu"]


def test_looking_loads_neither_transformers_nor_lightning(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "flagai_altdiff" / "_shim")])}
    words = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HF_ENDPOINT", "hf-mirror.example"),
        ("FLAGAI_ALTDIFF_BAAI_ENDPOINT", "'https://model.example'"),
        ("FLAGAI_ALTDIFF_MIRROR", "mirror.example"),
        ("HF_TOKEN", "hf_a b"),
        ("REQUESTS_CA_BUNDLE", "/nowhere/bundle.pem"),
        ("HTTPS_PROXY", "socks5://me:secret@127.0.0.1:1080"),
    ],
)
def test_a_wrong_variable_is_advised_on(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    (finding,) = [finding for finding in advice(tmp_path) if finding.topic == "network"]
    assert variable in finding.advice and "secret" not in finding.advice


def test_without_the_name_flagai_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [f.advice for f in advice(tmp_path) if f.topic == "import flagai"] == ["pip install flagai-altdiff"]


def test_a_busy_processor_and_the_engines_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (0.5, 9.0, 9.0))
    found = {finding.topic: finding for finding in examine(tmp_path)}
    assert found["cpu"].state == "4 cores, 4 threads, load 0.5" and not found["cpu"].advice
    assert found["engines"].state.startswith("eager, packed, openvino")
    monkeypatch.setattr("os.getloadavg", lambda: (3.0, 0.0, 0.0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {finding.topic: finding for finding in examine(tmp_path)}
    assert found["cpu"].advice.endswith("try OMP_NUM_THREADS=2")
    assert "openvino (pip install openvino)" in found["engines"].state
