"""The record of a model's files: size, SHA-256 and origin as they arrived. A check against it finds what changed."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from flagai_altdiff.errors import HubError, last_net, printable, shown
from flagai_altdiff.files import claim, new_file
from flagai_altdiff.hub.disk import digest, missing_files, model_files, on_disk, read_small, size_of
from flagai_altdiff.hub.names import MANIFEST_NAME, safe_names
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

VERSION = 1
MAX_BYTES = 4 << 20
MAX_RECORDS = 5_000
MAX_SIZE_BYTES = 1 << 60
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

    @property
    def version(self) -> str:
        """What the files of one version have in common, as far as records can tell."""
        return version(self.source, self.revision)


_FIELDS = {field.name for field in fields(FileRecord)}


@dataclass(frozen=True)
class FileCheck:
    """What a check says about one file.

    Args:
        name: Path inside the model's folder.
        state: Whether it is what it should be.
        detail: What was expected and what is there.
    """

    name: str
    state: Literal["ok", "missing", "unreadable", "wrong size", "wrong hash", "not recorded", "mixed"]
    detail: str


def version(source: str, revision: str | None) -> str:
    """A name for the version that a source has: a commit is the same one everywhere."""
    if revision is None or is_commit(revision):
        return revision or source
    return f"{source} at {revision}"


def is_commit(revision: str | None) -> bool:
    """Whether a revision can never mean other content."""
    return revision is not None and re.fullmatch("[0-9a-f]{40}", revision) is not None


def parse(text: str, where: str) -> dict[str, FileRecord]:
    """The records in the text of a manifest, by name.

    Args:
        text: JSON; whoever wrote it is not trusted.
        where: Where it was found, for messages.

    Raises:
        HubError: It is no manifest, or names files outside the folder.
    """
    try:
        book = json.loads(text, object_pairs_hook=_object)
        if not isinstance(book, dict) or book.get("version") != VERSION:
            raise ValueError(f"no object of version {VERSION}")
        files = book.get("files")
        if not isinstance(files, list) or len(files) > MAX_RECORDS:
            raise ValueError(f"no list of at most {MAX_RECORDS:,} files")
        records = [_parse_record(entry) for entry in files]
    except (ValueError, TypeError, RecursionError) as error:
        raise HubError(f"{where} is not a record of files ({printable(ascii(str(error))[1:-1], 80)}).") from error
    safe_names(record.name for record in records)
    by_name = {record.name: record for record in records}
    if len(by_name) < len(records):
        raise HubError(f"{where} is not a record of files (it has a file twice).")
    return by_name


def read(folder: Path) -> dict[str, FileRecord]:
    """The records of a model's folder, by name; none if there is no manifest.

    Raises:
        HubError: There is one that cannot be understood.
        DiskError: There is one that cannot be read.
    """
    path = folder / MANIFEST_NAME
    with on_disk(path):
        try:
            text = read_small(path, MAX_BYTES).decode("utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return parse(text, str(path))


def write(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Replace the manifest of a folder; the old one stays until the new one is whole.

    Raises:
        HubError: So many files that the manifest could not be read again.
        DiskError: The disk refuses.
    """
    if len(records) > MAX_RECORDS:
        raise HubError(f"{folder} would have {len(records):,} files to record; at most {MAX_RECORDS:,} can be.")
    files = [{k: v for k, v in asdict(records[name]).items() if v is not None} for name in sorted(records)]
    _keep_other(folder)
    with on_disk(folder / MANIFEST_NAME), new_file(folder / MANIFEST_NAME, replace=True) as new:
        text = json.dumps({"version": VERSION, "files": files}, ensure_ascii=False, indent=2) + "\n"
        new.write_text(text, encoding="utf-8")


def _keep_other(folder: Path) -> None:
    """Set what has the manifest's name, and is none that is understood, aside under another name."""
    path = folder / MANIFEST_NAME
    try:
        read(folder)
    except HubError:
        with on_disk(path):
            for number in itertools.count():
                aside = path.with_name(f"{MANIFEST_NAME}.old{number or ''}")
                with suppress(FileExistsError):
                    claim(path, aside)
                    logger.warning("%s is not a record of ours; it is %s now.", printable(str(path)), aside.name)
                    return


def record_missing(folder: Path) -> list[str]:
    """Record the files of a model's folder that have no record yet, as they are now; their names.

    Raises:
        HubError: The manifest cannot be understood, or so many files are there that they are no model.
    """
    folder = Path(folder)
    with last_net(folder, HubError):
        records = read(folder)
        new = [name for name in model_files(folder) if name not in records]
        safe_names([*records, *new])
        if len(records) + len(new) > MAX_RECORDS:
            raise HubError(f"{folder} has {len(new):,} files to record; a model has at most {MAX_RECORDS:,}.")
        for name in new:
            with on_disk(folder / name):
                size, sha256 = digest(folder / name)
            records[name] = FileRecord(name=name, size_bytes=size, sha256=sha256, source=LOCAL)
        if new:
            write(folder, records)
        return new


def verify(folder: Path, spec: ModelSpec | None = None) -> Iterator[FileCheck]:
    """Check every file of a model: against what the registry knows of it, else against its record.

    Files that are what their record says are "mixed" where records name another version than that of most bytes.

    Args:
        folder: The model's folder.
        spec: The model, if it has a name.

    Yields:
        One check per file, as soon as it is known.

    Raises:
        HubError: The manifest cannot be understood.
    """
    folder = Path(folder)
    with last_net(folder, HubError):
        records, present = read(folder), set(model_files(folder))
        known = {file.name: file for file in spec.files} if spec else {}
        main = _main_version([record for record in records.values() if record.name in present])
        for name in sorted({*records, *present, *(missing_files(spec, folder) if spec else ())}):
            fact, record = known.get(name), records.get(name)
            if name not in present:
                yield _absent(folder, name)
                continue
            size = (fact.size_bytes if fact else None) or (record.size_bytes if record else None)
            sha256 = (fact.sha256 if fact else None) or (record.sha256 if record else None)
            check = _check(folder / name, name, size, sha256, "registry" if fact and fact.sha256 else "record")
            mixed = main and record and record.source != LOCAL and record.version != main
            if check.state == "ok" and record and mixed and not (fact and fact.sha256):
                text = f"of {_shown(record.version)}, but the largest files are of {_shown(main or '')}"
                check = FileCheck(name, "mixed", text)
            yield check


def _shown(version: str) -> str:
    """A version as messages name it; whoever wrote the manifest may have written anything."""
    return printable(version, 120)


def _main_version(records: list[FileRecord]) -> str | None:
    """The version that most bytes of the files are of that a hub gave."""
    sizes = defaultdict[str, int](int)
    for record in records:
        if record.source != LOCAL:
            sizes[record.version] += record.size_bytes
    return max(sorted(sizes), key=lambda name: sizes[name], default=None)


def _absent(folder: Path, name: str) -> FileCheck:
    if os.path.lexists(folder / name) and size_of(folder / name) is None:
        return FileCheck(name, "unreadable", "no regular file")
    return FileCheck(name, "missing", f"expected in {folder}")


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


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise ValueError("a key comes twice")
    return entry


def _parse_record(entry: object) -> FileRecord:
    if not isinstance(entry, dict):
        raise TypeError("an entry is not an object")
    if strange := sorted(entry.keys() - _FIELDS):
        raise ValueError(f"an entry has the key {shown(strange[0], 40)}")
    record = FileRecord(**entry)
    texts = [record.name, record.sha256, record.source]
    texts += [option for option in (record.url, record.revision, record.etag) if option is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("an entry has a value of another type")
    "".join(texts).encode()  # half a character cannot be written again
    believed = type(record.size_bytes) is int and 0 <= record.size_bytes < MAX_SIZE_BYTES
    if not believed or not re.fullmatch("[0-9a-f]{64}", record.sha256):
        raise ValueError(f"{shown(record.name, 40)} has no size and SHA-256")
    return record
