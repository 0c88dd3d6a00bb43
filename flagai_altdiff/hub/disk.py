"""This side of a download: what a model's folder has and lacks, and errors of the disk, which no other source mends."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flagai_altdiff.errors import DiskError, HubError
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.model_files import is_part, lacking
from flagai_altdiff.registry import ModelSpec

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
    """Size of a file in bytes; ``None`` if there is none."""
    return path.stat().st_size if os.path.isfile(path) else None


def check_space(folder: Path, needed_bytes: int) -> None:
    """DiskError if the disk of ``folder`` (or of its nearest existing parent) has less free."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path.cwd())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        text = f"{folder}: needs {needed_bytes:,} bytes, {free:,} are free. Make room and try again."
        raise DiskError(text, errno.ENOSPC)


def open_no_link(path: str, flags: int) -> int:
    """For ``open(..., opener=)``: a link planted at ``path`` is an error, never followed."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
        else:
            text += " Choose a folder that can be written to."
        raise DiskError(text, code) from error


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
