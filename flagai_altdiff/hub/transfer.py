"""One URL to one file: resumed, verified, and under its final name only when it is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import requests

from flagai_altdiff.errors import HubError, IntegrityError
from flagai_altdiff.files import new_file, open_regular
from flagai_altdiff.hub.addresses import check_url, first_line, redact_url
from flagai_altdiff.hub.client import PIECE_BYTES, TransientError, read_number, read_pieces, refusal, retry, send
from flagai_altdiff.hub.disk import check_space, on_disk, open_no_link, read_small, size_of
from flagai_altdiff.hub.names import PART_SUFFIX, STATE_SUFFIX
from flagai_altdiff.hub.progress import Report
from flagai_altdiff.hub.threads import Stop

logger = logging.getLogger(__name__)

MAX_STATE_BYTES = 1 << 16
PAGES = (".html", ".htm")
PAGE_BEGINNINGS = (b"<!doctype html", b"<html")


@dataclass(frozen=True, kw_only=True)
class Received:
    """What a transfer brought.

    Args:
        size_bytes: Size of the file.
        sha256: Hex digest of its content.
        validator: What the server called this content: a strong ETag, or the date of change.
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
    identity: _Identity
    headers: Mapping[str, str] = field(repr=False)
    report: Report
    stop: Stop

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + PART_SUFFIX)

    @property
    def state(self) -> Path:
        return self.path.with_name(self.path.name + STATE_SUFFIX)

    @property
    def arrived_bytes(self) -> int:
        return size_of(self.part) or 0


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
    digest = sha256.lower() if sha256 else None
    identity = _Identity(url=redact_url(url), size_bytes=size_bytes or None, sha256=digest)
    job = _Job(url=url, path=path, identity=identity, headers=headers or {}, report=report, stop=stop or Stop())
    with on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    received = retry(lambda: _attempt(job), url, progress=lambda: job.arrived_bytes, stop=job.stop)
    job.stop.check()
    with on_disk(path):
        os.replace(job.part, path)
        job.state.unlink(missing_ok=True)
    logger.info("%s: downloaded %d bytes from %s", path.name, received.size_bytes, redact_url(url))
    return received


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
    asked = {**(headers or {}), "Accept-Encoding": "identity", "Range": "bytes=0-0"}  # signed addresses allow no HEAD

    def attempt() -> str | None:
        with send("GET", url, headers=asked) as response:
            if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
                raise refusal(response)
            return _validator(response)

    return retry(attempt, url)


def _pieces_of(source: Path) -> Iterator[bytes]:
    """A file of this disk; HubError if it cannot be read, which another source would mend."""
    try:
        with open_regular(source) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise HubError(f"{source} cannot be read: {error.strerror}.") from error


def _attempt(job: _Job) -> Received:
    job.stop.check()
    have, validator = _resume_point(job)
    if have and have == job.identity.size_bytes:
        return _verified(job, have, _hash_of(job, have), validator, resumed=True)
    headers = {**job.headers, "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with send("GET", job.url, headers=headers) as response, job.stop.watching(response):
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") != f"bytes */{have}":
                raise _start_over(job, "the partial file does not fit the server's")
            return _verified(job, have, _hash_of(job, have), validator, resumed=True)
        start, total = _check_answer(job, response, have, validator)
        return _receive(job, response, start, total, _validator(response) or (validator if start else None))


def _resume_point(job: _Job) -> tuple[int, str | None]:
    """How many bytes of the partial file can be trusted, and the validator to send with the request for the rest."""
    try:
        recorded = _Identity(**json.loads(read_small(job.state, MAX_STATE_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return 0, None
    if recorded.validator != _usable(recorded.validator) or replace(recorded, validator=None) != job.identity:
        return 0, None
    checkable = recorded.validator or recorded.sha256 or recorded.size_bytes
    return (job.arrived_bytes, recorded.validator) if checkable else (0, None)


def _check_answer(job: _Job, response: requests.Response, have: int, validator: str | None) -> tuple[int, int | None]:
    """Where the body begins and how long the file will be; raises if the answer is not (the rest of) the file."""
    where, size = redact_url(job.url), job.identity.size_bytes
    if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
        raise refusal(response)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"{where}: the server compresses the file although it was asked not to.")
    if response.headers.get("Content-Type", "").startswith("text/html") and job.path.suffix not in PAGES:
        raise _page(job, next(read_pieces(response), b""))
    if response.status_code == requests.codes.partial_content:
        match = re.fullmatch("bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})", response.headers.get("Content-Range", ""))
        start, total = map(int, match.groups()) if match else (-1, 0)
        changed = validator is not None and _validator(response) not in (None, validator)
        if not have or start != have or size not in (None, total) or changed:
            raise _start_over(job, "another part of the file came than was asked for")
        return start, total
    announced = read_number(response.headers, "Content-Length")
    announced = size if announced is None else announced
    if size is not None and announced != size:
        raise IntegrityError(f"{where}: expected {size} bytes, the server has {announced}.")
    if (
        announced is None
        and job.identity.sha256 is None
        and "chunked" not in response.headers.get("Transfer-Encoding", "")
    ):
        raise HubError(
            f"{where}: neither size nor hash of the file is known, so it cannot be told whether it is whole."
        )
    return 0, announced


def _receive(job: _Job, response: requests.Response, start: int, total: int | None, validator: str | None) -> Received:
    if total is not None:
        check_space(job.path.parent, total - start)
    got, digest = start, _hash_of(job, start)
    with on_disk(job.part, total), open(job.part, "ab" if start else "wb", opener=open_no_link) as file:
        with open(job.state, "w", encoding="utf-8", opener=open_no_link) as state:
            json.dump(asdict(replace(job.identity, validator=validator)), state)
        job.report(got, total)
        for piece in read_pieces(response):
            job.stop.check()
            if got == 0 and piece[:512].lstrip().lower().startswith(PAGE_BEGINNINGS) and job.path.suffix not in PAGES:
                raise _page(job, piece)
            got += len(piece)
            if total is not None and got > total:
                _start_over(job, "too long")
                raise IntegrityError(f"{redact_url(job.url)}: expected {total} bytes, more came. The file was removed.")
            file.write(piece)
            digest.update(piece)
            job.report(got, total)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and got < total:
        raise TransientError(f"expected {total} bytes, the connection ended after {got}")
    if job.arrived_bytes != got:
        raise _start_over(job, "another process writes the same file")
    return _verified(job, got, digest, validator, resumed=start > 0)


def _verified(job: _Job, size_bytes: int, digest: hashlib._Hash, validator: str | None, *, resumed: bool) -> Received:
    want, got = job.identity.sha256, digest.hexdigest()
    if want in (None, got):
        return Received(size_bytes=size_bytes, sha256=got, validator=validator)
    again = _start_over(job, "what was resumed does not have the announced SHA-256")
    if resumed:
        raise again
    raise IntegrityError(f"{redact_url(job.url)}: expected SHA-256 {want}, got {got}. The file was removed.")


def _start_over(job: _Job, reason: str) -> TransientError:
    """Remove the partial file; the error to raise."""
    with on_disk(job.part):
        job.part.unlink(missing_ok=True)
        job.state.unlink(missing_ok=True)
    return TransientError(f"{reason}; starting over")


def _hash_of(job: _Job, length: int) -> hashlib._Hash:
    """SHA-256 of the partial file, ``length`` bytes that an earlier attempt left."""
    if not length:
        return hashlib.sha256()
    with on_disk(job.part), open_regular(job.part) as file:
        return hashlib.file_digest(file, "sha256")


def _validator(response: requests.Response) -> str | None:
    """A strong ETag or the date of change; a weak ETag says nothing about bytes."""
    etag = response.headers.get("ETag", "")
    return _usable(etag if etag.startswith('"') else response.headers.get("Last-Modified"))


def _usable(validator: object) -> str | None:
    """A validator that can be sent back in a header."""
    return validator if isinstance(validator, str) and re.fullmatch("[!-~][ -~]*", validator) else None


def _page(job: _Job, beginning: bytes) -> HubError:
    """The error for an answer that is a web page: a login, a proxy's excuse."""
    line = first_line(beginning[:512].decode("utf-8", "replace"))
    return HubError(f"{redact_url(job.url)}: a web page came instead of {job.path.name}: {line}")
