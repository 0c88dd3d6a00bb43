"""Processes that tests start and stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NURSERY = """
import json, os, signal, sys
import torch
import flagai_altdiff.auto_loader, flagai_altdiff.predictor

def live(order):
    signal.alarm(order["timeout_s"])
    os.chdir(order["cwd"])
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(order[name], os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *order["arguments"]]
    exec(compile(order["script"], "<script>", "exec"), {"__name__": "__main__"})

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            live(order)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def take_ctrl_c() -> None:
    """For ``preexec_fn``: let SIGINT end the process, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Nursery:
    """A process that has loaded torch and the package, and forks one for each script: seconds faster than a new one.

    Only for scripts whose imports are not what is tested. An exception ends a script with status 1.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, script: str, *arguments: object, cwd: Path, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        """Run a script in a process of its own; what it printed, and its status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {"script": script, "arguments": [*map(str, arguments)], "cwd": str(cwd), "timeout_s": timeout_s}
            order |= {"out": str(out), "err": str(err)}
            print(json.dumps(order), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(script, status, out.read_text(), err.read_text())


@contextmanager
def nursery(environment: dict[str, str]) -> Iterator[Nursery]:
    """Start one, and end it."""
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        yield Nursery(process)
        process.kill()  # who was forked meanwhile may hold its standard input open, so that closing it says nothing
