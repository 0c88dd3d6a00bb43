"""A mirror: a plain folder of files on some web server. The folder of a finished download, served as it is, is one."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from flagai_altdiff.errors import ModelNotFoundError
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.client import ask, ask_headers, check_scheme, shown
from flagai_altdiff.hub.contents import EQUIVALENTS
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.hub.remote import Location, RemoteFile

USUAL_FILES = ("config.yaml", "config.json", "model.ckpt", "pytorch_model.bin", "sentencepiece.bpe.model")
"""What is looked for where the folder has no manifest: FlagAI's files, or what does as well."""


@dataclass(frozen=True)
class Mirror:
    """A hub whose models are plain folders.

    Args:
        address: The folder of one model, or of model folders: ``<address>/<name>`` goes before ``<address>``.
    """

    address: str

    def list_files(self, name: str, revision: str | None = None) -> list[RemoteFile]:
        """The files that the folder's manifest records, with their hashes; without one, FlagAI's usual files."""
        check_scheme(self.address)
        if revision is not None:
            raise ModelNotFoundError(f"{shown(self.address)} is a plain folder without revisions, so not {revision!a} either.")
        folders = [f"{self.address.rstrip('/')}/{quote(name)}", self.address.rstrip("/")]
        for folder in folders:
            if files := _recorded(folder):
                return files
        for folder in folders:
            if found := {file.name: file for usual in USUAL_FILES if (file := _probe(folder, usual))}:
                return list(found.values())
        raise ModelNotFoundError(f"{shown(self.address)} has neither {MANIFEST_NAME} nor {', '.join(USUAL_FILES)}.")


def _recorded(folder: str) -> list[RemoteFile]:
    try:
        answer = ask("GET", f"{folder}/{MANIFEST_NAME}")
    except ModelNotFoundError:
        return []
    records = manifest.parse(answer.text, shown(answer.url)).values()
    return [_file(folder, record.name, record.size_bytes, record.sha256) for record in records]


def _probe(folder: str, usual: str) -> RemoteFile | None:
    for name in (usual, EQUIVALENTS.get(usual)):
        if name is None:
            continue
        try:
            size = ask_headers(f"{folder}/{name}").get("Content-Length", "")
        except ModelNotFoundError:
            continue
        return _file(folder, name, int(size) if size.isdecimal() else None, None)
    return None


def _file(folder: str, name: str, size_bytes: int | None, sha256: str | None) -> RemoteFile:
    location = Location(url=f"{folder}/{quote(name)}", size_bytes=size_bytes)
    return RemoteFile(name=name, locate=lambda: location, size_bytes=size_bytes, sha256=sha256)
