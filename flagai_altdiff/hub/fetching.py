"""Carrying out a plan: all files of one source, side by side, and into place when all are there; else the next source."""

from __future__ import annotations

import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from flagai_altdiff.errors import HubError, HubUnavailableError, IntegrityError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.client import shown
from flagai_altdiff.hub.contents import missing_files, size_of
from flagai_altdiff.hub.environment import BAAI_VARIABLE, MIRROR_VARIABLE, offline_switch
from flagai_altdiff.hub.lock import alone_in
from flagai_altdiff.hub.manifest import Record
from flagai_altdiff.hub.names import STAGING_PREFIX, safe_name
from flagai_altdiff.hub.planning import Plan, PlannedFile, Source, do_without, find_sources, make_plan, read_records
from flagai_altdiff.hub.progress import Progress, Report, human
from flagai_altdiff.hub.remote import Location
from flagai_altdiff.hub.selection import INDEX
from flagai_altdiff.hub.threads import Stop, run_all
from flagai_altdiff.hub.transfer import Received, check_space, copy, download
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARKERS = (INDEX, "config.yaml")
"""Files that say which layout a folder has; moved into place last."""


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
    sources = find_sources(spec, folder, source, revision)
    with alone_in(folder, lambda: f"{human(_arrived_bytes(folder))} so far") as alone:
        if missing_files(spec, folder, config_only=config_only):
            _try_each(spec, folder, sources, lambda plan: _carry_out(plan, spec, folder, alone), config_only=config_only)
    return folder


def plan(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Plan:
    """What :func:`fetch` would do now with the first source that answers; nothing is written. Arguments and errors as there."""
    sources = find_sources(spec, folder, source, revision)
    return _try_each(spec, folder, sources, lambda made: made, config_only=config_only)


def _try_each(spec: ModelSpec, folder: Path, sources: list[Source], act: Callable[[Plan], T], *, config_only: bool) -> T:
    attempts: dict[Source, HubError] = {}
    for source in sources:
        try:
            return act(make_plan(spec, folder, source, config_only))
        except HubError as error:
            if error.errno is not None:
                raise
            logger.warning("%s cannot be had from %s: %s", spec.name, source.label, error)
            attempts[source] = error
    raise _all_failed(spec, folder, missing_files(spec, folder, config_only=config_only), attempts)


def _carry_out(plan: Plan, spec: ModelSpec, folder: Path, alone: bool) -> None:
    """Bring all files of a plan into its staging folder, then into place; beside other processes, in a folder of its own."""
    if not alone:
        plan = _apart(plan)
    check_space(folder, plan.to_come_bytes)
    logger.info("%s: fetching %d files from %s into %s", spec.name, len(plan.to_come), plan.source.label, folder)
    stop, guard, staged = Stop(), threading.Lock(), read_records(plan.staging)

    def bring(file: PlannedFile) -> None:
        try:
            with progress.file(file.name) as report:
                received = _bring(file, _inside(plan.staging, file.name), report, stop)
        except ModelNotFoundError as error:
            with guard:
                do_without(spec, plan.available, file.name, error, plan.config_only)
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
    manifest.write(folder, read_records(folder) | {file.name: staged[file.name] for file in arrived})
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
