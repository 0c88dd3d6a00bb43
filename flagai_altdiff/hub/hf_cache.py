"""What other programs have fetched from Hugging Face already: read from their cache, never written there."""

from __future__ import annotations

import re
from pathlib import Path

from flagai_altdiff.errors import ModelNotFoundError
from flagai_altdiff.hub.environment import hf_cache
from flagai_altdiff.hub.names import safe_name
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.hub.selection import select

BRANCH = "main"
COMMIT, SHA256 = "[0-9a-f]{40}", "[0-9a-f]{64}"


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of a repository's snapshot in the cache; ModelNotFoundError if there is none.

    Args:
        name: ``owner/repository``.
        revision: Commit, or a branch or tag as it was when the cache last asked.
    """
    snapshot = _snapshot(name, revision or BRANCH)
    if snapshot is None:
        raise ModelNotFoundError(f"{hf_cache()} has no snapshot of {name} at {revision or BRANCH}.")
    return select([_file(path, snapshot) for path in sorted(snapshot.rglob("*")) if path.is_file()])


def has(name: str, revision: str | None = None) -> bool:
    """Whether the cache has a snapshot of a repository."""
    return _snapshot(name, revision or BRANCH) is not None


def find(name: str, commit: str, path: str) -> Path | None:
    """A file of a commit, if the cache has it."""
    snapshot = _snapshot(name, commit)
    found = snapshot / safe_name(path) if snapshot else None
    return found if found and found.is_file() else None


def _snapshot(name: str, revision: str) -> Path | None:
    repository = hf_cache() / f"models--{name.replace('/', '--')}"
    commit = revision
    if not re.fullmatch(COMMIT, revision):
        try:
            commit = (repository / "refs" / safe_name(revision)).read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
    snapshot = repository / "snapshots" / commit
    return snapshot if re.fullmatch(COMMIT, commit) and snapshot.is_dir() else None


def _file(path: Path, snapshot: Path) -> RemoteFile:
    blob = path.resolve()
    return RemoteFile(
        name=path.relative_to(snapshot).as_posix(),
        locate=lambda: Location(url=path.as_uri()),
        size_bytes=blob.stat().st_size,
        sha256=blob.name if re.fullmatch(SHA256, blob.name) else None,
        revision=snapshot.name,
        copy=path,
    )
