"""Processes that tests start and stop."""

from __future__ import annotations

import signal


def take_ctrl_c() -> None:
    """For ``preexec_fn``: let SIGINT end the process, which a shell's background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
