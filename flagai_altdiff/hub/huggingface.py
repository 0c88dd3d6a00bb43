"""Hugging Face, or a mirror of it (``HF_ENDPOINT``): the diffusers layout of a repository.

**Source**: the hub's HTTP API, ``/api/models/{repo}/tree/{revision}`` and ``/{repo}/resolve/{revision}/{path}``.
"""

from __future__ import annotations

import re
from functools import partial
from urllib.parse import quote, urljoin, urlsplit

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub import hf_cache
from flagai_altdiff.hub.client import Answer, ask, ask_headers, shown
from flagai_altdiff.hub.environment import hf_endpoint, hf_token
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.hub.selection import INDEX, select

BRANCH = "main"
COMMIT = "[0-9a-f]{40}"
MAX_PAGES = 50


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of the diffusers layout of a repository, one set of weights per part, all of one commit.

    Args:
        name: ``owner/repository``.
        revision: Commit, branch, tag or ``refs/pr/N``; the branch ``main`` if left out.

    Raises:
        ModelNotFoundError: No such repository or revision, or none in the diffusers layout.
    """
    commit = find_commit(name, revision or BRANCH)
    url: str | None = f"{hf_endpoint()}/api/models/{quote(name)}/tree/{quote(commit, safe='')}?recursive=true"
    listed: list[RemoteFile] = []
    for _ in range(MAX_PAGES):
        if url is None:
            break
        answer = ask("GET", url, headers=_headers())
        listed += _parse_tree(answer, name, commit)
        url = _next_page(answer)
    wanted = select(listed)
    if not any(file.name == INDEX for file in wanted):
        raise ModelNotFoundError(f"{hf_endpoint()}/{name} has no {INDEX}, so it is not in the diffusers layout.")
    return wanted


def find_commit(name: str, revision: str) -> str:
    """The commit that a revision is now, so that all files are of one; the revision itself where the server names none."""
    if re.fullmatch(COMMIT, revision):
        return revision
    headers = ask_headers(_address(name, revision, INDEX), headers=_headers())
    commit = headers.get("X-Repo-Commit", "")
    return commit if re.fullmatch(COMMIT, commit) else revision


def _address(name: str, revision: str, path: str) -> str:
    return f"{hf_endpoint()}/{quote(name)}/resolve/{quote(revision, safe='')}/{quote(path)}"


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if (token := hf_token()) else {}


def _next_page(answer: Answer) -> str | None:
    if answer.next_url is None:
        return None
    url = urljoin(answer.url, answer.next_url)
    if urlsplit(url)[:2] != urlsplit(answer.url)[:2]:
        raise HubError(f"{shown(answer.url)} continues its list at another host, {shown(url)}; refused.")
    return url


def _parse_tree(answer: Answer, repository: str, commit: str) -> list[RemoteFile]:
    entries = answer.parse_json()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise HubError(f"{shown(answer.url)} answered with something that is not a list of files.")
    files = []
    for entry in entries:
        path, size, lfs = entry.get("path"), entry.get("size"), entry.get("lfs")
        if entry.get("type") == "directory":
            continue
        if not isinstance(path, str) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise HubError(f"{shown(answer.url)} lists a file without path and size.")
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise HubError(f"{shown(answer.url)} lists {path!a} with a hash that is not SHA-256.")
        copy = hf_cache.find(repository, commit, path)
        same = copy if copy is not None and copy.stat().st_size == size else None
        locate = partial(_locate, repository, commit, path, size)
        files.append(RemoteFile(name=path, locate=locate, size_bytes=size, sha256=sha256, revision=commit, copy=same))
    return files


def _locate(repository: str, commit: str, path: str, size_bytes: int) -> Location:
    return Location(url=_address(repository, commit, path), size_bytes=size_bytes, headers=_headers())
