"""What a fetch from one source will do: which files are there, which are to come, give way or stand in the way."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Literal

from flagai_altdiff.errors import FilesInTheWayError, HubError, ModelNotFoundError, printable
from flagai_altdiff.hub import manifest
from flagai_altdiff.hub.disk import Stamp, check_folder, git_oid, present_files, size_of, stamp_of
from flagai_altdiff.hub.inventory import Inventory
from flagai_altdiff.hub.journal import Journal
from flagai_altdiff.hub.names import PART_SUFFIX, STAGING_PREFIX, safe_names
from flagai_altdiff.hub.remote import Location, RemoteFile
from flagai_altdiff.hub.sources import Source, Wanted, tag
from flagai_altdiff.hub.transfer import validator_of
from flagai_altdiff.model_files import EQUIVALENTS, decides, is_fetched, is_tokenizer, is_weight, most_bytes

logger = logging.getLogger(__name__)

MAX_LISTED = 10_000
MAX_FILES = 2_000
"""Most files that a source may list, and most of them that can be a model's."""
MAX_TIMES_USUAL = 4
"""How much larger than the registry says a model may be."""
MOST_MOVED = 4
"""Most files of the user's that are moved one by one."""


FileState = Literal["present", "yours", "arrived", "cached", "absent"]


@dataclass(frozen=True, kw_only=True)
class PlannedFile:
    """One file of a model that a source offers.

    Args:
        name: Path inside the model's folder, checked.
        remote: The hub's entry.
        location: Where it can be downloaded now.
        size_bytes: Size, if the registry or the source knows it.
        sha256: Hex digest, if the registry or the source knows it, or an earlier download from there recorded it.
        is_bound: Whether only an earlier download tells the digest.
        state: Whether it is in the folder, came in an earlier attempt, lies in another program's cache, or none; or the
            user has another file of that name there, which stays.
        replaces: What we brought earlier and is replaced by it.
    """

    name: str
    remote: RemoteFile = field(repr=False)
    location: Location = field(repr=False)
    size_bytes: int | None
    sha256: str | None
    is_bound: bool = False
    state: FileState
    replaces: Stamp | None = field(default=None, repr=False)

    @property
    def is_there(self) -> bool:
        """Whether nothing is to come, because a file of that name is there and stays."""
        return self.state in ("present", "yours")

    @property
    def is_certain(self) -> bool:
        """Whether hash or commit tell its version, so that nobody need be asked."""
        return (self.sha256 is not None and not self.is_bound) or manifest.is_commit(self.remote.revision)

    def unchanged(self, validator: str | None) -> bool | None:
        """Whether the source still has the content that it gave this validator; ``None`` if that cannot be told."""
        if validator is None:
            return None
        for is_renewed in (False, True):  # an address may be valid for a while only
            try:
                location = self.remote.locate() if is_renewed else self.location
                location.check_way(self.sha256)
                now = validator_of(location.url, location.headers)
            except HubError:
                continue
            return None if now is None else now == validator
        return None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a fetch will do.

    Args:
        wanted: The model.
        source: Where from.
        staging: Folder where the files are gathered.
        files: All files of the model, the small ones first.
        available: Names of the files that the model's folder will have.
        revision: Version that the files are of, if the hub has versions.
        leftovers: What we brought earlier from another version, and this one does not have.
    """

    wanted: Wanted
    source: Source
    staging: Path
    files: tuple[PlannedFile, ...] = ()
    available: set[str] = field(repr=False)
    revision: str | None = None
    leftovers: Mapping[str, Stamp] = field(default_factory=dict, repr=False)

    @property
    def version(self) -> str:
        """The version that its files are of, as records name it."""
        return manifest.version(self.source.label, self.revision)

    @property
    def most_bytes(self) -> int | None:
        """What all files, and so each, are believed to have at most, if the registry tells."""
        return self.wanted.spec.size_bytes * MAX_TIMES_USUAL or None

    def is_left_out(self, name: str) -> bool:
        """Whether nothing is done about a file, because only the config is wanted."""
        return self.wanted.config_only and is_weight(name)

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


def make_plan(wanted: Wanted, source: Source) -> Plan:
    """What is to come from one source.

    Raises:
        ModelNotFoundError: It does not have the whole model.
        FilesInTheWayError: Files of the user's would become part of another version than theirs.
        HubError: It cannot be asked, or what it says is refused.
        DiskError: What is there cannot be read.
    """
    listed = _listed(source)
    files = sorted(_asked_for(wanted, listed), key=lambda file: is_weight(file.name))
    revision, available = (
        next((f.revision for f in files), None),
        present_files(wanted.folder) | {f.name for f in files},
    )
    staging = wanted.folder / f"{STAGING_PREFIX}{source.label}{f'-{tag(revision)}' if revision else ''}"
    plan = Plan(wanted=wanted, source=source, revision=revision, staging=staging, available=available)
    if gone := wanted.lacking(available):
        raise ModelNotFoundError(f"{source.label} lists {source.name}, but without {', '.join(gone)}.")
    check_folder(staging)
    stock, journal = wanted.inventory(), Journal(staging, wanted.digests)
    planned = list[PlannedFile]()
    for file in files:
        try:
            location = file.locate()
        except ModelNotFoundError as error:
            plan.do_without(file.name, error)
        else:
            planned.append(_plan_file(plan, stock, journal, file, location))
    return _checked(replace(plan, files=tuple(planned)), stock, {file.name: file for file in listed})


def _listed(source: Source) -> list[RemoteFile]:
    """What a source lists, but for what no model has: the names are refused as a whole, or safe."""
    listed = source.hub.list_files(source.name, source.revision)
    if len(listed) > MAX_LISTED:
        raise HubError(f"{source.label} lists {len(listed):,} files; a model has at most {MAX_FILES:,}.")
    safe_names(file.name for file in listed)
    taken = [file for file in listed if is_fetched(file.name)]
    if len(taken) > MAX_FILES:
        raise HubError(f"{source.label} lists {len(taken):,} files of a model, which has at most {MAX_FILES:,}.")
    if strange := [file.name for file in listed if not is_fetched(file.name)]:
        names = ", ".join(printable(name, 60) for name in strange[:5])
        logger.info("%s: passed over %d files that are no part of a model: %s", source.label, len(strange), names)
    return taken


def _plan_file(plan: Plan, stock: Inventory, journal: Journal, file: RemoteFile, location: Location) -> PlannedFile:
    known = next((known for known in plan.wanted.spec.files if known.name == file.name), None)
    record = stock.records.get(file.name)
    bound = record.sha256 if record and record.version == plan.version and stock.binds(plan.version) else None
    announced = (known.sha256 if known else None) or file.sha256
    planned = PlannedFile(
        name=file.name,
        remote=file,
        location=location,
        size_bytes=(known.size_bytes if known else None) or file.size_bytes or location.size_bytes or None,
        sha256=announced or bound,
        is_bound=not announced and bound is not None,
        state="cached" if file.copy else "absent",
    )
    standing = stock.standing(file.name, planned.size_bytes, planned.sha256)
    if standing == "same" and record and not planned.is_certain and not _is_current(planned, record.etag):
        standing = "ours"
    if standing == "alike" and file.git_oid and git_oid(stock.folder / file.name) != file.git_oid:
        standing = "other"
    if standing in ("same", "alike"):
        return replace(planned, state="present")
    if standing == "other":
        return replace(planned, state="yours")
    if _has_arrived(plan, journal, planned):
        planned = replace(planned, state="arrived")
    return replace(planned, replaces=stamp_of(stock.folder / file.name) if standing == "ours" else None)


def _is_current(file: PlannedFile, validator: str | None) -> bool:
    """Whether a file that we once brought is the source's still. Large ones are believed where it tells nothing."""
    still = file.unchanged(validator)
    return is_weight(file.name) if still is None else still


def _has_arrived(plan: Plan, journal: Journal, file: PlannedFile) -> bool:
    """Whether a file lies in the staging folder and is surely of the version that the source has now."""
    path, arrival = plan.staging / file.name, journal.get(file.name)
    if not size_of(path) or file.size_bytes not in (None, size_of(path)):
        return False
    if file.sha256 not in (None, plan.wanted.digests.of(path) if file.sha256 else None):
        return False
    return file.is_certain or (arrival is not None and file.unchanged(arrival.validator) is True)


def _checked(plan: Plan, stock: Inventory, listed: Mapping[str, RemoteFile]) -> Plan:
    """A plan that fits what is there: no size beyond belief, no way through links, nothing mixed.

    Raises:
        FilesInTheWayError: A stray that stays, and more than a tokenizer is to come.
        ModelNotFoundError: The model would not be whole without a stray.
        HubError: A size beyond belief, or a link on the way.
    """
    _check_sizes(plan)
    strays = _strays(plan, stock, listed)
    if stay := [name for name, is_ours in strays.items() if not is_ours or plan.is_left_out(name)]:
        plan = _tokenizer_only(plan, stay)
    else:
        plan.available.difference_update(strays)
        if gone := plan.wanted.lacking(plan.available):
            raise ModelNotFoundError(f"{plan.source.label} lists {plan.source.name}, but without {', '.join(gone)}.")
        plan = replace(plan, leftovers={name: stamp for name in strays if (stamp := stamp_of(stock.folder / name))})
    for file in plan.files:
        if not file.is_there:
            for parent in PurePath(file.name).parents[:-1]:
                check_folder(stock.folder / parent)
    return plan


def _strays(plan: Plan, stock: Inventory, listed: Mapping[str, RemoteFile]) -> dict[str, bool]:
    """Files that would take part in the model and are of another version than the source's; whether we brought them."""
    roles, planned = [file.name for file in plan.wanted.spec.files], {file.name for file in plan.files}
    yours = [file.name for file in plan.files if file.state == "yours"]
    strays = {name: False for name in yours if "/" in name or decides(name, roles)}
    for name in sorted(present_files(stock.folder) - planned):
        file, is_ours = listed.get(name), stock.is_ours(name)
        is_version = is_ours and stock.records[name].version == plan.version
        if not decides(name, roles):
            is_stray = is_ours and not is_version and not plan.is_left_out(name)
        elif file is None:
            is_stray = is_ours or not is_tokenizer(name) or any(map(is_tokenizer, planned))
        else:
            standing = stock.standing(name, file.size_bytes or None, file.sha256)
            is_stray = standing == "other" or (standing == "ours" and not (is_version and file.sha256 is None))
        if is_stray:
            strays[name] = is_ours
    return strays


def _tokenizer_only(plan: Plan, strays: list[str]) -> Plan:
    """The plan beside strays that stay: to a model that lacks its tokenizer, a tokenizer may come, and nothing else."""
    lacking = plan.wanted.missing()
    come = [file for file in plan.files if not file.is_there and is_tokenizer(file.name)] if lacking else []
    names = present_files(plan.wanted.folder) | {file.name for file in come}
    if plan.wanted.lacking(names) or not all(map(is_tokenizer, lacking)):
        raise in_the_way(plan, strays)
    logger.info("%s: %s stay, so that only the tokenizer comes", printable(str(plan.wanted.folder)), ", ".join(strays))
    return replace(plan, files=(*(file for file in plan.files if file.is_there), *come))


def _check_sizes(plan: Plan) -> None:
    """HubError where a source announces what no model has; that says nothing about this disk."""
    for file in plan.files:
        if (file.size_bytes or 0) > most_bytes(file.name):
            text = f"{plan.source.label} announces {file.size_bytes:,} bytes for {file.name}"
            raise HubError(f"{text}, which has at most {most_bytes(file.name):,}; not believed.")
    total = sum(file.size_bytes or 0 for file in plan.files)
    if plan.most_bytes and total > plan.most_bytes:
        usual = plan.wanted.spec.size_bytes
        raise HubError(f"{plan.source.label} announces {total:,} bytes; the model has about {usual:,}. Not believed.")


def in_the_way(plan: Plan, names: list[str]) -> FilesInTheWayError:
    """The error for files of the user's that stand where a source's would go, or would be mixed with them."""
    folder, spec = plan.wanted.folder, plan.wanted.spec
    shown = ", ".join(printable(name, 120) for name in names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
    return FilesInTheWayError(
        f"{folder} has files of yours, or of another version, that are not those of {plan.source.label}: {shown}. "
        f"They stay, and nothing of another version is put beside them. To have {spec.name} fetched whole, "
        f"move them away ({_way_out(folder, names)}), or fetch into another folder "
        f"(altdiff download {spec.name} --model-dir OTHER)."
    )


def _way_out(folder: Path, names: list[str]) -> str:
    """The command that moves files out of a folder, under a name that is free: a few, or the folder as it is."""
    place = os.path.abspath(folder)
    numbered = (f"{place}.mine{number}" for number in ("", *range(2, MAX_FILES)))
    aside = shlex.quote(next(path for path in numbered if not os.path.lexists(path)))
    if len(names) > MOST_MOVED or any("/" in name for name in names):  # one name may be in several subfolders
        return f"mv {shlex.quote(place)} {aside}"
    return f"mkdir {aside} && mv {' '.join(shlex.quote(os.path.join(place, name)) for name in names)} {aside}"


def _asked_for(wanted: Wanted, listed: list[RemoteFile]) -> Iterator[RemoteFile]:
    """All but needless weights: any if only the config is wanted, else those that are no part."""
    names = {file.name for file in listed}
    own = {file.name if file.name in names else EQUIVALENTS.get(file.name) for file in wanted.spec.files}
    for file in listed:
        needed = not wanted.config_only and ("/" in file.name or file.name in own)
        if needed or not is_weight(file.name):
            yield file
