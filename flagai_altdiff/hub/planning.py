"""What a fetch will do: the sources of a model in their order; for one source, the files there and to come."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flagai_altdiff.errors import HubError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import baai, environment, hf_cache, huggingface, manifest
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.disk import missing_files, present_files, size_of
from flagai_altdiff.hub.environment import MIRROR_VARIABLE, offline_switch
from flagai_altdiff.hub.manifest import FileRecord
from flagai_altdiff.hub.mirror import Mirror
from flagai_altdiff.hub.names import PART_SUFFIX, STAGING_PREFIX, safe_names
from flagai_altdiff.hub.remote import Hub, Location, RemoteFile
from flagai_altdiff.model_files import EQUIVALENTS, is_hidden, is_weight, lacking
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

HUBS: dict[str, Hub] = {"baai": baai, "huggingface": huggingface}
"""Every hub by the name that ``ModelSpec.sources`` uses."""

CACHE = "huggingface-cache"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The model that is to be fetched.

    Args:
        spec: What it is.
        folder: Where it is to be.
        config_only: Whether its weights are left out.
    """

    spec: ModelSpec
    folder: Path
    config_only: bool = False

    def missing(self) -> list[str]:
        """What its folder lacks now."""
        return missing_files(self.spec, self.folder, config_only=self.config_only)

    def lacking(self, names: Set[str]) -> list[str]:
        """What it would lack with files of these names."""
        return lacking((file.name for file in self.spec.files), names, config_only=self.config_only)


FileState = Literal["present", "arrived", "cached", "absent"]


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
        state: Whether it is in the folder, came in an earlier attempt, lies in another program's cache, or none.
    """

    name: str
    remote: RemoteFile = field(repr=False)
    location: Location = field(repr=False)
    size_bytes: int | None
    sha256: str | None
    state: FileState


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fetch will do.

    Args:
        wanted: The model.
        source: Where from.
        staging: Folder where the files are gathered.
        files: All files of the model, the small ones first.
        available: Names of the files that the model's folder will have.
    """

    wanted: Wanted
    source: Source
    staging: Path
    files: tuple[PlannedFile, ...] = ()
    available: set[str] = field(repr=False)

    @property
    def to_come(self) -> list[PlannedFile]:
        """The files that must be copied or downloaded."""
        return [file for file in self.files if file.state in ("absent", "cached")]

    @property
    def to_come_bytes(self) -> int:
        """Their size, as far as it is known, less what has arrived of them."""
        parts = sum(size_of(path) or 0 for path in self.staging.rglob(f"*{PART_SUFFIX}"))
        return max(sum(file.size_bytes or 0 for file in self.to_come) - parts, 0)

    def do_without(self, name: str, error: HubError) -> None:
        """Strike a file that the source lost off what is available; raises ``error`` if the model needs it."""
        self.available.discard(name)
        if self.wanted.lacking(self.available):
            raise error
        logger.warning("%s: goes on without %s: %s", self.wanted.spec.name, name, error)


def find_sources(wanted: Wanted, only: str | None, revision: str | None) -> list[Source]:
    """Where to look, in order; offline, only what is on this disk. Arguments as in :func:`fetching.fetch`."""
    spec = wanted.spec
    versions = {"huggingface": revision or spec.revision}
    hubs = [
        Source(label=label, hub=HUBS[label], name=name, revision=versions.get(label, revision))
        for label, name in spec.sources
        if only == label or (only is None and (revision is None or label in versions))
    ]
    cache = [
        replace(source, label=CACHE, hub=hf_cache)
        for source in hubs
        if source.hub is huggingface and hf_cache.has(source.name, source.revision)
    ]
    mirrors = [] if only in HUBS or spec.embedded else _mirrors(spec, only, revision)
    if switch := offline_switch():
        if not cache:
            places = f"{wanted.folder} or in Hugging Face's cache, {str(environment.hf_cache())!a}"
            raise OfflineError(
                f"{spec.name}: {', '.join(wanted.missing())} not found in {places}, and {switch} forbids "
                "downloads. Unset it and try again, or put the files there."
            )
        return cache
    return [*mirrors, *cache, *hubs]


def _mirrors(spec: ModelSpec, only: str | None, revision: str | None) -> list[Source]:
    """The mirror that was asked for, else that of the environment; its address is checked when it is its turn."""
    address = only or (environment.mirror() if revision is None else None)
    if address is None:
        return []
    if only and "://" not in only:
        known = ", ".join(HUBS)
        raise HubError(f"unknown source {redact_url(only)!a}: expected {known}, or the http(s) address of a mirror.")
    usual = tuple(file.name for file in spec.files)
    hub = Mirror(address=address, setting="source" if only else MIRROR_VARIABLE, usual_files=usual)
    return [Source(label=f"mirror-{_tag(address)}", hub=hub, name=spec.name, revision=revision)]


def _tag(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def make_plan(wanted: Wanted, source: Source) -> Plan:
    """What is to come from one source.

    Raises:
        ModelNotFoundError: It does not have the whole model.
        HubError: It cannot be asked, or what it says is refused.
    """
    listed = source.hub.list_files(source.name, source.revision)
    safe_names(file.name for file in listed)
    files = sorted(_asked_for(wanted, listed), key=lambda file: is_weight(file.name))
    revision, available = (
        next((f.revision for f in files), None),
        present_files(wanted.folder) | {f.name for f in files},
    )
    staging = wanted.folder / f"{STAGING_PREFIX}{source.label}{f'-{_tag(revision)}' if revision else ''}"
    plan = Plan(wanted=wanted, source=source, staging=staging, available=available)
    if gone := wanted.lacking(available):
        raise ModelNotFoundError(f"{source.label} lists {source.name}, but without {', '.join(gone)}.")
    if staging.is_symlink():
        raise HubError(f"{staging} is a symbolic link; refused. Remove it.")
    records, planned = read_records(wanted.folder), list[PlannedFile]()
    for file in files:
        try:
            location = file.locate()
        except ModelNotFoundError as error:
            plan.do_without(file.name, error)
        else:
            record = records.get(file.name)
            same = record and (record.source, record.revision) == (source.label, file.revision)
            planned.append(_plan_file(plan, file, location, record if same else None))
    return replace(plan, files=tuple(planned))


def _plan_file(plan: Plan, file: RemoteFile, location: Location, record: FileRecord | None) -> PlannedFile:
    known = next((known for known in plan.wanted.spec.files if known.name == file.name), None)
    size = (known.size_bytes if known else None) or file.size_bytes or location.size_bytes or None
    sha256 = (known.sha256 if known else None) or file.sha256 or (record.sha256 if record else None)
    state: FileState = "cached" if file.copy else "absent"
    if _has_size(plan.wanted.folder / file.name, size):
        state = "present"
    elif _has_size(plan.staging / file.name, size):
        state = "arrived"
    return PlannedFile(name=file.name, remote=file, location=location, size_bytes=size, sha256=sha256, state=state)


def _asked_for(wanted: Wanted, listed: list[RemoteFile]) -> Iterator[RemoteFile]:
    """All but hidden files and needless weights: any if only the config is wanted, else those that are no part."""
    names = {file.name for file in listed}
    own = {file.name if file.name in names else EQUIVALENTS.get(file.name) for file in wanted.spec.files}
    for file in listed:
        needed = not wanted.config_only and ("/" in file.name or file.name in own)
        if not is_hidden(file.name) and (needed or not is_weight(file.name)):
            yield file


def read_records(folder: Path) -> dict[str, FileRecord]:
    """The records of a folder; a manifest that cannot be understood counts as none."""
    try:
        return manifest.read(folder)
    except HubError as error:
        logger.warning("%s A new record is begun.", error)
        return {}


def _has_size(path: Path, size: int | None) -> bool:
    return size_of(path) is not None and size in (None, size_of(path))
