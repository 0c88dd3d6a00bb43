"""Processes that are stopped, killed or refused by the disk: finished pictures stay whole, and the rest can be drawn
later."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from flagai_altdiff.cli import main
from tests.processes import take_ctrl_c

COUNT = 40


def words(model: Path, out: Path) -> list[str]:
    size = ["-H", "64", "-W", "64", "--steps", "2", "-n", "2", "--no-safety-checker"]
    return ["generate", "a cat", "-m", str(model), "-o", str(out), *size, "--n-iter", str(COUNT // 2)]


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): Image.open(p).tobytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def whole(m9_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed process makes."""
    out = tmp_path_factory.mktemp("whole")
    assert main(words(m9_folder, out)) == 0
    return pictures(out)


def start(arguments: list[str], prepare: Callable[[], object] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flagai_altdiff", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


@pytest.mark.fault(53)
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_process_is_resumed(
    sent: signal.Signals, status: int, whole: dict[str, bytes], m9_folder: Path, tmp_path: Path
) -> None:
    process = start(words(m9_folder, tmp_path), take_ctrl_c)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "samples" / "00002.png").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, error
    assert "Traceback" not in error
    finished = pictures(tmp_path)
    assert 3 <= len(finished) <= COUNT
    assert finished.items() <= whole.items()
    if sent != signal.SIGKILL:
        assert "--resume" in error
        assert [p.name for p in tmp_path.iterdir()] == ["samples"]
    assert main([*words(m9_folder, tmp_path), "--resume"]) == 0
    assert pictures(tmp_path) == whole


@pytest.mark.fault(54)
def test_a_full_disk_keeps_what_was_saved(whole: dict[str, bytes], m9_folder: Path, tmp_path: Path) -> None:
    """The grid is the only file that is larger than the limit."""
    limit = 60_000

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(words(m9_folder, tmp_path), small_files)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"{tmp_path}: File too large. What was saved before stays. Make room, and go on with resume." in error
    assert pictures(tmp_path) == {name: data for name, data in whole.items() if name.startswith("samples/")}
    assert [p.name for p in tmp_path.iterdir()] == ["samples"]
    assert main([*words(m9_folder, tmp_path), "--resume"]) == 0
    assert pictures(tmp_path) == whole


@pytest.mark.fault(54)
def test_a_folder_that_cannot_be_written_is_named_before_drawing(
    m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        assert main(words(m9_folder, out)) == 1
        error = capsys.readouterr().err
        assert f"error: images cannot be saved in {out}: " in error and "Choose another folder" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.fault(54)
def test_a_missing_folder_is_made(m9_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "日本語" / "a b" / "c"
    assert main([*words(m9_folder, out), "--n-iter", "1"]) == 0
    assert len(pictures(out)) == 3
