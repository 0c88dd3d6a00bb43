"""One process at a time works on a model's folder. The system's own locks: those of a dead process are gone with it."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from flagai_altdiff.errors import printable
from flagai_altdiff.files import require_regular
from flagai_altdiff.hub.disk import on_disk
from flagai_altdiff.hub.names import LOCK_NAME

logger = logging.getLogger(__name__)

EVERY_S = 10.0
"""Seconds between two lines of a process that waits."""
POLL_S = 0.1
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
"""What file systems without locks answer."""


@contextmanager
def folder_lock(folder: Path, describe: Callable[[], str]) -> Iterator[bool]:
    """Hold a folder's lock, waiting for the process that has it; without support for locks, go on with a warning.

    Args:
        folder: Made if needed.
        describe: What the other process has done so far, for those who wait.

    Yields:
        Whether the lock is held.

    Raises:
        DiskError: The folder cannot be written to.
    """
    path = folder / LOCK_NAME
    lock = FileLock(path, fallback_to_soft=False)
    with on_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):  # a pipe, a device, or a link to one, is never opened
            require_regular(os.lstat(path), path)
        held = _acquire(lock, folder, describe)
    try:
        yield held
    finally:
        lock.release()


def _acquire(lock: BaseFileLock, folder: Path, describe: Callable[[], str]) -> bool:
    timeout_s = 0.0
    while True:
        try:
            lock.acquire(timeout=timeout_s, poll_interval=POLL_S)
        except Timeout:
            logger.warning("another process is filling %s (%s); waiting for it", printable(str(folder)), describe())
            timeout_s = EVERY_S
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning(
                "%s: this file system has no locks (%s); processes download side by side",
                printable(str(folder)),
                error.strerror,
            )
            return False
        else:
            return True
