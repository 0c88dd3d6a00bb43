"""What other programs have fetched from Hugging Face already: read from their cache, never written there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from flagai_altdiff.errors import DiskError, ModelNotFoundError
from flagai_altdiff.hub import environment
from flagai_altdiff.hub.disk import present_files, read_small, size_of
from flagai_altdiff.hub.names import safe_name
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.model_files import repository_files

BRANCH = "main"
MAX_REF_BYTES = 200
COMMIT, SHA256 = "[0-9a-f]{40}", "[0-9a-f]{64}"


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of a repository's snapshot in the cache; ModelNotFoundError if there is none.

    Args:
        name: ``owner/repository``.
        revision: Commit, or a branch or tag as it was when the cache last asked.
    """
    snapshot = _snapshot(name, revision or BRANCH)
    if snapshot is None:
        place = ascii(str(environment.hf_cache()))
        raise ModelNotFoundError(f"{place} has no snapshot of {name} at {revision or BRANCH}.")
    try:
        paths = sorted(present_files(snapshot))
    except DiskError as error:
        raise ModelNotFoundError(str(error)) from error  # the hub may have what the cache does not give
    return [_file(snapshot, path) for path in repository_files(paths)]


def has(name: str, revision: str | None = None) -> bool:
    """Whether the cache has a snapshot of a repository."""
    return _snapshot(name, revision or BRANCH) is not None


def find(name: str, commit: str, path: str, size_bytes: int | None) -> Path | None:
    """A file of a commit, if the cache has it in that size."""
    snapshot = _snapshot(name, commit)
    found = snapshot / safe_name(path) if snapshot else None
    return found if found and size_of(found) == size_bytes else None


def _snapshot(name: str, revision: str) -> Path | None:
    """The folder of a revision; ``None`` also where the cache cannot be read, for it is nothing but a short cut."""
    repository = environment.hf_cache() / f"models--{name.replace('/', '--')}"
    commit = revision
    if not re.fullmatch(COMMIT, revision):
        try:
            commit = read_small(repository / "refs" / safe_name(revision), MAX_REF_BYTES).decode().strip()
        except (OSError, ValueError):
            return None
    snapshot = repository / "snapshots" / commit
    return snapshot if re.fullmatch(COMMIT, commit) and os.path.isdir(snapshot) else None


def _file(snapshot: Path, name: str) -> RemoteFile:
    path = snapshot / name
    digest = os.path.basename(os.path.realpath(path))
    return RemoteFile(
        name=name,
        locate=lambda: Location(url=path.as_uri()),
        size_bytes=size_of(path),
        sha256=digest if re.fullmatch(SHA256, digest) else None,
        revision=snapshot.name,
        copy=path,
    )
