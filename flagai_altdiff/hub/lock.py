"""One process at a time works on a model's folder. The system's own locks: those of a dead process are gone with it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub.names import LOCK_NAME

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Seconds between two lines of a process that waits."""
POLL_S = 0.1
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What file systems without locks answer."""


@contextmanager
def alone_in(folder: Path, describe: Callable[[], str]) -> Iterator[bool]:
    """Hold a folder's lock, waiting for the process that has it; without support for locks, go on with a warning.

    Args:
        folder: Made if needed.
        describe: What the other process has done so far, for those who wait.

    Yields:
        Whether the lock is held.

    Raises:
        HubError: The folder cannot be written to (``errno`` is set).
    """
    lock = _acquired(folder, describe)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()


def _acquired(folder: Path, describe: Callable[[], str]) -> BaseFileLock | None:
    path, timeout_s = folder / LOCK_NAME, 0.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, fallback_to_soft=False)
        while True:
            try:
                lock.acquire(timeout=timeout_s, poll_interval=POLL_S)
            except Timeout:
                logger.warning("another process is filling %s (%s); waiting for it", folder, describe())
                timeout_s = EVERY_S
            else:
                return lock
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise HubError(error.errno, f"{path}: {error.strerror}. Choose a folder that can be written to.") from error
        logger.warning("%s: this file system has no locks (%s); processes download side by side", folder, error.strerror)
        return None
