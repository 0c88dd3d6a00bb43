"""A mirror: a plain folder of files on some web server. The folder of a finished download, served as it is, is one."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

from flagai_altdiff.errors import HubError, ModelNotFoundError, shown
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.addresses import check_typed, redact_url
from flagai_altdiff.hub.client import ask
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.model_files import EQUIVALENTS

MAX_FILES = 20_000


@dataclass(frozen=True, kw_only=True)
class Mirror:
    """A hub whose models are plain folders.

    Args:
        address: The folder of one model, or of model folders: ``<address>/<name>`` goes before ``<address>``.
        setting: Where the user wrote the address.
        usual_files: What is looked for where the folder has no manifest: these files, or what does as well.
    """

    address: str
    setting: str
    usual_files: tuple[str, ...]

    def list_files(self, name: str, revision: str | None = None) -> list[RemoteFile]:
        """The files that the folder's manifest records, with their hashes; without one, the usual files."""
        base = self.address.rstrip("/")
        check_typed(base, self.setting)
        if revision is not None:
            raise ModelNotFoundError(
                f"{redact_url(base)} is a plain folder without revisions, so not {shown(revision)} either."
            )
        folders = [f"{base}/{quote(name)}", base]
        for folder in folders:
            if files := _recorded(folder):
                return files
        for folder in folders:
            if found := {file.name: file for usual in self.usual_files if (file := _probe(folder, usual))}:
                return list(found.values())
        raise ModelNotFoundError(f"{redact_url(base)} has neither {MANIFEST_NAME} nor {', '.join(self.usual_files)}.")


def _recorded(folder: str) -> list[RemoteFile]:
    try:
        answer = ask("GET", f"{folder}/{MANIFEST_NAME}")
    except ModelNotFoundError:
        return []
    records = manifest.parse(answer.text, redact_url(answer.url)).values()
    if len(records) > MAX_FILES:
        raise HubError(f"{redact_url(answer.url)} lists {len(records):,} files, {MAX_FILES:,} at most are believed.")
    return [_file(folder, record.name, record.size_bytes, record.sha256) for record in records]


def _probe(folder: str, usual: str) -> RemoteFile | None:
    for name in (usual, EQUIVALENTS.get(usual)):
        if name is None:
            continue
        try:
            answer = ask("HEAD", f"{folder}/{name}")
        except ModelNotFoundError:
            continue
        return _file(folder, name, answer.size_bytes, None)
    return None


def _file(folder: str, name: str, size_bytes: int | None, sha256: str | None) -> RemoteFile:
    location = Location(url=f"{folder}/{quote(name)}")
    return RemoteFile(name=name, locate=lambda: location, size_bytes=size_bytes, sha256=sha256)
