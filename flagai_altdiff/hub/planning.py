"""What a fetch will do: the sources of a model in their order, and for one source the files that are there and to come."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from flagai_altdiff.errors import HubError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import baai, hf_cache, huggingface, manifest
from flagai_altdiff.hub.contents import EQUIVALENTS, is_weight, lacking, missing_files, present_files, size_of
from flagai_altdiff.hub.environment import mirror, offline_switch
from flagai_altdiff.hub.manifest import Record
from flagai_altdiff.hub.mirror import Mirror
from flagai_altdiff.hub.names import STAGING_PREFIX, safe_names
from flagai_altdiff.hub.remote import Hub, Location, RemoteFile
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

HUBS: dict[str, Hub] = {"baai": baai, "huggingface": huggingface}
"""Every hub by the name that ``ModelSpec.sources`` uses."""

CACHE = "huggingface-cache"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place that may have a model.

    Args:
        label: Short name, for messages and for the folder where its files are gathered.
        hub: Lists the files.
        name: Name of the model there.
        revision: Version to ask for, if not the hub's newest.
    """

    label: str
    hub: Hub = field(repr=False)
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.label} ({self.name}{f' at {self.revision}' if self.revision else ''})"


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a model that a source offers.

    Args:
        name: Path inside the model's folder, checked.
        remote: The hub's entry.
        location: Where it can be downloaded now.
        size_bytes: Size, if the registry or the source knows it.
        sha256: Hex digest, if the registry or the source knows it, or an earlier download from there recorded it.
        state: ``"present"`` in the folder, ``"arrived"`` in an earlier attempt, ``"cached"`` by other programs, or
            ``"absent"``.
    """

    name: str
    remote: RemoteFile = field(repr=False)
    location: Location = field(repr=False)
    size_bytes: int | None
    sha256: str | None
    state: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fetch will do.

    Args:
        source: Where from.
        staging: Folder where the files are gathered.
        files: All files of the model, the small ones first.
        available: Names of the files that the model's folder will have.
        config_only: Whether the weights are left out.
    """

    source: Source
    staging: Path
    files: tuple[PlannedFile, ...]
    available: set[str] = field(repr=False)
    config_only: bool = False

    @property
    def to_come(self) -> list[PlannedFile]:
        """The files that must be copied or downloaded."""
        return [file for file in self.files if file.state in ("absent", "cached")]

    @property
    def to_come_bytes(self) -> int:
        """Their size, as far as it is known, less what has arrived of them."""
        parts = sum(path.stat().st_size for path in self.staging.rglob("*.part") if path.is_file())
        return max(sum(file.size_bytes or 0 for file in self.to_come) - parts, 0)


def find_sources(spec: ModelSpec, folder: Path, wanted: str | None, revision: str | None) -> list[Source]:
    """Where to look, in order; offline, only what is on this disk."""
    versions = {"huggingface": revision or spec.revision}
    hubs = [
        Source(label=label, hub=HUBS[label], name=name, revision=versions.get(label, revision))
        for label, name in spec.sources.items()
        if wanted == label or (wanted is None and (revision is None or label in versions))
    ]
    cache = [
        replace(source, label=CACHE, hub=hf_cache)
        for source in hubs
        if source.hub is huggingface and hf_cache.has(source.name, source.revision)
    ]
    address = mirror() if wanted is None and revision is None else wanted
    mirrors = [] if address is None or address in HUBS or spec.embedded else [_mirror(address, spec.name, revision)]
    if switch := offline_switch():
        if not cache:
            raise OfflineError(
                f"{spec.name}: {', '.join(missing_files(spec, folder))} not found in {folder}, and {switch} forbids downloads. "
                f"Unset it and try again, or put the files there."
            )
        return cache
    return [*mirrors, *cache, *hubs]


def _mirror(address: str, name: str, revision: str | None) -> Source:
    if "://" not in address:
        raise HubError(f"unknown source {address!a}: expected {', '.join(HUBS)}, or the http(s) address of a mirror.")
    return Source(label=f"mirror-{_tag(address)}", hub=Mirror(address), name=name, revision=revision)


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def make_plan(spec: ModelSpec, folder: Path, source: Source, config_only: bool) -> Plan:
    """What is to come from one source.

    Raises:
        ModelNotFoundError: It does not have the whole model.
        HubError: It cannot be asked, or what it says is refused.
    """
    listed = source.hub.list_files(source.name, source.revision)
    safe_names(file.name for file in listed)
    wanted = sorted(_wanted(spec, listed, config_only), key=lambda file: is_weight(file.name))
    available = present_files(folder) | {file.name for file in wanted}
    if gone := lacking(spec, available, config_only=config_only):
        raise ModelNotFoundError(f"{source.label} lists {source.name}, but without {', '.join(gone)}.")
    revision = next((file.revision for file in wanted), None)
    staging = folder / f"{STAGING_PREFIX}{source.label}{f'-{_tag(revision)}' if revision else ''}"
    if staging.is_symlink():
        raise HubError(f"{staging} is a symbolic link; refused. Remove it.")
    records, planned = read_records(folder), list[PlannedFile]()
    for file in wanted:
        try:
            location = file.locate()
        except ModelNotFoundError as error:
            do_without(spec, available, file.name, error, config_only)
        else:
            record = records.get(file.name)
            same = record and (record.source, record.revision) == (source.label, file.revision)
            planned.append(_plan_file(spec, file, location, record if same else None, folder, staging))
    return Plan(source=source, staging=staging, files=tuple(planned), available=available, config_only=config_only)


def _plan_file(
    spec: ModelSpec, file: RemoteFile, location: Location, record: Record | None, folder: Path, staging: Path
) -> PlannedFile:
    known = next((known for known in spec.files if known.name == file.name), None)
    size = (known.size_bytes if known else None) or file.size_bytes or location.size_bytes or None
    sha256 = (known.sha256 if known else None) or file.sha256 or (record.sha256 if record else None)
    there = [state for state, path in (("present", folder), ("arrived", staging)) if _has_size(path / file.name, size)]
    state = there[0] if there else "cached" if file.copy else "absent"
    return PlannedFile(name=file.name, remote=file, location=location, size_bytes=size, sha256=sha256, state=state)


def _wanted(spec: ModelSpec, listed: list[RemoteFile], config_only: bool) -> Iterator[RemoteFile]:
    """All but weights that are not asked for: with ``config_only`` any, else files beside the model's own."""
    names = {file.name for file in listed}
    own = {file.name if file.name in names else EQUIVALENTS.get(file.name) for file in spec.files}
    for file in listed:
        if not is_weight(file.name) or (not config_only and ("/" in file.name or file.name in own)):
            yield file


def do_without(spec: ModelSpec, available: set[str], name: str, error: HubError, config_only: bool) -> None:
    """Strike a file that a source lost off what is available; raises ``error`` if the model needs it."""
    available.discard(name)
    if lacking(spec, available, config_only=config_only):
        raise error
    logger.warning("%s: goes on without %s: %s", spec.name, name, error)


def read_records(folder: Path) -> dict[str, Record]:
    """The records of a folder; a manifest that cannot be understood counts as none."""
    try:
        return manifest.read(folder)
    except HubError as error:
        logger.warning("%s A new record is begun.", error)
        return {}


def _has_size(path: Path, size: int | None) -> bool:
    return size_of(path) is not None and size in (None, size_of(path))
