"""A real server on this machine: ``altdiff serve`` in a process of its own, as people start it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

START_S = 120
FEW = {"steps": 4}
"""Options of a picture that takes a fifth of a second."""


@dataclass
class Server:
    """A server that runs.

    Args:
        url: Where.
        folder: Its current folder, with ``AltDiffusionOutputs``.
        process: It.
    """

    url: str
    folder: Path
    process: subprocess.Popen[str]
    session: requests.Session = field(default_factory=requests.Session)

    @property
    def log(self) -> str:
        """What it has said."""
        return (self.folder / "log").read_text(encoding="utf-8")

    @property
    def samples(self) -> Path:
        """Where its images are."""
        return self.folder / "AltDiffusionOutputs" / "samples"

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.session.get(self.url + path, timeout=60, **options)

    def post(self, path: str, body: object = None, **options: Any) -> requests.Response:
        return self.session.post(self.url + path, json=body, timeout=60, **options)

    def submit(self, prompt: str = "a red heart", **options: Any) -> dict[str, Any]:
        """A job that was accepted."""
        answer = self.post("/api/jobs", {"prompt": prompt, **FEW, **options})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.get(f"/api/jobs/{job_id}").json())

    def finished(self, job_id: str, timeout_s: float = 90) -> dict[str, Any]:
        """A job when it is over."""
        return self.until(lambda: self.job(job_id), lambda job: job["state"] not in ("waiting", "drawing"), timeout_s)

    def until(self, ask: Callable[[], Any], enough: Callable[[Any], object], timeout_s: float = 90) -> Any:
        deadline = time.monotonic() + timeout_s
        while not enough(found := ask()):
            assert time.monotonic() < deadline, f"{found} after {timeout_s} s\n{self.log}"
            time.sleep(0.02)
        return found

    def events(self, job_id: str) -> Iterator[tuple[str, Any]]:
        """What it says of a job: names and data."""
        with self.get(f"/api/jobs/{job_id}/events", stream=True) as answer:
            name = ""
            for line in answer.iter_lines(decode_unicode=True):
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

    def workers(self) -> list[int]:
        """Ids of the processes that draw."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def stop(self, how: int = signal.SIGTERM) -> int:
        """End it; its status."""
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def serving(folder: Path, environment: dict[str, str], *words: str) -> Iterator[Server]:
    """Run a server on a free port until the block ends.

    Args:
        folder: Its current folder.
        environment: See ``script_environment``.
        words: Arguments of ``altdiff serve``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flagai_altdiff", "serve", "--port", "0", *words]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={**environment, "PYTHONUNBUFFERED": "1"}, stdout=log, stderr=log, text=True
        )
    try:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"at (http://\S+)", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield Server(found[1], folder, process)
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
