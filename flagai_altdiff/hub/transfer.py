"""One URL to one file: resumed, verified, and under its final name only when it is whole."""

from __future__ import annotations

import email.utils
import errno
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import requests

from flagai_altdiff.errors import DiskError, HubError, IntegrityError, printable
from flagai_altdiff.files import new_file, open_regular
from flagai_altdiff.hub.addresses import check_url, first_line, redact_url, without_secrets
from flagai_altdiff.hub.client import PIECE_BYTES, TRIES, Reply, refusal, retry, send
from flagai_altdiff.hub.disk import check_space, on_disk, open_no_link
from flagai_altdiff.hub.names import PART_SUFFIX, STATE_SUFFIX
from flagai_altdiff.hub.progress import Report
from flagai_altdiff.hub.threads import Stop
from flagai_altdiff.hub.wire import TransientError
from flagai_altdiff.model_files import most_bytes

logger = logging.getLogger(__name__)

PAGES = (".html", ".htm")
PAGE_BEGINNINGS = (b"<!doctype html", b"<html")
STATE_BYTES = 1 << 16
MOST_BEGINNINGS = 2 * TRIES
"""How often a file is begun anew in one call."""
MAX_VALIDATOR = 256
SETTLED_S = 60
"""How old a date of change must be to tell versions apart: clocks differ, and a file may change twice in a second."""


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a transfer brought.

    Args:
        size_bytes: Size of the file.
        sha256: Hex digest of its content.
        validator: What the server called this content: a strong ETag, or a date of change that is long past.
    """

    size_bytes: int
    sha256: str
    validator: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Identity:
    """Which content a partial file is the beginning of."""

    url: str
    size_bytes: int | None
    sha256: str | None
    validator: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Job:
    url: str
    path: Path
    size_bytes: int | None
    sha256: str | None
    headers: Mapping[str, str] = field(repr=False)
    report: Report
    stop: Stop


class _Partial:
    """``<path>.part``: what has arrived of a file, which file that is, and its SHA-256 so far.

    Args:
        path: The file to be.
        identity: What was asked for.
    """

    def __init__(self, path: Path, identity: _Identity) -> None:
        self.path = path.with_name(path.name + PART_SUFFIX)
        self._state = path.with_name(path.name + STATE_SUFFIX)
        self.identity, self.size_bytes, self.digest = identity, 0, hashlib.sha256()
        self._begun = 0

    @property
    def resumable_bytes(self) -> int:
        """How much of it the rest can be joined to: all if its version can be told, by hash or by validator, else
        none; a size tells nothing."""
        return self.size_bytes if self.identity.sha256 or self.identity.validator else 0

    def recall(self) -> None:
        """Take up what an earlier call left of the same file."""
        recorded = self._recorded()
        if recorded is None or replace(recorded, validator=None) != self.identity:
            return
        if recorded.validator != _usable(recorded.validator) or not (recorded.validator or recorded.sha256):
            return
        there = _size_of_own(self.path) or 0
        if recorded.size_bytes is not None and there > recorded.size_bytes:
            return
        if there == recorded.size_bytes and recorded.sha256 is None:
            there -= 1  # the last byte is asked for again, so that the server says whether this is still the version
        with on_disk(self.path):
            if there:
                with open(self.path, "r+b", opener=open_no_link) as file:
                    file.truncate(there)
                    self.digest = hashlib.file_digest(file, "sha256")
            self.identity, self.size_bytes = recorded, there

    def begin(self, validator: str | None) -> None:
        """Begin the file from its first byte; the version is on record before the first byte is there.

        Raises:
            HubError: It was begun too often already.
        """
        self.discard()
        self._begun += 1
        if self._begun > MOST_BEGINNINGS:
            raise HubError(
                f"{redact_url(self.identity.url)}: begun {MOST_BEGINNINGS} times; each time it broke off and came as "
                "another version next, so that what had come could not be used. Try another source."
            )
        self.identity = replace(self.identity, validator=validator)
        with on_disk(self.path):
            with new_file(self._state, replace=True) as new:
                new.write_text(json.dumps(asdict(self.identity)), encoding="utf-8")
            with open(self.path, "xb", opener=open_no_link):
                pass

    def extend(self, pieces: Iterator[bytes], total: int | None) -> None:
        """Write what comes to its end, up to where it breaks off."""
        with on_disk(self.path, total), open(self.path, "ab", opener=open_no_link) as file:
            if os.fstat(file.fileno()).st_size != self.size_bytes:
                raise self.start_over("another process writes the same file")
            for piece in pieces:
                file.write(piece)
                self.digest.update(piece)
                self.size_bytes += len(piece)
            file.flush()
            os.fsync(file.fileno())

    def start_over(self, reason: str) -> TransientError:
        """Remove it; the error to raise."""
        self.discard()
        return TransientError(f"{reason}; starting over")

    def discard(self) -> None:
        """Remove it with its record."""
        self.size_bytes, self.digest = 0, hashlib.sha256()
        for path in (self.path, self._state):
            with on_disk(path):
                _size_of_own(path)
                path.unlink(missing_ok=True)

    def become(self, path: Path) -> None:
        """Take the final name."""
        with on_disk(path):
            os.replace(self.path, path)
            self._state.unlink(missing_ok=True)

    def _recorded(self) -> _Identity | None:
        try:
            with open(self._state, "rb", opener=open_no_link) as file:
                return _Identity(**json.loads(file.read(STATE_BYTES)))
        except (OSError, ValueError, TypeError, RecursionError):
            return None


def _size_of_own(path: Path) -> int | None:
    """Size of a file that only we write, if it is there; DiskError if something else lies there."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return found.st_size
    code = errno.ELOOP if stat.S_ISLNK(found.st_mode) else errno.EEXIST
    raise DiskError(
        f"{path} is no ordinary file but a link, a folder or a device, not made by this program. Remove it.", code
    )


def download(
    url: str,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    report: Report = lambda done, total: None,
    stop: Stop | None = None,
) -> Received:
    """Fetch ``url`` into ``path``, going on from what an earlier call left in ``<path>.part``.

    Args:
        url: http or https.
        path: The file to make; replaced if it exists. Its folder is made.
        size_bytes: Announced size; 0 means that it is not known, as some mirrors write it.
        sha256: Hex digest, if known.
        headers: Further headers; credentials in them do not follow a redirect to another host.
        report: Called as the file grows.
        stop: Ends the transfer from another thread; what has arrived is kept.

    Returns:
        Size and hash of the file, computed as it arrived; a part from an earlier call is read again for it.

    Raises:
        HubError: The transfer failed for good; what has arrived is kept.
        DiskError: The disk did.
        ModelNotFoundError: There is no such file.
        IntegrityError: What arrived is not what was announced.
        Stopped: ``stop`` was set.
    """
    check_url(url)
    size_bytes, sha256 = size_bytes or None, sha256.lower() if sha256 else None
    _check_most(path.name, size_bytes, url)
    job = _Job(
        url=url, path=path, size_bytes=size_bytes, sha256=sha256,
        headers=headers or {}, report=report, stop=stop or Stop(),
    )  # fmt: skip
    partial = _Partial(path, _Identity(url=without_secrets(url), size_bytes=size_bytes, sha256=sha256))
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    partial.recall()
    received = retry(lambda: _attempt(job, partial), url, progress=lambda: partial.resumable_bytes, stop=job.stop)
    job.stop.check()
    partial.become(path)
    logger.info("%s: downloaded %d bytes from %s", printable(path.name, 120), received.size_bytes, redact_url(url))
    return received


def _check_most(name: str, size_bytes: int | None, url: str) -> None:
    """HubError if a server announces, or sends, more than a file of that name may have."""
    most = most_bytes(name)
    if size_bytes is not None and size_bytes > most:
        raise HubError(
            f"{redact_url(url)}: {size_bytes:,} bytes for {printable(name, 120)}; no such file has more than {most:,}."
        )


def copy(
    source: Path,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    report: Report = lambda done, total: None,
    stop: Stop | None = None,
) -> Received:
    """Copy a file of this disk into ``path`` as :func:`download` fetches one; arguments, result and errors as there."""
    stop, digest, got = stop or Stop(), hashlib.sha256(), 0
    with on_disk(path, size_bytes), new_file(path, replace=True) as unfinished, open(unfinished, "wb") as file:
        for piece in _pieces_of(source):
            stop.check()
            got += file.write(piece)
            digest.update(piece)
            report(got, size_bytes)
        if size_bytes not in (None, got) or sha256 not in (None, digest.hexdigest()):
            found = f"{got} bytes with SHA-256 {digest.hexdigest()}"
            raise IntegrityError(f"{source} is a truncated or corrupt file: {found}. Remove it.")
    return Received(size_bytes=got, sha256=digest.hexdigest())


def validator_of(url: str, headers: Mapping[str, str] | None = None) -> str | None:
    """What a server calls the content at ``url`` now, as in :class:`Received`; ``None`` if it does not tell.

    Raises:
        HubError: It cannot be asked, or has no such file.
    """
    asked = {**(headers or {}), "Range": "bytes=0-0"}  # signed addresses allow no HEAD

    def attempt() -> str | None:
        with send("GET", url, headers=asked) as reply:
            if reply.status not in (requests.codes.ok, requests.codes.partial_content):
                raise refusal(reply)
            return _validator(reply)

    return retry(attempt, url)


def _pieces_of(source: Path) -> Iterator[bytes]:
    """A file of this disk; HubError if it cannot be read, which another source would mend."""
    try:
        with open_regular(source) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise HubError(f"{source} cannot be read: {error.strerror}.") from error


def _attempt(job: _Job, partial: _Partial) -> Received:
    job.stop.check()
    have, validator = partial.resumable_bytes, partial.identity.validator
    if have and have == job.size_bytes:
        return _verified(job, partial, resumed=True)
    headers = dict(job.headers)
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with send("GET", job.url, headers=headers) as reply, job.stop.watching(reply):
        if have and reply.status == requests.codes.requested_range_not_satisfiable:
            if job.sha256 is None or reply.headers.get("Content-Range") != f"bytes */{have}":
                raise partial.start_over("the partial file does not fit the server's")
            return _verified(job, partial, resumed=True)
        start, total = _check_answer(job, reply, partial, have)
        if total is not None:
            check_space(job.path.parent, total - start)
        if not start:
            partial.begin(_validator(reply))
        partial.extend(_checked_pieces(job, reply, partial, total), total)
    if total is not None and partial.size_bytes < total:
        raise TransientError(f"expected {total} bytes, the connection ended after {partial.size_bytes}")
    return _verified(job, partial, resumed=start > 0)


def _check_answer(job: _Job, reply: Reply, partial: _Partial, have: int) -> tuple[int, int | None]:
    """Where the body begins and how long the file will be; raises if the answer is not (the rest of) the file."""
    where, size = redact_url(job.url), job.size_bytes
    if reply.status not in (requests.codes.ok, requests.codes.partial_content):
        raise refusal(reply)
    announced = reply.size()
    if reply.headers.get("Content-Type", "").startswith("text/html") and job.path.suffix not in PAGES:
        raise _page(job, next(reply.pieces(), b""))
    if reply.status == requests.codes.partial_content:
        start, total = _range(reply)  # type: tuple[int, int | None]
        if not have or start != have or size not in (None, total) or not _same_version(reply, partial):
            raise partial.start_over("another part of the file came than was asked for, or of another version")
    else:
        start, total = 0, size if announced is None else announced
        if size is not None and total != size:
            raise IntegrityError(f"{where}: expected {size} bytes, the server has {total}.")
        whole = "chunked" in reply.headers.get("Transfer-Encoding", "").lower()
        if total is None and job.sha256 is None and not whole:
            raise HubError(
                f"{where}: neither size nor hash of the file is known, so it cannot be told whether it is whole."
            )
    _check_most(job.path.name, total, job.url)
    return start, total


def _range(reply: Reply) -> tuple[int, int]:
    """Beginning of the part that came, and size of the whole; (-1, 0) if they are not told."""
    match = re.fullmatch("bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", reply.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (-1, 0)


def _same_version(reply: Reply, partial: _Partial) -> bool:
    """Whether a part is of the version that the partial file is of; where the hash is known, it will tell."""
    got, known = _validator(reply), partial.identity.validator
    return got == known or (partial.identity.sha256 is not None and None in (got, known))


def _checked_pieces(job: _Job, reply: Reply, partial: _Partial, total: int | None) -> Iterator[bytes]:
    """The pieces of the body; raises at the first that cannot be the file's."""
    got, most = partial.size_bytes, most_bytes(job.path.name) if total is None else total
    job.report(got, total)
    for piece in reply.pieces():
        job.stop.check()
        if got == 0 and piece[:512].lstrip().lower().startswith(PAGE_BEGINNINGS) and job.path.suffix not in PAGES:
            partial.discard()
            raise _page(job, piece)
        got += len(piece)
        if got > most:
            partial.discard()
            raise IntegrityError(
                f"{redact_url(job.url)}: expected {most} bytes at most, more came. The file was removed."
            )
        yield piece
        job.report(got, total)


def _verified(job: _Job, partial: _Partial, *, resumed: bool) -> Received:
    want, got, validator = job.sha256, partial.digest.hexdigest(), partial.identity.validator
    if want in (None, got):
        return Received(size_bytes=partial.size_bytes, sha256=got, validator=validator)
    again = partial.start_over("what was resumed does not have the announced SHA-256")
    if resumed:
        raise again
    raise IntegrityError(f"{redact_url(job.url)}: expected SHA-256 {want}, got {got}. The file was removed.")


def _validator(reply: Reply) -> str | None:
    """What tells this version from others: a strong ETag, or a date of change that is long past."""
    etag, changed = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified", "")
    if re.fullmatch('"[^"]+"', etag):
        return _usable(etag)
    try:
        age = email.utils.parsedate_to_datetime(reply.headers["Date"]) - email.utils.parsedate_to_datetime(changed)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
    return _usable(changed) if age.total_seconds() >= SETTLED_S else None


def _usable(validator: object) -> str | None:
    """A validator that can be sent back in a header."""
    return (
        validator
        if isinstance(validator, str) and re.fullmatch(f"[!-~][ -~]{{0,{MAX_VALIDATOR}}}", validator)
        else None
    )


def _page(job: _Job, beginning: bytes) -> HubError:
    """The error for an answer that is a web page: a login, a proxy's excuse."""
    line = first_line(beginning[:512].decode("utf-8", "replace"))
    return HubError(f"{redact_url(job.url)}: a web page came instead of {job.path.name}: {line}")
