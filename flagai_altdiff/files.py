"""Files and folders that appear whole or not at all: the one way to write what others may read; ordinary ones opened.

Everything is written under a hidden name beside its target, made exclusively (a link planted there is never followed)
with the permissions that the user's umask grants, and gets its own name when it is whole. No state of the process is
touched. What should be a file is opened only if it is one.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SHORT = 10


@contextmanager
def new_file(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Write a file: the block fills the hidden one that it is given, which becomes ``target`` if the block ends well.

    Args:
        target: The file to make; its folder must exist.
        replace: Whether ``target`` may exist already, to be replaced.

    Yields:
        An empty file beside ``target``; a library may put another file in its place.

    Raises:
        FileExistsError: ``target`` exists, be it since a moment ago, and ``replace`` is false.
        OSError: The disk refuses. In both cases nothing of the new file is left.
    """
    unfinished = _unfinished(target)
    mode = _create(unfinished)
    try:
        yield unfinished
        _flush(unfinished)
        if unfinished.stat().st_mode & 0o777 != mode:  # careful libraries make files that only their owner may read
            unfinished.chmod(mode)
        if replace:
            os.replace(unfinished, target)
        else:
            claim(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Write a folder: the block fills the hidden one that it is given, which becomes ``target`` if all goes well.

    Args:
        target: The folder to make; the folders above it are made if need be.

    Raises:
        FileExistsError: ``target`` exists, be it since a moment ago.
        OSError: The disk refuses. In both cases nothing of the new folder is left.
    """
    with _unfinished_folder(target) as unfinished:
        yield unfinished
        reserve = os.name != "nt"  # elsewhere a folder takes the place of an empty one, so that must be ours
        if reserve:
            os.mkdir(target)
        try:
            os.rename(unfinished, target)
        except BaseException as error:
            if reserve:
                with suppress(OSError):
                    os.rmdir(target)
            if isinstance(error, OSError) and os.path.lexists(target):
                raise _exists(target) from None
            raise


@contextmanager
def new_files(target: Path) -> Iterator[Path]:
    """Write a file with what belongs beside it: the block fills a hidden folder, and all its files get their names.

    Args:
        target: The file to make, which the block must put into the folder; it gets its name last.

    Raises:
        FileExistsError: ``target`` exists, or a file beside it that has another content.
        OSError: The disk refuses. In both cases nothing new is left.
    """
    made: list[tuple[Path, os.stat_result]] = []
    with _unfinished_folder(target) as unfinished:
        yield unfinished
        try:
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == target.name):
                place = target.with_name(file.name)
                if place != target and place.is_file() and filecmp.cmp(file, place, shallow=False):
                    continue
                _flush(file)
                made.append((place, file.stat()))
                claim(file, place)
        except BaseException:
            for place, stat_result in made:
                with suppress(OSError):
                    if os.path.samestat(place.lstat(), stat_result):
                        place.unlink()
            raise


@contextmanager
def _unfinished_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, locked while the block runs; what a killed process left of one is removed."""
    if not is_free(target):
        raise _exists(target)
    missing = [folder for folder in target.parents if not folder.exists()]
    unfinished = _unfinished(target)
    unlocked = unfinished.with_suffix(".new")  # a name that nobody takes for abandoned
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        unlocked.mkdir()
        with _locked(unlocked):
            unlocked.rename(unfinished)
            yield unfinished
    finally:
        for folder in (unfinished, unlocked):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # not empty, so the target is there
                folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, which the system frees when the process ends; false if it cannot be had."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> int:
    """Remove unfinished folders of ``target`` whose process is gone, which may hold gigabytes; how many there were."""
    count = 0
    ours = re.compile(re.escape(_unfinished(target).name[:-20]) + "[0-9a-f]{16}[.]tmp")
    for path in list(target.parent.iterdir()):
        if ours.fullmatch(path.name):
            with suppress(OSError), _locked(path) as free:  # a link is never followed
                if free:
                    shutil.rmtree(path, ignore_errors=True)
                    count += 1
    return count


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, "exists already", str(target))


def is_free(target: Path) -> bool:
    """Whether nothing lies at a path, once it is removed what a killed process left of its try to make a folder there.

    Raises:
        OSError: Nothing can have this name.
    """
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        return True
    if not stat.S_ISDIR(found.st_mode) or os.listdir(target) or not _remove_abandoned(target):
        return False
    os.rmdir(target)  # reserved by that process, just before the end
    return True


def claim(unfinished: Path, target: Path) -> None:
    """Give a finished file its name beside it.

    Raises:
        FileExistsError: The name is taken; the file keeps its own.
    """
    try:
        os.link(unfinished, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except (
        OSError,
        NotImplementedError,
        AttributeError,
    ):  # no hard links here: reserve the name, then move over the reservation
        _create(target)
        try:
            os.replace(unfinished, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    else:
        unfinished.unlink()


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes; a pipe or a device at its place is never opened, so that nothing waits for it.

    Raises:
        OSError: It cannot be read, or is no regular file.
    """
    require_regular(os.stat(path), path)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        require_regular(os.fstat(handle), path)  # it may have been replaced meanwhile
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def require_regular(found: os.stat_result, path: Path | str) -> None:
    """Raise OSError where what was found is a folder, a pipe, a device or something else that is no file."""
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ENOTSUP, "Not a regular file", str(path))


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> int:
    """Make an empty file that must be new; its permissions, as the umask leaves them."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        return os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """Have the content on the disk before the name is, so that a power cut leaves no empty file."""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (
                errno.EINVAL,
                errno.ENOTSUP,
                errno.ENOSYS,
                errno.ENOTTY,
            ):  # file systems that have no such thing
                raise


def short_hash(path: Path) -> str:
    """The first ten digits of a file's SHA-256: as many as A1111 and Civitai tell models by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_SHORT]
