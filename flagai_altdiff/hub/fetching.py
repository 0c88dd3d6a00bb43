"""A plan carried out: all files of one source, side by side, and into place when all are there; else the next."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flagai_altdiff.errors import (
    DiskError,
    HubError,
    HubUnavailableError,
    IntegrityError,
    ModelNotFoundError,
    OfflineError,
)
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.disk import check_space, on_disk, size_of
from flagai_altdiff.hub.environment import BAAI_VARIABLE, HF_VARIABLE, MIRROR_VARIABLE, in_force, offline_switch
from flagai_altdiff.hub.lock import folder_lock
from flagai_altdiff.hub.manifest import FileRecord
from flagai_altdiff.hub.names import STAGING_PREFIX, safe_name
from flagai_altdiff.hub.planning import Plan, PlannedFile, Source, Wanted, find_sources, make_plan, read_records
from flagai_altdiff.hub.progress import Progress, Report, human
from flagai_altdiff.hub.remote import Location
from flagai_altdiff.hub.threads import Stop, run_all
from flagai_altdiff.hub.transfer import Received, copy, download
from flagai_altdiff.model_files import DIFFUSERS_INDEX, FLAGAI_CONFIG
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARKERS = (DIFFUSERS_INDEX, FLAGAI_CONFIG)
"""Files that say which layout a folder has; moved into place last."""


def fetch(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Path:
    """Make the files of a model present in a folder.

    A folder that has them all is left alone and nothing is asked. Otherwise one process at a time tries the sources in
    their order: the mirror that the user named, Hugging Face's cache on this disk, the model's hubs. The files of one
    source arrive in ``folder/.incoming-<source>``, where an interrupted download goes on next time, and are moved into
    place when they are complete; size, hash and origin of each are recorded.

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
        DiskError: The local disk failed.
    """
    wanted = Wanted(spec=spec, folder=folder, config_only=config_only)
    if wanted.missing():
        sources = find_sources(wanted, source, revision)
        with folder_lock(folder, lambda: f"{human(_arrived_bytes(folder))} so far") as held:
            if wanted.missing():
                _try_each(wanted, sources, lambda plan: _carry_out(plan, held))
    return folder


def plan(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Plan:
    """What :func:`fetch` would do now with the first source that answers; arguments and errors as there."""
    wanted = Wanted(spec=spec, folder=folder, config_only=config_only)
    return _try_each(wanted, find_sources(wanted, source, revision), lambda made: made)


def _try_each(wanted: Wanted, sources: list[Source], act: Callable[[Plan], T]) -> T:
    attempts: dict[Source, HubError] = {}
    for source in sources:
        try:
            return act(make_plan(wanted, source))
        except DiskError:
            raise
        except HubError as error:
            logger.warning("%s is unavailable from %s: %s", wanted.spec.name, source.label, error)
            attempts[source] = error
    raise _all_failed(wanted, attempts)


def _carry_out(plan: Plan, locked: bool) -> None:
    """Bring all files of a plan into its staging folder, then into place; without a lock, in a folder of its own."""
    plan = plan if locked else _apart(plan)
    folder = plan.wanted.folder
    check_space(folder, plan.to_come_bytes)
    logger.info("%s: %d files to fetch from %s", folder, len(plan.to_come), plan.source.label)
    stop, guard, staged = Stop(), threading.Lock(), read_records(plan.staging)

    def bring(file: PlannedFile) -> None:
        try:
            with progress.file(file.name, file.size_bytes) as report:
                received = _bring(file, _inside(plan.staging, file.name), report, stop)
        except ModelNotFoundError as error:
            with guard:
                plan.do_without(file.name, error)
            return
        with guard:
            staged[file.name] = _record(file, received, plan.source)
            manifest.write(plan.staging, staged)

    with Progress(plan.wanted.spec.name, sum(file.size_bytes or 0 for file in plan.to_come)) as progress:
        run_all([functools.partial(bring, file) for file in plan.to_come], stop)
    arrived = {file.name: file for file in plan.files if file.state != "present" and size_of(plan.staging / file.name)}
    for name in arrived.keys() - staged.keys():
        size, sha256 = manifest.digest(plan.staging / name)
        staged[name] = _record(arrived[name], Received(size_bytes=size, sha256=sha256), plan.source)
    manifest.write(folder, read_records(folder) | {name: staged[name] for name in arrived})
    _move(arrived, plan.staging, folder)
    for leftover in folder.glob(f"{STAGING_PREFIX}*") if locked else (plan.staging,):
        shutil.rmtree(leftover, ignore_errors=True)


def _apart(plan: Plan) -> Plan:
    """The same plan with a staging folder that no other process uses."""
    files = (replace(file, state="absent") if file.state == "arrived" else file for file in plan.files)
    return replace(plan, staging=Path(f"{plan.staging}-{secrets.token_hex(8)}"), files=tuple(files))


def _bring(file: PlannedFile, target: Path, report: Report, stop: Stop) -> Received:
    """One file into the staging folder: copied where this disk has it, else downloaded."""
    size, sha256 = file.size_bytes, file.sha256

    def get(location: Location) -> Received:
        location.check_way(sha256)
        headers = location.headers
        return download(location.url, target, size_bytes=size, sha256=sha256, headers=headers, report=report, stop=stop)

    if file.remote.copy is not None:
        try:
            return copy(file.remote.copy, target, size_bytes=size, sha256=sha256, report=report, stop=stop)
        except DiskError:
            raise
        except HubError as error:
            if file.location.url.startswith("file:"):
                raise
            logger.warning("%s It is downloaded instead.", error)
    try:
        return get(file.location)
    except (ModelNotFoundError, IntegrityError, DiskError):
        raise
    except HubError:
        renewed = file.remote.locate()
        if renewed == file.location:
            raise
        return get(renewed)  # an address that was valid for a while only


def _record(file: PlannedFile, received: Received, source: Source) -> FileRecord:
    return FileRecord(
        name=file.name,
        size_bytes=received.size_bytes,
        sha256=received.sha256,
        source=source.label,
        url=redact_url(file.location.url),
        revision=file.remote.revision,
        etag=received.etag,
    )


def _move(names: Iterable[str], staging: Path, folder: Path) -> None:
    for name in sorted(names, key=lambda name: name in MARKERS):
        target = _inside(folder, name)
        if target.exists():
            logger.warning("%s is replaced: its size differs from the announced one", target)
        with on_disk(target):
            os.replace(staging / name, target)


def _inside(root: Path, name: str) -> Path:
    """``root/name`` with its folder made; HubError if a symbolic link leads that folder out of ``root``."""
    path = root / safe_name(name)
    with on_disk(path.parent):
        root.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root.resolve()):
            raise HubError(f"{path.parent} leads out of {root} through a symbolic link; refused. Remove the link.")
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _arrived_bytes(folder: Path) -> int:
    """Bytes that downloads into a folder have brought so far."""
    parts = (path for staging in folder.glob(f"{STAGING_PREFIX}*") for path in staging.rglob("*"))
    return sum(size_of(path) or 0 for path in parts)


def _all_failed(wanted: Wanted, attempts: dict[Source, HubError]) -> HubError:
    name, folder, missing = wanted.spec.name, wanted.folder, ", ".join(wanted.missing())
    if not attempts:
        return ModelNotFoundError(f"{name}: {missing} not found in {folder}, and no hub has this model.")
    settings = ", ".join(in_force())
    lines = [
        f"{name} could not be downloaded.",
        *(f"  {source}: {error}" for source, error in attempts.items()),
        f"Missing: {missing}. Next steps:",
        "  - try again: what has arrived is kept;",
        *([f"  - check or unset {settings}, which decide what is asked;"] if settings else ()),
        f"  - name a mirror that you can reach: {MIRROR_VARIABLE}, {BAAI_VARIABLE} or {HF_VARIABLE};",
        f"  - or put the files into {folder.absolute()} yourself, in the FlagAI or the diffusers layout.",
    ]
    text = "\n".join(lines)
    if offline_switch():
        return OfflineError(text)
    if all(isinstance(error, ModelNotFoundError) for error in attempts.values()):
        return ModelNotFoundError(text)
    return HubUnavailableError(text)
