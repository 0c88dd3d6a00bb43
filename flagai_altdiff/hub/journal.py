"""What has arrived in a staging folder: one line for each file, written once, so that thousands cost what few cost.

A line that a crash cut off, or that cannot be understood, only means that its file is looked at again.
"""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub.disk import Digests, Stamp, on_disk, open_no_link, read_small, stamp_of
from flagai_altdiff.hub.names import JOURNAL_NAME

MAX_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A file that came whole.

    Args:
        name: Path inside the model's folder.
        sha256: Hex digest of its content.
        stamp: What it was on the disk; a file with another stamp is not the one that came.
        validator: What the server called this content: an ETag or a date.
    """

    name: str
    sha256: str
    stamp: Stamp
    validator: str | None = None


class Journal:
    """The files that have arrived in a staging folder, now and in earlier attempts.

    Args:
        staging: The folder; it need not exist.
        digests: Learns what earlier attempts have hashed.
    """

    def __init__(self, staging: Path, digests: Digests) -> None:
        self._staging, self._digests, self._lock = staging, digests, threading.Lock()
        self._arrivals: dict[str, Arrival] = {}
        for arrival in _read(staging / JOURNAL_NAME):
            if stamp_of(staging / arrival.name) == arrival.stamp:
                self._learn(arrival)

    def get(self, name: str) -> Arrival | None:
        """A file that lies in the folder as it came; ``None`` if it is not there or not known."""
        found = self._arrivals.get(name)
        return found if found and stamp_of(self._staging / name) == found.stamp else None

    def add(self, name: str, sha256: str, validator: str | None) -> None:
        """Note a file that has come just now; DiskError if the disk refuses."""
        path = self._staging / JOURNAL_NAME
        stamp = stamp_of(self._staging / name)
        if stamp is None:
            raise HubError(f"{self._staging / name} has gone; does another program tidy up there?")
        arrival = Arrival(name=name, sha256=sha256, stamp=stamp, validator=validator)
        line = f"\n{json.dumps(asdict(arrival))}\n"  # an own line, also behind one that was cut off
        with self._lock, on_disk(path), open(path, "a", encoding="utf-8", opener=open_no_link) as file:
            file.write(line)
        self._learn(arrival)

    def _learn(self, arrival: Arrival) -> None:
        self._arrivals[arrival.name] = arrival
        self._digests.learn(self._staging / arrival.name, arrival.stamp, arrival.sha256)


def _read(path: Path) -> list[Arrival]:
    try:
        lines = read_small(path, MAX_BYTES).splitlines()
    except OSError:  # none is there, or it cannot be used: HubError is an OSError
        return []
    return [arrival for line in lines if (arrival := _parse(line))]


def _parse(line: bytes) -> Arrival | None:
    try:
        fields = json.loads(line)
        arrival = Arrival(**{**fields, "stamp": tuple(fields["stamp"])})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (arrival.name, arrival.sha256, arrival.validator or "")
    return arrival if all(isinstance(text, str) for text in texts) and len(arrival.stamp) == 3 else None
