"""One URL to one file: resumed, verified, and under its final name only when it is whole."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import requests
from tqdm import tqdm

from flagai_altdiff.errors import HubError, IntegrityError
from flagai_altdiff.hub.client import TransientError, check_scheme, first_line, refusal, retry, send, shown, translated
from flagai_altdiff.hub.names import PART_SUFFIX, STATE_SUFFIX

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 16


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

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + PART_SUFFIX)

    @property
    def state(self) -> Path:
        return self.path.with_name(self.path.name + STATE_SUFFIX)


def download(
    url: str,
    path: Path,
    *,
    size_bytes: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Fetch ``url`` into ``path``, going on from what an earlier call left in ``<path>.part``.

    Args:
        url: http or https.
        path: The file to make; replaced if it exists. Its folder is made.
        size_bytes: Announced size; 0 means that it is not known, as some mirrors write it.
        sha256: Hex digest, if known.
        headers: Further headers; credentials in them do not follow a redirect to another host.

    Raises:
        HubError: The transfer failed for good, or (with ``errno`` set) the disk did; what has arrived is kept.
        ModelNotFoundError: There is no such file.
        IntegrityError: What arrived is not what was announced.
    """
    check_scheme(url)
    digest = sha256.lower() if sha256 else None
    identity = _Identity(url=shown(url), size_bytes=size_bytes or None, sha256=digest)
    job = _Job(url=url, path=path, identity=identity, headers=headers or {})
    with _on_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    retry(lambda: _attempt(job), url, progress=lambda: _size(job.part))
    with _on_disk(path):
        os.replace(job.part, path)
        job.state.unlink(missing_ok=True)
    logger.info("%s: downloaded %d bytes from %s", path.name, _size(path), shown(url))


def check_space(folder: Path, needed_bytes: int) -> None:
    """HubError with ``errno`` ENOSPC if the disk of ``folder`` (or of its nearest existing parent) has less free."""
    existing = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path.cwd())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise HubError(errno.ENOSPC, f"{folder}: needs {needed_bytes:,} bytes, {free:,} are free. Make room and try again.")


def _attempt(job: _Job) -> None:
    have, validator = _resume_point(job)
    if have and have == job.identity.size_bytes:
        _verify(job, _hash_of(job, have), resumed=True)
        return
    headers = {**job.headers, "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": validator} if validator else {})
    with send("GET", job.url, headers=headers) as response:
        if have and response.status_code == requests.codes.requested_range_not_satisfiable:
            if response.headers.get("Content-Range") != f"bytes */{have}":
                raise _start_over(job, "the partial file does not fit the server's")
            _verify(job, _hash_of(job, have), resumed=True)
        else:
            start, total = _check_answer(job, response, have, validator)
            _receive(job, response, start, total, _validator(response) or (validator if start else None))


def _resume_point(job: _Job) -> tuple[int, str | None]:
    """How many bytes of the partial file can be trusted, and the validator to send with the request for the rest."""
    try:
        recorded = _Identity(**json.loads(job.state.read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return 0, None
    if not isinstance(recorded.validator, str | None) or replace(recorded, validator=None) != job.identity:
        return 0, None
    checkable = recorded.validator or recorded.sha256 or recorded.size_bytes
    return (_size(job.part), recorded.validator) if checkable else (0, None)


def _check_answer(job: _Job, response: requests.Response, have: int, validator: str | None) -> tuple[int, int | None]:
    """Where the body begins and how long the file will be; raises if the answer is not (the rest of) the file."""
    where, size = shown(job.url), job.identity.size_bytes
    if response.status_code not in (requests.codes.ok, requests.codes.partial_content):
        raise refusal(response)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"{where}: the server compresses the file although it was asked not to.")
    kind = response.headers.get("Content-Type", "")
    if kind.startswith("text/html") and job.path.suffix not in (".html", ".htm"):
        raise HubError(f"{where}: a web page came instead of {job.path.name}: {_first_line(response)}")
    if response.status_code == requests.codes.partial_content:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        start, total = map(int, match.groups()) if match else (-1, 0)
        changed = validator is not None and _validator(response) not in (None, validator)
        if not have or start != have or size not in (None, total) or changed:
            raise _start_over(job, "another part of the file came than was asked for")
        return start, total
    length = response.headers.get("Content-Length", "")
    announced = int(length) if length.isdecimal() else size
    if size is not None and announced != size:
        raise IntegrityError(f"{where}: expected {size} bytes, the server has {announced}.")
    if announced is None and job.identity.sha256 is None and "chunked" not in response.headers.get("Transfer-Encoding", ""):
        raise HubError(f"{where}: neither size nor hash of the file is known, so it cannot be told whether it is whole.")
    return 0, announced


def _receive(job: _Job, response: requests.Response, start: int, total: int | None, validator: str | None) -> None:
    if total is not None:
        check_space(job.path.parent, total - start)
    identity = replace(job.identity, validator=validator)
    got, digest = start, _hash_of(job, start)
    bar = tqdm(
        total=total, initial=start, unit="B", unit_scale=True, desc=job.path.name, disable=not sys.stderr.isatty(), leave=False
    )
    with _on_disk(job.part, total), bar, open(job.part, "ab" if start else "wb", opener=_open_no_link) as file:
        with open(job.state, "w", encoding="utf-8", opener=_open_no_link) as state:
            json.dump(asdict(identity), state)
        with translated(job.url):
            for chunk in response.iter_content(CHUNK_BYTES):
                got += len(chunk)
                if total is not None and got > total:
                    _start_over(job, "too long")
                    raise IntegrityError(f"{shown(job.url)}: expected {total} bytes, more came. The file was removed.")
                with _on_disk(job.part, total):
                    file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and got < total:
        raise TransientError(f"expected {total} bytes, the connection ended after {got}")
    if _size(job.part) != got:
        raise _start_over(job, "another process writes the same file")
    _verify(job, digest, resumed=start > 0)


def _verify(job: _Job, digest: hashlib._Hash, *, resumed: bool) -> None:
    want, got = job.identity.sha256, digest.hexdigest()
    if want is None or want == got:
        return
    again = _start_over(job, "what was resumed does not have the announced SHA-256")
    if resumed:
        raise again
    raise IntegrityError(f"{shown(job.url)}: expected SHA-256 {want}, got {got}. The file was removed.")


def _start_over(job: _Job, reason: str) -> TransientError:
    """Remove the partial file; the error to raise."""
    with _on_disk(job.part):
        job.part.unlink(missing_ok=True)
        job.state.unlink(missing_ok=True)
    return TransientError(f"{reason}; starting over")


def _hash_of(job: _Job, length: int) -> hashlib._Hash:
    """SHA-256 of the first ``length`` bytes of the partial file (of nothing if no hash is asked for)."""
    digest = hashlib.sha256()
    if length and job.identity.sha256:
        with _on_disk(job.part), open(job.part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest


def _validator(response: requests.Response) -> str | None:
    """A strong ETag or the date of change; a weak ETag says nothing about bytes."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _first_line(response: requests.Response) -> str:
    with translated(response.url):
        return first_line(next(response.iter_content(512), b"").decode("utf-8", "replace"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _open_no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


@contextmanager
def _on_disk(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an error of the local disk into a HubError whose ``errno`` is set: another source would not help."""
    try:
        yield
    except (HubError, requests.exceptions.RequestException):
        raise
    except OSError as error:
        text = f"{path}: {error.strerror}."
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            needed = "unknown" if needed_bytes is None else f"{needed_bytes:,}"
            text += f" Bytes needed: {needed}, free: {shutil.disk_usage(path.parent).free:,}."
            text += " What has arrived is kept: make room and try again."
        raise HubError(error.errno, text) from error
