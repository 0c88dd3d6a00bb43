"""Hugging Face, or a mirror of it (``HF_ENDPOINT``): the diffusers layout of a repository.

**Source**: the hub's HTTP API, ``/api/models/{repo}/tree/{revision}`` and ``/{repo}/resolve/{revision}/{path}``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from urllib.parse import quote, urljoin, urlsplit

from flagai_altdiff.errors import HubError, ModelNotFoundError, shown
from flagai_altdiff.hub import hf_cache
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.client import Answer, ask
from flagai_altdiff.hub.environment import hf_endpoint, hf_token
from flagai_altdiff.hub.hf_cache import BRANCH, COMMIT, SHA256
from flagai_altdiff.hub.remote import Location, RemoteFile, check_size
from flagai_altdiff.model_files import DIFFUSERS_INDEX, MATCHING_CONFIG, repository_files

MAX_PAGES = 50
MAX_FILES = 20_000

_MARKS = (DIFFUSERS_INDEX, MATCHING_CONFIG)
"""Files by which a repository of a model that draws, or of one that matches, is told."""


def list_files(name: str, revision: str | None = None) -> list[RemoteFile]:
    """The files of a repository that make a model, one set of weights per part, all of one commit.

    Args:
        name: ``owner/repository``.
        revision: Commit, branch, tag or ``refs/pr/N``; the branch ``main`` if left out.

    Raises:
        ModelNotFoundError: No such repository or revision, or none with a model of this family.
    """
    commit = find_commit(name, revision or BRANCH)
    url: str | None = f"{hf_endpoint()}/api/models/{quote(name)}/tree/{quote(commit, safe='')}?recursive=true"
    listed: dict[str, RemoteFile] = {}
    pages: list[str] = []
    while url is not None:
        if url in pages or len(pages) == MAX_PAGES or len(listed) > MAX_FILES:
            raise HubError(f"{redact_url(url)}: its list of files has no end, or more than {MAX_FILES:,} files.")
        pages.append(url)
        answer = ask("GET", url, headers=_headers())
        for file in _parse_tree(answer, name, commit):
            other = listed.setdefault(file.name, file)
            if (other.size_bytes, other.sha256) != (file.size_bytes, file.sha256):
                raise HubError(f"{redact_url(url)} lists {shown(file.name)} twice, with different facts.")
        url = _next_page(answer)
    wanted = repository_files(listed)
    if not wanted:
        where = f"{redact_url(hf_endpoint())}/{name}"
        raise ModelNotFoundError(f"{where} has no {' and no '.join(_MARKS)}, so it holds no model of this family.")
    files = (listed[path] for path in wanted)
    return [replace(file, copy=hf_cache.find(name, commit, file.name, file.size_bytes)) for file in files]


def find_commit(name: str, revision: str) -> str:
    """The commit that a revision is now, so that all files are of one; the revision where the server names none."""
    if re.fullmatch(COMMIT, revision):
        return revision
    try:
        answer = ask("HEAD", _address(name, revision, _MARKS[0]), headers=_headers())
    except ModelNotFoundError:
        answer = ask("HEAD", _address(name, revision, _MARKS[1]), headers=_headers())
    commit = answer.headers.get("X-Repo-Commit", "")
    return commit if re.fullmatch(COMMIT, commit) else revision


def _address(name: str, revision: str, path: str) -> str:
    return f"{hf_endpoint()}/{quote(name)}/resolve/{quote(revision, safe='')}/{quote(path)}"


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if (token := hf_token()) else {}


def _next_page(answer: Answer) -> str | None:
    if answer.next_url is None:
        return None
    try:
        url = urljoin(answer.url, answer.next_url)
        same = urlsplit(url)[:2] == urlsplit(answer.url)[:2]
    except ValueError:
        url, same = answer.next_url, False
    if not same:
        raise HubError(f"{redact_url(answer.url)} continues its list at another host, {redact_url(url)}; refused.")
    return url


def _parse_tree(answer: Answer, repository: str, commit: str) -> list[RemoteFile]:
    entries, where = answer.parse_json(), redact_url(answer.url)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise answer.unusable("a list of files")
    files = []
    for entry in entries:
        path, size, lfs = entry.get("path"), check_size(entry.get("size")), entry.get("lfs")
        if entry.get("type") == "directory":
            continue
        if not isinstance(path, str) or size is None:
            raise HubError(f"{where} lists a file without path and size.")
        sha256 = lfs.get("oid") if isinstance(lfs, dict) else None
        if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(SHA256, sha256)):
            raise HubError(f"{where} lists {shown(path)} with a hash that is not SHA-256.")
        locate = partial(_locate, repository, commit, path)
        files.append(RemoteFile(name=path, locate=locate, size_bytes=size, sha256=sha256, revision=commit))
    return files


def _locate(repository: str, commit: str, path: str) -> Location:
    return Location(url=_address(repository, commit, path), headers=_headers())
