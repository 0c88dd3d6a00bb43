"""One URL to one file: resumed, verified, and under its final name only when it is whole."""

from __future__ import annotations

import email.utils
import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import requests

from flagai_altdiff.errors import DiskError, HubError, IntegrityError, printable
from flagai_altdiff.files import new_file, open_regular
from flagai_altdiff.hub.addresses import check_url, first_line, redact_url, without_secrets
from flagai_altdiff.hub.client import PIECE_BYTES, Reply, refusal, retry, send
from flagai_altdiff.hub.disk import FULL, Kept, check_space, free_bytes, on_disk
from flagai_altdiff.hub.partial import Identity, Partial, usable
from flagai_altdiff.hub.progress import Report
from flagai_altdiff.hub.threads import Stop
from flagai_altdiff.hub.wire import TransientError
from flagai_altdiff.model_files import most_bytes

logger = logging.getLogger(__name__)

PAGES = (".html", ".htm")
PAGE_BEGINNINGS = (b"<!doctype html", b"<html")
SETTLED_S = 60
"""How old a date of change must be to tell versions apart: clocks differ, and a file may change twice in a second."""
RESERVE_BYTES = 4 << 20
"""What a file of unknown size leaves free, so that the files beside it still find room."""


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
class _Job:
    url: str
    path: Path
    size_bytes: int | None
    sha256: str | None
    most_bytes: int
    headers: Mapping[str, str] = field(repr=False)
    report: Report
    stop: Stop


def download(
    url: str,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    most: int | None = None,
    headers: Mapping[str, str] | None = None,
    report: Report = lambda done, total: None,
    stop: Stop | None = None,
    kept: Kept | None = None,
) -> Received:
    """Fetch ``url`` into ``path``, going on from what an earlier call left in ``<path>.part``.

    Args:
        url: http or https.
        path: The file to make; replaced if it exists. Its folder is made.
        size_bytes: Announced size; 0 means that it is not known, as some mirrors write it.
        sha256: Hex digest, if known.
        most: Bytes that are believed at most; never more than the kind of file may have.
        headers: Further headers; credentials in them do not follow a redirect to another host.
        report: Called as the file grows.
        stop: Ends the transfer from another thread; what has arrived is kept.
        kept: The folder of ``path``, if it was looked at before.

    Returns:
        Size and hash of the file, computed as it arrived; a part from an earlier call is read again for it.

    Raises:
        HubError: The transfer failed for good; what has arrived is kept. Or a file whose size nobody announced before
            does not fit on the disk: who sends it is not believed, and nothing is kept.
        DiskError: The disk did.
        ModelNotFoundError: There is no such file.
        IntegrityError: What arrived is not what was announced.
        Stopped: ``stop`` was set.
    """
    check_url(url)
    size_bytes, sha256 = size_bytes or None, sha256.lower() if sha256 else None
    most = min(most_bytes(path.name), most or most_bytes(path.name))
    job = _Job(
        url=url, path=path, size_bytes=size_bytes, sha256=sha256, most_bytes=most,
        headers=headers or {}, report=report, stop=stop or Stop(),
    )  # fmt: skip
    _check_most(job, size_bytes)
    identity = Identity(url=without_secrets(url), size_bytes=size_bytes, sha256=sha256)
    partial = Partial(path, identity, kept or Kept(path.parent))
    partial.recall()
    received = retry(lambda: _attempt(job, partial), url, progress=lambda: partial.resumable_bytes, stop=job.stop)
    logger.info("%s: downloaded %d bytes from %s", printable(path.name, 120), received.size_bytes, redact_url(url))
    return received


def _check_most(job: _Job, size_bytes: int | None) -> None:
    """HubError if a server announces, or sends, more than the file may have."""
    if size_bytes is not None and size_bytes > job.most_bytes:
        raise HubError(
            f"{redact_url(job.url)}: {size_bytes:,} bytes for {printable(job.path.name, 120)}; "
            f"no such file has more than {job.most_bytes:,}."
        )


def copy(
    source: Path,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    report: Report = lambda done, total: None,
    stop: Stop | None = None,
    kept: Kept | None = None,
) -> Received:
    """Copy a file of this disk into ``path`` as :func:`download` fetches one; arguments, result and errors as there."""
    stop, digest, got, kept = stop or Stop(), hashlib.sha256(), 0, kept or Kept(path.parent)
    kept.check()
    with on_disk(path, size_bytes), new_file(path, replace=True) as unfinished, open(unfinished, "wb") as file:
        for piece in _pieces_of(source):
            stop.check()
            got += file.write(piece)
            digest.update(piece)
            report(got, size_bytes)
        if size_bytes not in (None, got) or sha256 not in (None, digest.hexdigest()):
            found = f"{got} bytes with SHA-256 {digest.hexdigest()}"
            raise IntegrityError(f"{source} is a truncated or corrupt file: {found}. Remove it.")
        kept.check()
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


def _attempt(job: _Job, partial: Partial) -> Received:
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
        try:
            if total is not None:
                check_space(job.path.parent, total - start)
            if not start:
                partial.begin(_validator(reply))
            partial.extend(_checked_pieces(job, reply, partial, total), total)
        except DiskError as error:
            if job.size_bytes is not None or error.errno not in FULL:
                raise
            raise _beyond_the_disk(job, partial, total) from error
    if total is not None and partial.size_bytes < total:
        raise TransientError(f"expected {total} bytes, the connection ended after {partial.size_bytes}")
    return _verified(job, partial, resumed=start > 0)


def _check_answer(job: _Job, reply: Reply, partial: Partial, have: int) -> tuple[int, int | None]:
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
    _check_most(job, total)
    return start, total


def _beyond_the_disk(job: _Job, partial: Partial, total: int | None) -> HubError:
    """The error for a file that nobody announced to be so large, and that the disk has no room for; it is removed."""
    free = free_bytes(job.path.parent)  # as it was when no more fitted, or nearly: others write too
    size = "without end or of unknown size" if total is None else f"of {total:,} bytes"
    came = partial.size_bytes
    partial.discard()
    return HubError(
        f"{redact_url(job.url)} sends a file {size}, which nobody had announced; after {came:,} bytes, {free:,} are "
        "free here. It was removed."
    )


def _range(reply: Reply) -> tuple[int, int]:
    """Beginning of the part that came, and size of the whole; (-1, 0) if they are not told."""
    match = re.fullmatch("bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", reply.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2])) if match else (-1, 0)


def _same_version(reply: Reply, partial: Partial) -> bool:
    """Whether a part is of the version that the partial file is of; where the hash is known, it will tell."""
    got, known = _validator(reply), partial.identity.validator
    return got == known or (partial.identity.sha256 is not None and None in (got, known))


def _checked_pieces(job: _Job, reply: Reply, partial: Partial, total: int | None) -> Iterator[bytes]:
    """The pieces of the body; raises at the first that cannot be the file's."""
    got, most = partial.size_bytes, job.most_bytes if total is None else total
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
        if job.size_bytes is None and total is None:
            check_space(job.path.parent, RESERVE_BYTES)
        yield piece
        job.report(got, total)


def _verified(job: _Job, partial: Partial, *, resumed: bool) -> Received:
    want, got, validator = job.sha256, partial.digest.hexdigest(), partial.identity.validator
    if want in (None, got):
        job.stop.check()
        partial.become(job.path)
        return Received(size_bytes=partial.size_bytes, sha256=got, validator=validator)
    again = partial.start_over("what was resumed does not have the announced SHA-256")
    if resumed:
        raise again
    raise IntegrityError(f"{redact_url(job.url)}: expected SHA-256 {want}, got {got}. The file was removed.")


def _validator(reply: Reply) -> str | None:
    """What tells this version from others: a strong ETag, or a date of change that is long past."""
    etag, changed = reply.headers.get("ETag", ""), reply.headers.get("Last-Modified", "")
    if re.fullmatch('"[^"]+"', etag):
        return usable(etag)
    try:
        age = email.utils.parsedate_to_datetime(reply.headers["Date"]) - email.utils.parsedate_to_datetime(changed)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        return None
    return usable(changed) if age.total_seconds() >= SETTLED_S else None


def _page(job: _Job, beginning: bytes) -> HubError:
    """The error for an answer that is a web page: a login, a proxy's excuse."""
    line = first_line(beginning[:512].decode("utf-8", "replace"))
    return HubError(f"{redact_url(job.url)}: a web page came instead of {job.path.name}: {line}")
