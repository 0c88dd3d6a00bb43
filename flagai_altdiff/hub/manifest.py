"""The record of a model's files: size and SHA-256 as they arrived, and from where. A check against it finds what changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flagai_altdiff.errors import HubError
from flagai_altdiff.files import grant_usual_mode
from flagai_altdiff.hub.contents import missing_files, model_files, size_of
from flagai_altdiff.hub.names import MANIFEST_NAME, safe_names
from flagai_altdiff.registry import ModelSpec

VERSION = 1
MAX_BYTES = 4 << 20
LOCAL = "this disk"
"""Source of a record that was made from a file already there."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of one file.

    Args:
        name: Path inside the model's folder.
        size_bytes: Its size.
        sha256: Hex digest.
        source: Hub that it came from, or ``LOCAL``.
        url: Its address, without secrets.
        revision: Version of the model there, if the hub has versions.
        etag: What the server called this content.
    """

    name: str
    size_bytes: int
    sha256: str
    source: str
    url: str | None = None
    revision: str | None = None
    etag: str | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check says about one file.

    Args:
        name: Path inside the model's folder.
        state: ``"ok"``, ``"missing"``, ``"unreadable"``, ``"wrong size"``, ``"wrong hash"`` or ``"not recorded"``.
        detail: What was expected and what is there.
    """

    name: str
    state: str
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the file is what it should be."""
        return self.state == "ok"


def parse(text: str, where: str) -> dict[str, Record]:
    """The records in the text of a manifest, by name.

    Args:
        text: JSON; whoever wrote it is not trusted.
        where: Where it was found, for messages.

    Raises:
        HubError: It is no manifest, or names files outside the folder.
    """
    try:
        book = json.loads(text)
        records = [_parse_record(entry) for entry in book["files"]]
        if book["version"] != VERSION:
            raise ValueError(f"version {book['version']!a}, expected {VERSION}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise HubError(f"{where} is not a record of files ({error!s:.80}).") from error
    safe_names(record.name for record in records)
    return {record.name: record for record in records}


def read(folder: Path) -> dict[str, Record]:
    """The records of a model's folder, by name; none if there is no manifest.

    Raises:
        HubError: There is one that cannot be understood.
    """
    path = folder / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise HubError(f"{path} has more than {MAX_BYTES} bytes; it is not a record of files. Remove it.")
        return parse(path.read_text("utf-8"), str(path))
    except FileNotFoundError:
        return {}
    except HubError:
        raise
    except (OSError, UnicodeError) as error:
        raise HubError(f"{path}: {error}") from error


def write(folder: Path, records: Mapping[str, Record]) -> None:
    """Replace the manifest of a folder; the old one stays until the new one is whole."""
    path = folder / MANIFEST_NAME
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    files = [{k: v for k, v in asdict(records[name]).items() if v is not None} for name in sorted(records)]
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(json.dumps({"version": VERSION, "files": files}, ensure_ascii=False, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        grant_usual_mode(new)
        os.replace(new, path)
    except OSError as error:
        raise HubError(error.errno, f"{path}: {error.strerror}. Choose a folder that can be written to.") from error


def record_missing(folder: Path, report: Callable[[str], None] = lambda name: None) -> list[str]:
    """Record the files of a model that have no record yet, as they are now.

    Args:
        folder: The model's folder.
        report: Called with the name of each such file before it is read.

    Returns:
        Their names.
    """
    records = read(folder)
    new = [name for name in model_files(folder) if name not in records]
    for name in new:
        report(name)
        size, sha256 = digest(folder / name)
        records[name] = Record(name=name, size_bytes=size, sha256=sha256, source=LOCAL)
    if new:
        write(folder, records)
    return new


def verify(folder: Path, spec: ModelSpec | None = None) -> Iterator[Finding]:
    """Check every file of a model: against what the registry knows of it, else against its record.

    Args:
        folder: The model's folder.
        spec: The model, if it has a name.

    Yields:
        One finding per file, as soon as it is known.

    Raises:
        HubError: The manifest cannot be understood.
    """
    records = read(folder)
    known = {file.name: file for file in spec.files} if spec else {}
    present = model_files(folder)
    lacking = missing_files(spec, folder) if spec else []
    for name in sorted({*records, *present, *lacking}):
        fact, record = known.get(name), records.get(name)
        if name not in present:
            yield Finding(name=name, state="missing", detail=f"expected in {folder}")
            continue
        size = (fact.size_bytes if fact else None) or (record.size_bytes if record else None)
        sha256 = (fact.sha256 if fact else None) or (record.sha256 if record else None)
        yield _check(folder / name, name, size, sha256, "registry" if fact and fact.sha256 else "record")


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def _check(path: Path, name: str, size: int | None, sha256: str | None, origin: str) -> Finding:
    there = size_of(path)
    if size is not None and size != there:
        return Finding(name=name, state="wrong size", detail=f"expected {size:,} bytes, there are {there:,}")
    if sha256 is None:
        return Finding(name=name, state="not recorded", detail="no SHA-256 is known")
    try:
        got = digest(path)[1]
    except OSError as error:
        return Finding(name=name, state="unreadable", detail=str(error.strerror))
    if got != sha256:
        return Finding(name=name, state="wrong hash", detail=f"expected SHA-256 {sha256} ({origin}), it is {got}")
    return Finding(name=name, state="ok", detail=f"{there:,} bytes, SHA-256 {got} ({origin})")


def _parse_record(entry: object) -> Record:
    if not isinstance(entry, dict):
        raise TypeError("an entry is not an object")
    record = Record(**entry)
    texts = (record.name, record.sha256, record.source)
    options = (record.url, record.revision, record.etag)
    if not (all(isinstance(t, str) for t in texts) and all(isinstance(t, str | None) for t in options)):
        raise TypeError("an entry has a value of another type")
    if type(record.size_bytes) is not int or record.size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", record.sha256):
        raise ValueError(f"{record.name!a} has no size and SHA-256")
    return record
