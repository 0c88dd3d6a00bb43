"""From a model's spec to a complete folder: which source, which files, side by side, and into place when all are there."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from flagai_altdiff.errors import HubError, HubUnavailableError, IntegrityError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import baai, hf_cache, huggingface, manifest
from flagai_altdiff.hub.client import shown
from flagai_altdiff.hub.contents import EQUIVALENTS, is_weight, lacking, missing_files, present_files, size_of
from flagai_altdiff.hub.environment import BAAI_VARIABLE, MIRROR_VARIABLE, mirror, offline_switch
from flagai_altdiff.hub.lock import alone_in
from flagai_altdiff.hub.manifest import Record
from flagai_altdiff.hub.mirror import Mirror
from flagai_altdiff.hub.names import STAGING_PREFIX, safe_name, safe_names
from flagai_altdiff.hub.progress import Progress, Report, human
from flagai_altdiff.hub.remote import Hub, Location, RemoteFile
from flagai_altdiff.hub.selection import INDEX
from flagai_altdiff.hub.threads import Stop, run_all
from flagai_altdiff.hub.transfer import Received, check_space, copy, download
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

HUBS: dict[str, Hub] = {"baai": baai, "huggingface": huggingface}
"""Every hub by the name that ``ModelSpec.sources`` uses."""

CACHE = "huggingface-cache"
MARKERS = (INDEX, "config.yaml")
"""Files that say which layout a folder has; moved into place last."""


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


def fetch(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Path:
    """Make the files of a model present in a folder.

    A folder that has them all is left alone and nothing is asked. Otherwise one process at a time tries the sources in
    their order: the mirror that the user named, Hugging Face's cache on this disk, the model's hubs. The files of one source
    arrive in ``folder/.incoming-<source>``, where an interrupted download goes on next time, and are moved into place when
    they are complete; size, hash and origin of each are recorded.

    Args:
        spec: The model.
        folder: Its folder; made if needed.
        config_only: Leave the weights out.
        source: Only this one: a key of ``HUBS``, or the address of a mirror.
        revision: Version to ask for, at hubs that have versions.

    Returns:
        ``folder``.

    Raises:
        OfflineError: Files are missing and the offline switch is on.
        ModelNotFoundError: Every source answered that it does not have the model.
        HubUnavailableError: No source could give the files.
        HubError: The local disk failed (``errno`` is set).
    """
    if not missing_files(spec, folder, config_only=config_only):
        return folder
    sources = _sources(spec, folder, source, revision)
    with alone_in(folder, lambda: f"{human(_arrived_bytes(folder))} so far") as alone:
        if missing_files(spec, folder, config_only=config_only):
            _try_each(spec, folder, sources, lambda plan: _carry_out(plan, spec, folder, alone), config_only=config_only)
    return folder


def plan(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Plan:
    """What :func:`fetch` would do now with the first source that answers; nothing is written. Arguments and errors as there."""
    sources = _sources(spec, folder, source, revision)
    return _try_each(spec, folder, sources, lambda made: made, config_only=config_only)


def _sources(spec: ModelSpec, folder: Path, wanted: str | None, revision: str | None) -> list[Source]:
    """Where to look, in order; offline, only what is on this disk."""
    versions = {"huggingface": revision or spec.revision}
    hubs = [
        Source(label=label, hub=HUBS[label], name=name, revision=versions.get(label, revision))
        for label, name in spec.sources.items()
        if wanted in (None, label) and (revision is None or label in versions)
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


def _try_each(spec: ModelSpec, folder: Path, sources: list[Source], act: Callable[[Plan], T], *, config_only: bool) -> T:
    attempts: dict[Source, HubError] = {}
    for source in sources:
        try:
            return act(_make_plan(spec, folder, source, config_only))
        except HubError as error:
            if error.errno is not None:
                raise
            logger.warning("%s cannot be had from %s: %s", spec.name, source.label, error)
            attempts[source] = error
    raise _all_failed(spec, folder, missing_files(spec, folder, config_only=config_only), attempts)


def _make_plan(spec: ModelSpec, folder: Path, source: Source, config_only: bool) -> Plan:
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
    records, planned = _read_records(folder), list[PlannedFile]()
    for file in wanted:
        try:
            location = file.locate()
        except ModelNotFoundError as error:
            _do_without(spec, available, file.name, error, config_only)
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


def _do_without(spec: ModelSpec, available: set[str], name: str, error: HubError, config_only: bool) -> None:
    """Strike a file that a source lost off what is available; raises ``error`` if the model needs it."""
    available.discard(name)
    if lacking(spec, available, config_only=config_only):
        raise error
    logger.warning("%s: goes on without %s: %s", spec.name, name, error)


def _carry_out(plan: Plan, spec: ModelSpec, folder: Path, alone: bool) -> None:
    """Bring all files of a plan into its staging folder, then into place; beside other processes, in a folder of its own."""
    if not alone:
        plan = _apart(plan)
    check_space(folder, plan.to_come_bytes)
    logger.info("%s: fetching %d files from %s into %s", spec.name, len(plan.to_come), plan.source.label, folder)
    stop, guard, staged = Stop(), threading.Lock(), _read_records(plan.staging)

    def bring(file: PlannedFile) -> None:
        try:
            with progress.file(file.name) as report:
                received = _bring(file, _inside(plan.staging, file.name), report, stop)
        except ModelNotFoundError as error:
            with guard:
                _do_without(spec, plan.available, file.name, error, plan.config_only)
            return
        with guard:
            staged[file.name] = _record(file, received, plan.source)
            manifest.write(plan.staging, staged)

    with Progress(spec.name, sum(file.size_bytes or 0 for file in plan.to_come)) as progress:
        run_all([functools.partial(bring, file) for file in plan.to_come], stop)
    arrived = [file for file in plan.files if file.state != "present" and (plan.staging / file.name).is_file()]
    for file in arrived:
        if file.name not in staged:
            size, sha256 = manifest.digest(plan.staging / file.name)
            staged[file.name] = _record(file, Received(size_bytes=size, sha256=sha256), plan.source)
    manifest.write(folder, _read_records(folder) | {file.name: staged[file.name] for file in arrived})
    _move([file.name for file in arrived], plan.staging, folder)
    for leftover in folder.glob(f"{STAGING_PREFIX}*") if alone else (plan.staging,):
        shutil.rmtree(leftover, ignore_errors=True)


def _apart(plan: Plan) -> Plan:
    """The same plan with a staging folder that no other process uses."""
    files = (replace(file, state="absent") if file.state == "arrived" else file for file in plan.files)
    return replace(plan, staging=plan.staging.with_name(f"{plan.staging.name}-{os.getpid()}"), files=tuple(files))


def _bring(file: PlannedFile, target: Path, report: Report, stop: Stop) -> Received:
    """One file into the staging folder: copied where this disk has it, else downloaded."""
    if file.remote.copy is not None:
        try:
            return copy(file.remote.copy, target, size_bytes=file.size_bytes, sha256=file.sha256, report=report, stop=stop)
        except IntegrityError as error:
            if file.location.url.startswith("file:"):
                raise
            logger.warning("%s It is downloaded instead.", error)

    def get(location: Location) -> Received:
        return download(
            location.url,
            target,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            headers=location.headers,
            report=report,
            stop=stop,
        )

    try:
        return get(file.location)
    except (ModelNotFoundError, IntegrityError):
        raise
    except HubError as error:
        renewed = file.remote.locate() if error.errno is None else file.location
        if renewed == file.location:
            raise
        return get(renewed)  # an address that was valid for a while only


def _record(file: PlannedFile, received: Received, source: Source) -> Record:
    return Record(
        name=file.name,
        size_bytes=received.size_bytes,
        sha256=received.sha256,
        source=source.label,
        url=shown(file.location.url),
        revision=file.remote.revision,
        etag=received.etag,
    )


def _read_records(folder: Path) -> dict[str, Record]:
    try:
        return manifest.read(folder)
    except HubError as error:
        logger.warning("%s A new record is begun.", error)
        return {}


def _move(names: Iterable[str], staging: Path, folder: Path) -> None:
    for name in sorted(names, key=lambda name: name in MARKERS):
        target = _inside(folder, name)
        if target.exists():
            logger.warning("%s is replaced: its size differs from the announced one", target)
        try:
            os.replace(staging / name, target)
        except OSError as error:
            raise HubError(error.errno, f"{target}: {error.strerror}.") from error


def _inside(root: Path, name: str) -> Path:
    """``root/name`` with its folder made; HubError if a symbolic link leads that folder out of ``root``."""
    path = root / safe_name(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root.resolve()):
            raise HubError(f"{path.parent} leads out of {root} through a symbolic link; refused. Remove the link.")
        path.parent.mkdir(parents=True, exist_ok=True)
    except HubError:
        raise
    except OSError as error:
        raise HubError(error.errno, f"{path.parent}: {error.strerror}. Choose a folder that can be written to.") from error
    return path


def _has_size(path: Path, size: int | None) -> bool:
    return size_of(path) is not None and size in (None, size_of(path))


def _arrived_bytes(folder: Path) -> int:
    """Bytes that downloads into a folder have brought so far."""
    parts = (path for staging in folder.glob(f"{STAGING_PREFIX}*") for path in staging.rglob("*"))
    return sum(size_of(path) or 0 for path in parts)


def _all_failed(spec: ModelSpec, folder: Path, missing: list[str], attempts: dict[Source, HubError]) -> HubError:
    if not attempts:
        return ModelNotFoundError(f"{spec.name}: {', '.join(missing)} not found in {folder}, and no hub has this model.")
    lines = [f"{spec.name} could not be downloaded."]
    lines += [f"  {source}: {error}" for source, error in attempts.items()]
    lines += [
        f"Missing: {', '.join(missing)}. Next steps:",
        "  - try again: what has arrived is kept;",
        f"  - name a mirror that you can reach: {MIRROR_VARIABLE}, {BAAI_VARIABLE} or HF_ENDPOINT;",
        f"  - or get the files another way and put them into {folder.absolute()}, in the FlagAI or the diffusers layout.",
    ]
    text = "\n".join(lines)
    if offline_switch():
        return OfflineError(text)
    if all(isinstance(error, ModelNotFoundError) for error in attempts.values()):
        return ModelNotFoundError(text)
    return HubUnavailableError(text)
