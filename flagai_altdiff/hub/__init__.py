"""Where model files come from: the disk first, then the sources of a model in their order."""

from __future__ import annotations

from flagai_altdiff.hub.contents import missing_files
from flagai_altdiff.hub.environment import OFFLINE_VARIABLES, offline_switch
from flagai_altdiff.hub.fetching import fetch, plan
from flagai_altdiff.hub.manifest import Finding, record_missing, verify
from flagai_altdiff.hub.names import safe_name
from flagai_altdiff.hub.planning import HUBS, Plan
from flagai_altdiff.hub.progress import human
from flagai_altdiff.hub.remote import Hub, Location, RemoteFile
from flagai_altdiff.hub.transfer import download

__all__ = [
    "HUBS",
    "OFFLINE_VARIABLES",
    "Finding",
    "Hub",
    "Location",
    "Plan",
    "RemoteFile",
    "download",
    "fetch",
    "human",
    "missing_files",
    "offline_switch",
    "plan",
    "record_missing",
    "safe_name",
    "verify",
]
