"""Files that appear whole, with the permissions that the user's umask grants."""

from __future__ import annotations

import os
import threading
from pathlib import Path

_UMASK = threading.Lock()
"""Held while the process's umask is read, which is only possible by changing it."""


def grant_usual_mode(path: Path) -> None:
    """Give a file made by a careful library (mode 0600) the permissions of an ordinary new file."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    path.chmod(0o666 & ~mask)
