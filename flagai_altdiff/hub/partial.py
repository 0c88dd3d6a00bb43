"""What has arrived of a file, and which version of it that is."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flagai_altdiff.errors import DiskError, HubError
from flagai_altdiff.files import new_file
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.client import TRIES
from flagai_altdiff.hub.disk import Kept, on_disk, open_no_link
from flagai_altdiff.hub.names import PART_SUFFIX, STATE_SUFFIX
from flagai_altdiff.hub.wire import TransientError

STATE_BYTES = 1 << 16
MOST_BEGINNINGS = 2 * TRIES
"""How often a file is begun anew in one call."""
MAX_VALIDATOR = 256


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which content a partial file is the beginning of."""

    url: str
    size_bytes: int | None
    sha256: str | None
    validator: str | None = None


class Partial:
    """``<path>.part``: what has arrived of a file, which file that is, and its SHA-256 so far.

    Args:
        path: The file to be.
        identity: What was asked for.
        kept: The folder of both.
    """

    def __init__(self, path: Path, identity: Identity, kept: Kept) -> None:
        self._kept = kept
        self.path = path.with_name(path.name + PART_SUFFIX)
        self._state = path.with_name(path.name + STATE_SUFFIX)
        self.identity, self.size_bytes, self.digest = identity, 0, hashlib.sha256()
        self._begun = 0
        self._inode: int | None = None

    @property
    def resumable_bytes(self) -> int:
        """How much of it the rest can be joined to: all if its version can be told, by hash or by validator, else
        none; a size tells nothing."""
        return self.size_bytes if self.identity.sha256 or self.identity.validator else 0

    def recall(self) -> None:
        """Take up what an earlier call left of the same file."""
        recorded = self._recorded()
        if recorded is None or replace(recorded, validator=None) != self.identity:
            return
        if recorded.validator != usable(recorded.validator) or not (recorded.validator or recorded.sha256):
            return
        self._kept.check()
        there = _size_of_own(self.path) or 0
        if recorded.size_bytes is not None and there > recorded.size_bytes:
            return
        if there == recorded.size_bytes and recorded.sha256 is None:
            there -= 1  # the last byte is asked for again, so that the server says whether this is still the version
        with on_disk(self.path):
            if there:
                with open(self.path, "r+b", opener=open_no_link) as file:
                    file.truncate(there)
                    self.digest = hashlib.file_digest(file, "sha256")
                    self._inode = os.fstat(file.fileno()).st_ino
            self.identity, self.size_bytes = recorded, there

    def begin(self, validator: str | None) -> None:
        """Begin the file from its first byte; the version is on record before the first byte is there.

        Raises:
            HubError: It was begun too often already.
        """
        self.discard()
        self._begun += 1
        if self._begun > MOST_BEGINNINGS:
            raise HubError(
                f"{redact_url(self.identity.url)}: begun {MOST_BEGINNINGS} times; each time it broke off and came as "
                "another version next, so that what had come could not be used. Try another source."
            )
        self.identity = replace(self.identity, validator=validator)
        self._kept.check()
        with on_disk(self.path):
            with new_file(self._state, replace=True) as new:
                new.write_text(json.dumps(asdict(self.identity)), encoding="utf-8")
            with open(self.path, "xb", opener=open_no_link):
                pass

    def extend(self, pieces: Iterator[bytes], total: int | None) -> None:
        """Write what comes to its end, up to where it breaks off."""
        self._kept.check()
        with on_disk(self.path, total), open(self.path, "ab", opener=open_no_link) as file:
            if os.fstat(file.fileno()).st_size != self.size_bytes:
                raise self.start_over("another process writes the same file")
            for piece in pieces:
                file.write(piece)
                self.digest.update(piece)
                self.size_bytes += len(piece)
            file.flush()
            os.fsync(file.fileno())
            self._inode = os.fstat(file.fileno()).st_ino

    def start_over(self, reason: str) -> TransientError:
        """Remove it; the error to raise."""
        self.discard()
        return TransientError(f"{reason}; starting over")

    def discard(self) -> None:
        """Remove it with its record."""
        self.size_bytes, self.digest = 0, hashlib.sha256()
        self._kept.check()
        for path in (self.path, self._state):
            with on_disk(path):
                _size_of_own(path)
                path.unlink(missing_ok=True)

    def become(self, path: Path) -> None:
        """Take the final name, if it still is what was written: no other file, and no byte more or less."""
        self._kept.check()
        with on_disk(self.path):
            found = os.lstat(self.path)
            if (found.st_ino, found.st_size) != (self._inode, self.size_bytes):
                raise self.start_over("another process has changed the same file")
        with on_disk(path):
            os.replace(self.path, path)
            self._state.unlink(missing_ok=True)

    def _recorded(self) -> Identity | None:
        try:
            with open(self._state, "rb", opener=open_no_link) as file:
                return Identity(**json.loads(file.read(STATE_BYTES)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


def _size_of_own(path: Path) -> int | None:
    """Size of a file that only we write, if it is there; DiskError if something else lies there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return found.st_size
    code = errno.ELOOP if stat.S_ISLNK(found.st_mode) else errno.EEXIST
    raise DiskError(
        f"{path} is no ordinary file but a link, a folder or a device, not made by this program. Remove it.", code
    )


def usable(validator: object) -> str | None:
    """A validator that can be sent back in a header."""
    return (
        validator
        if isinstance(validator, str) and re.fullmatch(f"[!-~][ -~]{{0,{MAX_VALIDATOR}}}", validator)
        else None
    )
