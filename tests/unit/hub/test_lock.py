"""Several processes, one folder."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import fetch, lock
from flagai_altdiff.hub.lock import folder_lock
from flagai_altdiff.hub.names import LOCK_NAME
from flagai_altdiff.registry import MODELS
from tests.servers import Fault, HubServer, serve

SPEC = MODELS["AltDiffusion-m18"]
FILES = {"config.yaml": b"model: {}", "model.ckpt": os.urandom(4_000_000), "sentencepiece.bpe.model": b"pieces"}
CKPT = "/files/100000/model.ckpt"
FETCH = """
import logging, sys
from pathlib import Path
from flagai_altdiff.hub import fetch
from flagai_altdiff.registry import MODELS
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
fetch(MODELS["AltDiffusion-m18"], Path(sys.argv[1]))
"""
HOLD = """
import sys, time
from pathlib import Path
from flagai_altdiff.hub.lock import folder_lock
with folder_lock(Path(sys.argv[1]), lambda: ""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FILES}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )


def start_holder(folder: Path) -> subprocess.Popen[str]:
    holder = start(HOLD, folder)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.fault(17)
def test_eight_processes_make_one_transfer(server: HubServer, tmp_path: Path) -> None:
    server.always[CKPT] = Fault(pause_s=0.01)
    processes = [start(FETCH, tmp_path / "model") for _ in range(8)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 8
    assert server.ranges(CKPT) == [None, "bytes=0-0"]  # and once whether it is still the same
    assert {name: (tmp_path / "model" / name).read_bytes() for name in FILES} == FILES
    waited = [text for text in said if "another process is filling" in text]
    assert len(waited) >= 1 and len(server.paths()) == 2 + 3 * len(FILES)


@pytest.mark.fault(17)
def test_a_waiting_process_says_what_it_waits_for_and_how_far_that_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "EVERY_S", 0.1)
    holder = start_holder(tmp_path)
    threading.Timer(0.35, holder.kill).start()
    with folder_lock(tmp_path, lambda: "1.2 GB so far"):
        pass
    holder.communicate()
    lines = [record.getMessage() for record in caplog.records]
    assert set(lines) == {f"another process is filling {tmp_path} (1.2 GB so far); waiting for it"}
    assert 2 <= len(lines) <= 8


@pytest.mark.fault(18)
def test_the_lock_of_a_killed_process_does_not_block(server: HubServer, tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    began = time.monotonic()
    fetch(SPEC, tmp_path)
    assert time.monotonic() - began < 30
    assert (tmp_path / "model.ckpt").read_bytes() == FILES["model.ckpt"]


@pytest.mark.fault(18)
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_used_with_a_warning(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(fd: int) -> bool:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock._unix, "lock_fd_nonblocking", refuse)
    with caplog.at_level(logging.WARNING):
        fetch(SPEC, tmp_path)
    assert "has no locks" in caplog.text
    assert (tmp_path / "model.ckpt").read_bytes() == FILES["model.ckpt"]


@pytest.mark.fault(18)
def test_without_locks_two_processes_do_not_disturb_each_other(server: HubServer, tmp_path: Path) -> None:
    server.always[CKPT] = Fault(pause_s=0.002)
    no_locks = "import errno, filelock._unix as unix\ndef refuse(fd): raise OSError(errno.ENOLCK, 'no locks')\n"
    code = no_locks + "unix.lock_fd_nonblocking = refuse\n" + FETCH
    processes = [start(code, tmp_path / "model") for _ in range(2)]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0, 0]
    assert {name: (tmp_path / "model" / name).read_bytes() for name in FILES} == FILES


@pytest.mark.fault(16)
def test_a_folder_that_cannot_be_written_to_is_named(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / LOCK_NAME).mkdir()
    with pytest.raises(HubError, match="Choose a folder that can be written to") as caught:
        fetch(SPEC, tmp_path / "model")
    assert caught.value.errno == errno.EISDIR
    assert server.requests == []


@pytest.mark.fault(20)
def test_a_link_planted_as_the_lock_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / LOCK_NAME).symlink_to(outside)
    with pytest.raises(HubError), folder_lock(tmp_path / "model", lambda: ""):
        pass
    assert not outside.exists()
