"""This side of a download: what a model's folder has and lacks, and errors of the disk, which no other source mends."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path, PurePath

from flagai_altdiff.errors import DiskError, HubError
from flagai_altdiff.files import open_regular, require_regular
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.model_files import is_part, lacking
from flagai_altdiff.plain_data import read_capped
from flagai_altdiff.registry import ModelSpec

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Stamp = tuple[int, int, int]
"""Inode, size and time of change of a file: the same ones mean the same content."""


def missing_files(spec: ModelSpec, folder: Path, *, config_only: bool = False) -> list[str]:
    """Names of the files that a folder lacks to be a complete model; empty files and wrong sizes count as missing.

    Args:
        spec: The model.
        folder: FlagAI layout, or diffusers layout if it has a ``model_index.json``.
        config_only: Weights are not needed.

    Returns:
        Names relative to ``folder``, as :func:`flagai_altdiff.model_files.lacking` gives them.

    Raises:
        DiskError: The folder cannot be read.
    """
    wrong = {file.name for file in spec.files if file.size_bytes not in (None, size_of(folder / file.name))}
    return lacking((file.name for file in spec.files), present_files(folder) - wrong, config_only=config_only)


def present_files(folder: Path) -> set[str]:
    """Names, where they are text, of the files in a folder and in its subfolders that are not empty."""
    with on_disk(folder):
        places = [folder, *(place for place in _entries(folder) if place.is_dir() and not place.name.startswith("."))]
        names = (path.relative_to(folder).as_posix() for place in places for path in _entries(place) if size_of(path))
        return {name for name in names if name.isprintable()}


def model_files(folder: Path) -> list[str]:
    """Names of the present files that are a model's, in order."""
    return sorted(name for name in present_files(folder) if is_part(name) and name != MANIFEST_NAME)


def size_of(path: Path) -> int | None:
    """Size of a file in bytes; ``None`` if there is none, or something else that is never opened."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def stamp_of(path: Path) -> Stamp | None:
    """What tells a file from a later one at its place; ``None`` if there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def git_oid(path: Path) -> str:
    """What git calls the content of a file; DiskError if it cannot be read."""
    with on_disk(path), open_regular(path) as file:
        oid = hashlib.sha1(b"blob %d\0" % os.fstat(file.fileno()).st_size, usedforsecurity=False)
        while piece := file.read(1 << 20):
            oid.update(piece)
        return oid.hexdigest()


class Digests:
    """SHA-256 of files; a file is read once as long as it stays what it is."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, Stamp], str] = {}

    def of(self, path: Path) -> str | None:
        """The digest of a file; ``None`` if there is no file.

        Raises:
            DiskError: It cannot be read.
        """
        stamp = stamp_of(path)
        if stamp is None:
            return None
        if (str(path), stamp) not in self._known:
            with on_disk(path):
                self._known[str(path), stamp] = digest(path)[1]
        return self._known[str(path), stamp]

    def learn(self, path: Path, stamp: Stamp, sha256: str) -> None:
        """Take a digest from one who has read the file."""
        self._known[str(path), stamp] = sha256


def read_small(path: Path, most_bytes: int) -> bytes:
    """A small file of the books of a download; HubError if it has more bytes, OSError if it cannot be read."""
    try:
        return read_capped(path, most_bytes)
    except ValueError as error:
        raise HubError(f"{path} has more than {most_bytes} bytes; it is not what its name says. Remove it.") from error


class Kept:
    """A folder that is written into, made where it is missing, and looked at again before each write.

    Minutes may pass between two writes, in which somebody puts a link to another folder, or that folder, in its place.

    Args:
        root: May be a link, and be reached through links.

    Raises:
        DiskError: The disk refuses.
    """

    def __init__(self, root: Path) -> None:
        self.path = root
        with on_disk(root):
            root.mkdir(parents=True, exist_ok=True)
            self._known = {root: _identity(os.stat(root))}

    def inner(self, inner: PurePath | str) -> Kept:
        """A folder below it, made where it is missing; no link is followed on the way.

        Raises:
            HubError: A link or a file stands where a folder is needed, or this one is not what it was.
            DiskError: The disk refuses.
        """
        self.check()
        made = copy(self)
        made._known = dict(self._known)
        for part in PurePath(inner).parts:
            made.path = made.path / part
            with on_disk(made.path):
                try:
                    os.mkdir(made.path)
                except FileExistsError:
                    check_folder(made.path)
                made._known[made.path] = _identity(os.lstat(made.path))
        made.check()
        return made

    def check(self) -> None:
        """HubError if it, or a folder on the way to it, is not the one that it was."""
        for place, identity in self._known.items():
            look = os.stat if place == next(iter(self._known)) else os.lstat
            try:
                found: object = _identity(look(place))
            except (OSError, ValueError):
                found = None
            if found != identity:
                what = "is gone" if found is None else "has become a link or another folder"
                raise HubError(f"{place} {what} meanwhile; nothing is written there. Try again.")


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return (stat.S_IFMT(found.st_mode), found.st_dev, found.st_ino)


def check_folder(place: Path) -> None:
    """HubError if something else than a folder is at ``place``, a link to one included."""
    if os.path.islink(place):
        raise HubError(f"{place} is a symbolic link; refused. Remove it.")
    if os.path.lexists(place) and not os.path.isdir(place):
        raise HubError(f"{place} is no folder, but one is needed there. Move it away and try again.")


def free_bytes(folder: Path) -> int:
    """What the disk of ``folder``, or of its nearest existing parent, has free."""
    existing = next((place for place in (folder, *folder.absolute().parents) if os.path.isdir(place)), Path.cwd())
    return shutil.disk_usage(existing).free


def check_space(folder: Path, needed_bytes: int) -> None:
    """DiskError if the disk of ``folder`` (or of its nearest existing parent) has less free."""
    free = free_bytes(folder)
    if free < needed_bytes:
        text = f"{folder}: needs {needed_bytes:,} bytes, {free:,} are free. Make room and try again."
        raise DiskError(text, errno.ENOSPC)


def open_no_link(path: str, flags: int) -> int:
    """For ``open(..., opener=)``: write a file of ours, never through what is planted at its name.

    Args:
        path: A link, a pipe, a device or a second name of another file there is an error.
        flags: From ``open``; the file is emptied only after it was looked at.
    """
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, (flags & ~os.O_TRUNC) | careful, 0o666)
    try:
        found = os.fstat(handle)
        require_regular(found, path)
        if found.st_nlink > 1:
            raise OSError(errno.EMLINK, "A second name of another file", path)
        if flags & os.O_TRUNC:
            os.ftruncate(handle, 0)
    except BaseException:
        os.close(handle)
        raise
    return handle


@contextmanager
def on_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what the local disk raises while ``path`` is read or written into DiskError."""
    try:
        yield
    except HubError:
        raise
    except (OSError, UnicodeError) as error:
        text, code = f"{path}: {getattr(error, 'strerror', None) or error}.", getattr(error, "errno", None)
        if code in FULL:
            needed = "unknown" if needed_bytes is None else f"{needed_bytes:,}"
            text += f" Bytes needed: {needed}, free: {shutil.disk_usage(path.parent).free:,}."
            text += " What has arrived is kept: make room and try again."
        elif code == errno.EACCES:
            text += " Ask its owner for the right to use it, or choose a folder that can be read and written to."
        elif code == errno.ENOENT:
            text += " It was moved or removed meanwhile; try again."
        else:
            text += " Choose a folder that can be written to."
        raise DiskError(text, code) from error


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
