"""A plan carried out: all files of one source, side by side, and into place when all are there; else the next."""

from __future__ import annotations

import functools
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath
from typing import TypeVar

from flagai_altdiff.errors import (
    DiskError,
    FilesInTheWayError,
    HubError,
    HubUnavailableError,
    IntegrityError,
    ModelNotFoundError,
    OfflineError,
    last_net,
    printable,
)
from flagai_altdiff.files import claim
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.disk import (
    Digests,
    Kept,
    Stamp,
    check_folder,
    check_space,
    on_disk,
    present_files,
    size_of,
    stamp_of,
)
from flagai_altdiff.hub.environment import BAAI_VARIABLE, HF_VARIABLE, MIRROR_VARIABLE, in_force, offline_switch
from flagai_altdiff.hub.journal import Journal
from flagai_altdiff.hub.lock import folder_lock
from flagai_altdiff.hub.manifest import FileRecord
from flagai_altdiff.hub.names import JOURNAL_NAME, MANIFEST_NAME, PART_SUFFIX, STAGING_PREFIX, STATE_SUFFIX, safe_name
from flagai_altdiff.hub.planning import Plan, PlannedFile, in_the_way, make_plan
from flagai_altdiff.hub.progress import Progress, Report, human
from flagai_altdiff.hub.remote import Location
from flagai_altdiff.hub.sources import CACHE, HUBS, Source, Wanted, find_sources
from flagai_altdiff.hub.threads import Stop, run_all
from flagai_altdiff.hub.transfer import Received, copy, download
from flagai_altdiff.model_files import DIFFUSERS_INDEX, FLAGAI_CONFIG, FLAGAI_WEIGHTS, is_weight
from flagai_altdiff.registry import ModelSpec

logger = logging.getLogger(__name__)

T = TypeVar("T")

MARKERS = (DIFFUSERS_INDEX, FLAGAI_CONFIG)
"""Files that say which layout a folder has; moved into place last, behind the weights."""
MAX_TEXT = 1000
"""Longest address or ETag that is recorded."""
_OWN = re.compile(
    rf"{re.escape(JOURNAL_NAME)}|.+({re.escape(PART_SUFFIX)}|{re.escape(STATE_SUFFIX)})"
    r"|\.[0-9a-f]{16}|\..+\.[0-9a-f]{16}\.tmp"
)
"""Names of the files that downloads keep in a staging folder besides what has arrived."""
_STAGING = re.compile(
    rf"{re.escape(STAGING_PREFIX)}({'|'.join(HUBS)}|{CACHE}|mirror-[0-9a-f]{{12}})(-[0-9a-f]{{12,16}})*"
)


def fetch(
    spec: ModelSpec, folder: Path, *, config_only: bool = False, source: str | None = None, revision: str | None = None
) -> Path:
    """Make the files of a model present in a folder.

    A folder that has them all is left alone and nothing is asked. Otherwise one process at a time tries the sources in
    their order: the mirror that the user named, Hugging Face's cache on this disk, the model's hubs. The files of one
    source arrive in ``folder/.incoming-<source>``, where an interrupted download goes on next time, and are moved into
    place when they are complete; size, hash and origin of each are recorded.

    A file that no fetch has brought, or that was changed since, is never replaced. Where it is not the source's, only a
    tokenizer is put beside it: no model of two versions is made. What an earlier fetch brought from another version
    gives way.

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
        FilesInTheWayError: Files of the user's would become part of another version; nothing came.
        DiskError: The local disk failed.
    """
    folder = Path(folder)
    wanted = Wanted(spec=spec, folder=folder, config_only=config_only)
    with last_net(folder, HubError):
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
    wanted = Wanted(spec=spec, folder=Path(folder), config_only=config_only)
    with last_net(folder, HubError):
        return _try_each(wanted, find_sources(wanted, source, revision), lambda made: made)


def _try_each(wanted: Wanted, sources: list[Source], act: Callable[[Plan], T]) -> T:
    attempts: dict[Source, HubError] = {}
    for source in sources:
        try:
            with last_net(source, HubError):
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
    if (folder / MANIFEST_NAME).is_dir():
        raise DiskError(f"{folder / MANIFEST_NAME} is a folder; the record of the files goes there. Move it away.")
    check_space(folder, plan.to_come_bytes)
    logger.info("%s: %d files to fetch from %s", printable(str(folder)), len(plan.to_come), plan.source.label)
    kept = Kept(folder)
    staging = kept.inner(plan.staging.name)
    journal = Journal(plan.staging, plan.wanted.digests, staging)
    _gather(plan, journal, staging)
    arrived = [file for file in plan.files if not file.is_there and size_of(plan.staging / file.name)]
    gives_way = plan.leftovers.keys() | {file.name for file in plan.files if file.replaces}
    if gone := plan.wanted.lacking((present_files(folder) - gives_way) | {file.name for file in arrived}):
        raise HubError(f"{plan.source.label} sent {', '.join(gone)} empty.")
    _check_unchanged(plan, arrived, journal)
    _put_in_place(plan, arrived, journal, staging)
    _warn_of_others(plan)
    kept.check()
    for leftover in folder.glob(f"{STAGING_PREFIX}*") if locked else (plan.staging,):
        if _STAGING.fullmatch(leftover.name):
            _tidy(leftover, {file.name for file in plan.files} if leftover == plan.staging else set())


def _warn_of_others(plan: Plan) -> None:
    """Say it if weights that appeared meanwhile are loaded instead of those that came."""
    known = {file.name for file in plan.files}
    first = next((name for name in FLAGAI_WEIGHTS if size_of(plan.wanted.folder / name)), None)
    if first not in known and (came := sorted(known & set(FLAGAI_WEIGHTS))):
        logger.warning(
            "%s: %s has appeared meanwhile, and is loaded instead of %s. Move away the one that is not meant.",
            printable(str(plan.wanted.folder)), first, came[0],
        )  # fmt: skip


def _gather(plan: Plan, journal: Journal, staging: Kept) -> None:
    """Bring what is to come into the staging folder, several files side by side."""
    stop, guard = Stop(), threading.Lock()

    def bring(file: PlannedFile) -> None:
        kept = staging.inner(safe_name(file.name).parent)
        try:
            with progress.file(file.name, file.size_bytes) as report:
                received = _bring(file, kept, plan.most_bytes, report, stop)
        except ModelNotFoundError as error:
            with guard:
                plan.do_without(file.name, error)
        except IntegrityError as error:
            raise _explained(error, plan, file) from error
        else:
            journal.add(file.name, received.sha256, received.validator)

    with Progress(plan.wanted.spec.name, sum(file.size_bytes or 0 for file in plan.to_come)) as progress:
        run_all([functools.partial(bring, file) for file in plan.to_come], stop)


def _tidy(staging: Path, ours: set[str]) -> None:
    """Remove a staging folder, but for files that no download has put there; no link is followed.

    Args:
        staging: The folder.
        ours: Names that were fetched into it, besides those in its journal.
    """
    if staging.is_symlink():
        return
    journal, strange = Journal(staging, Digests()), list[str]()
    for place, folders, files in os.walk(staging, topdown=False):
        for path in (Path(place, name) for name in (*files, *folders)):
            name = path.relative_to(staging).as_posix()
            is_ours = name in ours or journal.get(name) or _OWN.fullmatch(path.name) or not size_of(path)
            with suppress(OSError):  # a folder that is not empty
                if path.is_symlink():
                    path.unlink()
                elif path.is_dir():
                    path.rmdir()
                elif is_ours:
                    path.unlink()
                else:
                    strange.append(name)
    with suppress(OSError):
        staging.rmdir()
    if strange:
        names = ", ".join(printable(name, 120) for name in strange[:8])
        logger.warning("%s stays: no download has put %s there. Move away what you need.", staging, names)


def _apart(plan: Plan) -> Plan:
    """The same plan with a staging folder that no other process uses."""
    files = (replace(file, state="absent") if file.state == "arrived" else file for file in plan.files)
    return replace(plan, staging=Path(f"{plan.staging}-{secrets.token_hex(8)}"), files=tuple(files))


def _check_unchanged(plan: Plan, arrived: list[PlannedFile], journal: Journal) -> None:
    """HubError if what came first may be of another version than what came last, where no hash tells them apart.

    A source may have changed in the very second, so all are asked for again when the last has come; one alone needs no
    question, for there is nothing that it could be mixed with.
    """
    records = plan.wanted.inventory().records
    known = {file.name: (file, arrival.validator) for file in arrived if (arrival := journal.get(file.name))}
    for file in plan.files:
        record = records.get(file.name)
        if file.state == "present" and record and record.version == plan.version:
            known[file.name] = file, record.etag
    uncertain = [(file, validator) for file, validator in known.values() if not file.is_certain]
    for file, validator in uncertain if len(uncertain) > 1 else ():
        if file.unchanged(validator) is False:
            raise HubError(f"{file.name} has changed at its source while the others came. Try again.")


def _explained(error: IntegrityError, plan: Plan, file: PlannedFile) -> IntegrityError:
    if not file.is_bound:
        return error
    return IntegrityError(
        f"{error} {MANIFEST_NAME} has that SHA-256 from an earlier download. If {plan.source.label} has a new version "
        f"that you trust, move {plan.wanted.folder} away and try again: all of it will come."
    )


def _bring(file: PlannedFile, kept: Kept, most: int | None, report: Report, stop: Stop) -> Received:
    """One file into its place in the staging folder: copied where this disk has it, else downloaded."""
    size, sha256, target = file.size_bytes, file.sha256, kept.path / PurePath(file.name).name

    def get(location: Location) -> Received:
        location.check_way(sha256)
        return download(
            location.url, target, size_bytes=size, sha256=sha256, most=most,
            headers=location.headers, report=report, stop=stop, kept=kept,
        )  # fmt: skip

    if file.remote.copy is not None:
        try:
            source = file.remote.copy
            return copy(source, target, size_bytes=size, sha256=sha256, report=report, stop=stop, kept=kept)
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


def _put_in_place(plan: Plan, arrived: list[PlannedFile], journal: Journal, staging: Kept) -> None:
    """Give what has arrived its place; before that, what we brought from another version leaves it.

    Interrupted in between, the model lacks files, and the next attempt goes on.
    """
    folder, digests, stock = plan.wanted.folder, plan.wanted.digests, plan.wanted.inventory()
    records, coming = dict(stock.records), {file.name: file for file in arrived}
    aside = dict(plan.leftovers)
    for file in plan.files:
        record = records.get(file.name)
        is_new = file.name in coming and digests.of(folder / file.name) != digests.of(plan.staging / file.name)
        is_old = record and file.name not in coming and record.version != plan.version
        if file.replaces and (is_new or is_old):
            aside[file.name] = file.replaces
        if file.name in coming:
            records[file.name] = _record(plan, file, journal)
        elif file.state == "present" and record and record.version != plan.version and stock.is_ours(file.name):
            records[file.name] = replace(_record(plan, file, None), sha256=record.sha256)
    for name, stamp in aside.items():
        if not _set_aside(folder / name, stamp, staging):
            raise in_the_way(plan, [name])
        if name not in coming:
            del records[name]
    staging.check()
    manifest.write(folder, records)
    kept = Kept(folder)
    for name in sorted(coming, key=lambda name: (name in MARKERS, is_weight(name))):
        place = kept.inner(safe_name(name).parent)
        staging.inner(safe_name(name).parent)
        if not _place(plan.staging / name, place.path / PurePath(name).name, digests):
            raise in_the_way(plan, [name])


def _record(plan: Plan, file: PlannedFile, journal: Journal | None) -> FileRecord:
    path = (plan.staging if journal else plan.wanted.folder) / file.name
    arrival = journal.get(file.name) if journal else None
    etag = arrival.validator if arrival and (arrival.validator or "").startswith('"') else None
    url = redact_url(file.location.url)
    return FileRecord(
        name=file.name,
        size_bytes=size_of(path) or 0,
        sha256=plan.wanted.digests.of(path) or "",
        source=plan.source.label,
        url=url if len(url) <= MAX_TEXT else None,
        revision=file.remote.revision,
        etag=etag if etag and len(etag) <= MAX_TEXT else None,
    )


def _set_aside(path: Path, stamp: Stamp, staging: Kept) -> bool:
    """Move a file of ours out of its place; whether it was that file, and not one that came there meanwhile."""
    hidden = staging.path / f".{secrets.token_hex(8)}"
    staging.check()
    check_folder(path.parent)
    with on_disk(path):
        if not os.path.lexists(path):
            return True
        if os.path.islink(path) or stamp_of(path) != stamp:
            return False
        os.rename(path, hidden)
        if stamp_of(hidden) == stamp:
            return True
        if not os.path.lexists(path):
            os.rename(hidden, path)
        return False


def _place(staged: Path, target: Path, digests: Digests) -> bool:
    """Give a file its place, unless another is there by now; whether the content is there."""
    with on_disk(target):
        try:
            claim(staged, target)
        except FileExistsError:
            return digests.of(target) == digests.of(staged)
        return True


def _arrived_bytes(folder: Path) -> int:
    """Bytes that downloads into a folder have brought so far."""
    places = (staging for staging in folder.glob(f"{STAGING_PREFIX}*") if not staging.is_symlink())
    return sum(size_of(path) or 0 for staging in places for path in staging.rglob("*"))


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
    in_way = [error for error in attempts.values() if isinstance(error, FilesInTheWayError)]
    if in_way:
        return in_way[0] if len(in_way) == len(attempts) else FilesInTheWayError(text)
    if offline_switch():
        return OfflineError(text)
    if all(isinstance(error, ModelNotFoundError) for error in attempts.values()):
        return ModelNotFoundError(text)
    return HubUnavailableError(text)
