"""Where model files come from: the disk first, then the sources of a model in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flagai_altdiff.hub.disk import missing_files
from flagai_altdiff.hub.environment import CHECKS, OFFLINE_VARIABLES, offline_switch
from flagai_altdiff.hub.manifest import FileCheck, record_missing, verify
from flagai_altdiff.hub.progress import human

if TYPE_CHECKING:
    from flagai_altdiff.hub.fetching import fetch, plan

__all__ = [
    "CHECKS",
    "OFFLINE_VARIABLES",
    "FileCheck",
    "fetch",
    "human",
    "missing_files",
    "offline_switch",
    "plan",
    "record_missing",
    "verify",
]


def __getattr__(name: str) -> object:
    """Load what asks a network when it is asked for: most calls find all files on the disk."""
    if name in ("fetch", "plan"):
        from flagai_altdiff.hub import fetching

        return getattr(fetching, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
