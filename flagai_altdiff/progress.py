"""Whether somebody watches: bars on terminals and in notebooks, none elsewhere."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

SWITCHES = ("HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")
NOTEBOOKS = ("ipykernel.zmqshell", "IPython.utils._process_emscripten")
"""Modules that are loaded where notebooks run; tqdm tells them by the same sign."""


def show_bars() -> bool:
    """Whether progress bars can be seen now, and the user did not switch them off."""
    if os.environ.get("TERM") == "dumb" or any(is_on(name) for name in SWITCHES):
        return False
    return sys.stderr is not None and (any(name in sys.modules for name in NOTEBOOKS) or _is_terminal(sys.stderr))


def bar_class() -> type[tqdm]:  # type: ignore[type-arg]
    """tqdm's class for the place that this is: widgets in a notebook, text elsewhere."""
    from tqdm.auto import tqdm

    return tqdm


def is_on(name: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, "").strip().upper() in ("1", "ON", "YES", "TRUE")


def _is_terminal(stream: object) -> bool:
    """Also of no stream (a program without a console has none), a closed one and one that is no file."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except Exception:  # whatever a program put in its place
        return False
