"""The record of a model's files: size, SHA-256 and origin as they arrived. A check against it finds what changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from flagai_altdiff.errors import HubError
from flagai_altdiff.files import new_file
from flagai_altdiff.hub.disk import missing_files, model_files, on_disk, size_of
from flagai_altdiff.hub.names import MANIFEST_NAME, safe_names
from flagai_altdiff.registry import ModelSpec

VERSION = 1
MAX_BYTES = 4 << 20
LOCAL = "this disk"
"""Source of a record that was made from a file already there."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
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


@dataclass(frozen=True)
class FileCheck:
    """What a check says about one file.

    Args:
        name: Path inside the model's folder.
        state: Whether it is what it should be.
        detail: What was expected and what is there.
    """

    name: str
    state: Literal["ok", "missing", "unreadable", "wrong size", "wrong hash", "not recorded"]
    detail: str


def parse(text: str, where: str) -> dict[str, FileRecord]:
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
        raise HubError(f"{where} is not a record of files ({ascii(str(error))[1:81]}).") from error
    safe_names(record.name for record in records)
    return {record.name: record for record in records}


def read(folder: Path) -> dict[str, FileRecord]:
    """The records of a model's folder, by name; none if there is no manifest.

    Raises:
        HubError: There is one that cannot be understood.
        DiskError: There is one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    with on_disk(path):
        try:
            if path.stat().st_size > MAX_BYTES:
                raise HubError(f"{path} has more than {MAX_BYTES} bytes; it is not a record of files. Remove it.")
            text = path.read_text("utf-8-sig")
        except FileNotFoundError:
            return {}
    return parse(text, str(path))


def write(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Replace the manifest of a folder; the old one stays until the new one is whole."""
    files = [{k: v for k, v in asdict(records[name]).items() if v is not None} for name in sorted(records)]
    with on_disk(folder / MANIFEST_NAME), new_file(folder / MANIFEST_NAME, replace=True) as new:
        text = json.dumps({"version": VERSION, "files": files}, ensure_ascii=False, indent=2) + "\n"
        new.write_text(text, encoding="utf-8")


def record_missing(folder: Path) -> list[str]:
    """Record the files of a model's folder that have no record yet, as they are now; their names."""
    records = read(folder)
    new = [name for name in model_files(folder) if name not in records]
    for name in new:
        with on_disk(folder / name):
            size, sha256 = digest(folder / name)
        records[name] = FileRecord(name=name, size_bytes=size, sha256=sha256, source=LOCAL)
    if new:
        write(folder, records)
    return new


def verify(folder: Path, spec: ModelSpec | None = None) -> Iterator[FileCheck]:
    """Check every file of a model: against what the registry knows of it, else against its record.

    Args:
        folder: The model's folder.
        spec: The model, if it has a name.

    Yields:
        One check per file, as soon as it is known.

    Raises:
        HubError: The manifest cannot be understood.
    """
    records, present = read(folder), model_files(folder)
    known = {file.name: file for file in spec.files} if spec else {}
    for name in sorted({*records, *present, *(missing_files(spec, folder) if spec else ())}):
        fact, record = known.get(name), records.get(name)
        if name not in present:
            yield FileCheck(name, "missing", f"expected in {folder}")
            continue
        size = (fact.size_bytes if fact else None) or (record.size_bytes if record else None)
        sha256 = (fact.sha256 if fact else None) or (record.sha256 if record else None)
        yield _check(folder / name, name, size, sha256, "registry" if fact and fact.sha256 else "record")


def digest(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256


def _check(path: Path, name: str, size: int | None, sha256: str | None, origin: str) -> FileCheck:
    there = size_of(path)
    if size is not None and size != there:
        return FileCheck(name, "wrong size", f"expected {size:,} bytes, there are {there:,}")
    if sha256 is None:
        return FileCheck(name, "not recorded", "no SHA-256 is known")
    try:
        got = digest(path)[1]
    except OSError as error:
        return FileCheck(name, "unreadable", str(error.strerror))
    if got != sha256:
        return FileCheck(name, "wrong hash", f"expected SHA-256 {sha256} ({origin}), it is {got}")
    return FileCheck(name, "ok", f"{there:,} bytes, SHA-256 {got} ({origin})")


def _parse_record(entry: object) -> FileRecord:
    if not isinstance(entry, dict):
        raise TypeError("an entry is not an object")
    record = FileRecord(**entry)
    texts = [record.name, record.sha256, record.source]
    texts += [option for option in (record.url, record.revision, record.etag) if option is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("an entry has a value of another type")
    "".join(texts).encode()  # half a character cannot be written again
    if type(record.size_bytes) is not int or record.size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", record.sha256):
        raise ValueError(f"{record.name!a} has no size and SHA-256")
    return record
