"""Hugging Face, or a mirror of it (``HF_ENDPOINT``): the diffusers layout of a repository.

**Source**: the hub's HTTP API, ``/api/models/{repo}/tree/{revision}`` and ``/{repo}/resolve/{revision}/{path}``.
"""

from __future__ import annotations

import os
import re
from functools import partial
from urllib.parse import quote, urljoin, urlsplit

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub.client import Answer, ask, shown
from flagai_altdiff.hub.remote import Location, RemoteFile

ENDPOINT = "https://huggingface.co"
REVISION = "main"
MAX_PAGES = 50
PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")


def list_files(name: str) -> list[RemoteFile]:
    """The files of the diffusers layout of the repository called ``name``, one set of weights per part."""
    url: str | None = f"{_endpoint()}/api/models/{quote(name)}/tree/{REVISION}?recursive=true"
    listed: list[RemoteFile] = []
    for _ in range(MAX_PAGES):
        if url is None:
            break
        answer = ask("GET", url, headers=_headers())
        listed += _parse_tree(answer, name)
        url = _next_page(answer)
    wanted = _select(listed)
    if not any(file.name == "model_index.json" for file in wanted):
        raise ModelNotFoundError(f"{_endpoint()}/{name} has no model_index.json, so it is not in the diffusers layout.")
    return wanted


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def _headers() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError("HF_TOKEN has spaces or other characters that no token has; set it again.")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _next_page(answer: Answer) -> str | None:
    if answer.next_url is None:
        return None
    url = urljoin(answer.url, answer.next_url)
    if urlsplit(url)[:2] != urlsplit(answer.url)[:2]:
        raise HubError(f"{shown(answer.url)} continues its list at another host, {shown(url)}; refused.")
    return url


def _parse_tree(answer: Answer, repository: str) -> list[RemoteFile]:
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
        locate = partial(_locate, repository, path, size)
        files.append(RemoteFile(name=path, locate=locate, size_bytes=size, sha256=sha256))
    return files


def _locate(repository: str, path: str, size_bytes: int) -> Location:
    url = f"{_endpoint()}/{quote(repository)}/resolve/{REVISION}/{quote(path)}"
    return Location(url=url, size_bytes=size_bytes, headers=_headers())


def _select(files: list[RemoteFile]) -> list[RemoteFile]:
    """Drop other formats, variants such as ``.fp16.``, and pickles of a part that has safetensors."""
    kept = [file for file in files if file.name == "model_index.json" or _belongs(file.name)]
    safe = {file.name.split("/")[0] for file in kept if file.name.endswith(".safetensors")}
    return [file for file in kept if not (file.name.endswith(".bin") and file.name.split("/")[0] in safe)]


def _belongs(path: str) -> bool:
    part, _, file = path.partition("/")
    if part not in PARTS or "/" in file or ".fp16." in file or not file.endswith(SUFFIXES):
        return False
    return not file.endswith((".bin", ".safetensors")) or file.count(".") == 1
