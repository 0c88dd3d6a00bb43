"""Work side by side, progress, and an end that is quick."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import fetch, progress
from flagai_altdiff.hub.progress import Progress, human
from flagai_altdiff.hub.threads import Stop, Stopped, run_all
from flagai_altdiff.registry import MODELS
from tests.processes import take_ctrl_c
from tests.servers import Fault, HubServer, serve

SPEC = MODELS["AltDiffusion"]
FILES = {"config.yaml": b"model: {}", "model.ckpt": bytes(400_000), "sentencepiece.bpe.model": bytes(300_000)}
FETCH = """
import logging, sys
from pathlib import Path
from flagai_altdiff.hub import fetch
from flagai_altdiff.registry import MODELS
logging.basicConfig(level=logging.INFO, format="%(message)s")
fetch(MODELS["AltDiffusion"], Path(sys.argv[1]))
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FILES}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


def test_tasks_run_side_by_side_up_to_the_limit() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def task() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1

    run_all([task] * 12, Stop(), limit=3)
    assert (now, most) == (0, 3)
    run_all([], Stop())


def test_the_first_failure_stops_the_others() -> None:
    stop, done = Stop(), []

    def fail() -> None:
        raise ValueError("first")

    def wait() -> None:
        stop.wait(60)
        done.append("waited")

    began = time.monotonic()
    with pytest.raises(ValueError, match="first"):
        run_all([wait, fail, wait, wait, wait], stop, limit=2)
    assert time.monotonic() - began < 10 and done == []
    with pytest.raises(Stopped):
        stop.check()


def test_files_come_side_by_side(server: HubServer, tmp_path: Path) -> None:
    both, met = threading.Barrier(2, timeout=30), threading.Event()
    original = HubServer.next_fault

    def meet(self: HubServer, path: str) -> Fault:
        if path.endswith((".ckpt", ".bpe.model")) and not met.is_set():  # at the end they are asked once more
            both.wait()
            met.set()
        return original(self, path)

    server.__class__ = type("Meeting", (HubServer,), {"next_fault": meet})
    fetch(SPEC, tmp_path / "model")
    assert (tmp_path / "model" / "model.ckpt").read_bytes() == FILES["model.ckpt"]


@pytest.mark.fault(19)
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it_soon_and_what_arrived_is_used(
    server: HubServer, tmp_path: Path, sign: signal.Signals
) -> None:
    for name in ("model.ckpt", "sentencepiece.bpe.model"):
        server.always[server.file_path(SPEC.name, name)] = Fault(cut_at=None, pause_s=0.3)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, str(tmp_path)], env=environment, stderr=subprocess.PIPE, preexec_fn=take_ctrl_c
    )
    until = time.monotonic() + 60
    while sum(path.stat().st_size > 20_000 for path in tmp_path.rglob("*.part")) < 2:
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    began = time.monotonic()
    process.send_signal(sign)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert not (tmp_path / "model.ckpt").exists() and not (tmp_path / "sentencepiece.bpe.model").exists()
    server.always.clear()
    server.requests.clear()
    fetch(SPEC, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == FILES
    for name in ("model.ckpt", "sentencepiece.bpe.model"):
        assert re.fullmatch(r"bytes=[1-9]\d+-", server.ranges(server.file_path(SPEC.name, name))[0] or "")


def test_a_failure_ends_files_that_are_still_coming(server: HubServer, tmp_path: Path) -> None:
    server.always[server.file_path(SPEC.name, "model.ckpt")] = Fault(pause_s=60.0)
    server.always[server.file_path(SPEC.name, "sentencepiece.bpe.model")] = Fault(status=403, stall_s=0.2)
    began = time.monotonic()
    with pytest.raises(HubError, match="HTTP 403"):
        fetch(SPEC, tmp_path / "model")
    assert time.monotonic() - began < 10
    assert threading.active_count() < 20


@pytest.mark.fault(27)
def test_without_a_terminal_there_are_plain_lines(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "EVERY_S", 0.05)
    server.always[server.file_path(SPEC.name, "model.ckpt")] = Fault(pause_s=0.01)
    caplog.set_level(logging.INFO)
    fetch(SPEC, tmp_path / "model")
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"AltDiffusion: [\d.]+ kB, \d+ %, .*/s", line) for line in lines)
    assert any("model.ckpt: downloaded 400000 bytes" in line for line in lines)
    assert not re.search(r"[\r\x1b]", "".join(lines) + capfd.readouterr().err)


def on_terminal(folder: Path, **variables: str) -> str:
    """What a fetch writes to a terminal."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm", **variables}
    process = subprocess.Popen([sys.executable, "-c", FETCH, str(folder)], env=environment, stderr=slave, stdout=slave)
    os.close(slave)
    text = b""
    try:
        while piece := os.read(master, 65536):
            text += piece
    except OSError:  # the other side is closed
        pass
    os.close(master)
    assert process.wait(timeout=60) == 0
    return text.decode()


@pytest.mark.fault(27)
def test_on_a_terminal_there_is_a_bar_per_file_and_one_for_the_model(server: HubServer, tmp_path: Path) -> None:
    server.always[server.file_path(SPEC.name, "model.ckpt")] = Fault(pause_s=0.01)
    text = on_terminal(tmp_path / "a", NO_COLOR="1")
    assert "AltDiffusion:" in text and "model.ckpt:" in text and "%|" in text
    assert not re.search(r"\x1b\[[\d;]*m", text)


@pytest.mark.fault(27)
@pytest.mark.parametrize("variable", [{"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, {"TERM": "dumb"}])
def test_bars_can_be_switched_off(server: HubServer, tmp_path: Path, variable: dict[str, str]) -> None:
    assert "%|" not in on_terminal(tmp_path / "a", **variable)


def test_progress_may_go_back() -> None:
    with Progress("model", 100) as whole, whole.file("a", 100) as report:
        for position in (10, 60, 0, 100):
            report(position, 100)
        assert whole._done == 100


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (5_070_000, "5.1 MB"), (7_700_000_000, "7.70 GB")]
)
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert human(size) == text
