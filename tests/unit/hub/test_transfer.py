"""One URL to one file, against a real server with faults."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import pytest

from flagai_altdiff import model_files
from flagai_altdiff.errors import DiskError, HubError, IntegrityError, ModelNotFoundError
from flagai_altdiff.hub import client, environment, fetch
from flagai_altdiff.hub.transfer import download
from flagai_altdiff.registry import MODELS, FileSpec
from tests.cost import in_proportion
from tests.servers import Fault, HubServer, serve

DATA = bytes(i * i % 251 for i in range(300_000))
OTHER = DATA[::-1]
SHA256 = hashlib.sha256(DATA).hexdigest()
OLD = "Tue, 01 Jul 2025 00:00:00 GMT"
PATH = "/model.ckpt"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serve(files={PATH: DATA}) as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.ckpt"


def leave_partial(
    server: HubServer,
    target: Path,
    at: int = 200_000,
    *,
    headers: Mapping[str, str | None] | None = None,
    sha256: str | None = None,
) -> int:
    """Let a first call fail part-way, after an answer with other headers; the number of bytes that it left."""
    server.always[PATH] = Fault(status=503)
    server.faults[PATH] = [Fault(cut_at=at, headers=headers or {})]
    with pytest.raises(HubError):
        download(server.url + PATH, target, size_bytes=len(DATA), sha256=sha256)
    server.always.clear()
    server.requests.clear()
    return part_of(target).stat().st_size


def part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_file_arrives_whole_and_nothing_else_stays(server: HubServer, target: Path) -> None:
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256.upper())
    assert target.read_bytes() == DATA
    assert leftovers(target) == ["model.ckpt"]
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert server.ranges(PATH) == [None]


def test_an_existing_file_stays_until_the_new_one_is_whole(server: HubServer, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"old")
    leave_partial(server, target)
    assert target.read_bytes() == b"old"
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA


@pytest.mark.fault(2)
def test_a_cut_connection_is_resumed_within_the_call(server: HubServer, target: Path) -> None:
    server.faults[PATH] = [Fault(cut_at=150_000), Fault(cut_at=100_000)]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    first, *others = server.ranges(PATH)
    assert first is None and len(others) == 2 and all(others) and others[0] != others[1]


@pytest.mark.fault(2)
def test_a_reset_connection_is_resumed(server: HubServer, target: Path) -> None:
    server.faults[PATH] = [Fault(cut_at=150_000, reset=True)]
    received = download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA and received.sha256 == SHA256
    assert (server.ranges(PATH)[1] or "").startswith("bytes=")


@pytest.mark.fault(2)
def test_a_later_call_resumes_and_names_the_version(server: HubServer, target: Path) -> None:
    have = leave_partial(server, target)
    assert 0 < have < len(DATA) and not target.exists()
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=None)
    assert target.read_bytes() == DATA
    assert [request.headers.get("range") for request in server.requests] == [f"bytes={have}-"]
    assert server.requests[0].headers["if-range"].startswith('"')


@pytest.mark.fault(2)
def test_a_resumed_file_is_hashed_from_its_first_byte(server: HubServer, target: Path) -> None:
    server.faults[PATH] = [Fault(cut_at=200_000)]
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA
    assert len(server.requests) == 2


def test_progress_resets_the_count_of_failures(server: HubServer, target: Path) -> None:
    server.faults[PATH] = [f for at in (70_000, 140_000) for f in (Fault(cut_at=at), *[Fault(status=503)] * 4)]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert len(server.requests) == 11


@pytest.mark.fault(3)
def test_a_server_that_ignores_range_starts_the_file_over(server: HubServer, target: Path) -> None:
    leave_partial(server, target)
    server.always[PATH] = Fault(ignore_range=True)
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert len(server.requests) == 1


@pytest.mark.fault(1)
def test_a_server_that_ignores_range_and_always_cuts_ends(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(ignore_range=True, cut_at=150_000)
    with pytest.raises(HubError, match=r"model\.ckpt.*cut.*tried 5 times"):
        download(server.url + PATH, target, size_bytes=len(DATA))
    assert len(server.requests) <= 6
    assert not target.exists()


@pytest.mark.fault(6)
def test_a_changed_file_is_not_joined_to_an_old_partial(server: HubServer, target: Path) -> None:
    leave_partial(server, target)
    server.files[PATH] = OTHER
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == OTHER


@pytest.mark.fault(6)
def test_a_changed_file_behind_a_server_without_if_range_is_noticed(server: HubServer, target: Path) -> None:
    have = leave_partial(server, target)
    server.files[PATH] = OTHER
    tail = Fault(
        status=206, body=OTHER[have:], headers={"Content-Range": f"bytes {have}-{len(OTHER) - 1}/{len(OTHER)}"}
    )
    server.faults[PATH] = [tail]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == OTHER


@pytest.mark.fault(6)
@pytest.mark.parametrize("recorded", ["url", "size_bytes", "sha256"])
def test_a_partial_of_something_else_is_not_resumed(server: HubServer, target: Path, recorded: str) -> None:
    leave_partial(server, target)
    state = target.with_name("model.ckpt.part.json")
    values = json.loads(state.read_text())
    state.write_text(json.dumps(values | {recorded: "another"}))
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [None]


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"url": 1}', "\0", "[" * 100_000])
def test_an_unreadable_record_means_starting_over(server: HubServer, target: Path, state: str) -> None:
    leave_partial(server, target)
    target.with_name("model.ckpt.part.json").write_text(state)
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [None]


@pytest.mark.parametrize("validator", ["a\nb", "\u4e00", " a", 7])
def test_a_version_that_no_header_can_hold_means_starting_over(
    server: HubServer, target: Path, validator: object
) -> None:
    leave_partial(server, target)
    state = target.with_name("model.ckpt.part.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"validator": validator}))
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "content_range", ["bytes 5-299999/300000", "bytes 0-9/10", "bytes x", "", "bytes 196608-399999/400000"]
)
def test_a_wrong_content_range_discards_the_partial(server: HubServer, target: Path, content_range: str) -> None:
    leave_partial(server, target)
    server.faults[PATH] = [Fault(status=206, body=b"x" * 50, headers={"Content-Range": content_range})]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert server.ranges(PATH)[1] is None


def test_a_server_that_sends_less_than_asked_is_asked_again(server: HubServer, target: Path) -> None:
    have = leave_partial(server, target)
    piece = Fault(status=206, body=DATA[have:250_000], headers={"Content-Range": f"bytes {have}-249999/{len(DATA)}"})
    server.faults[PATH] = [piece]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [f"bytes={have}-", "bytes=250000-"]


def test_what_cannot_be_checked_is_not_resumed(server: HubServer, target: Path) -> None:
    server.faults[PATH] = [
        Fault(cut_at=200_000, headers={"ETag": None}),
        Fault(cut_at=200_000, headers={"ETag": 'W/"weak"'}),
    ]
    download(server.url + PATH, target)
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [None, None, None]


def test_a_complete_partial_of_a_known_hash_needs_no_request(server: HubServer, target: Path) -> None:
    leave_partial(server, target, sha256=SHA256)
    part_of(target).write_bytes(DATA)
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA
    assert server.requests == []


@pytest.mark.fault(6)
@pytest.mark.parametrize("now", [DATA, OTHER])
def test_a_complete_partial_without_a_hash_is_still_the_servers_version(
    server: HubServer, target: Path, now: bytes
) -> None:
    """The server could have another version by now, of the same size: it is asked for the last byte."""
    leave_partial(server, target)
    part_of(target).write_bytes(DATA)
    server.files[PATH] = now
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == now
    assert server.ranges(PATH) == [f"bytes={len(DATA) - 1}-"]


UNKNOWN_VERSIONS: dict[str, dict[str, str | None]] = {
    "none": {"ETag": None},
    "weak": {"ETag": 'W/"1"'},
    "empty": {"ETag": '""'},
    "not quoted": {"ETag": "1"},
    "two": {"ETag": '"1", "2"'},
    "too long": {"ETag": f'"{"x" * 5000}"'},
    "control characters": {"ETag": '"\x1b[31m"'},
    "just changed": {"ETag": None, "Date": "Tue, 01 Jul 2025 00:00:59 GMT", "Last-Modified": OLD},
    "changed in the future": {"ETag": None, "Date": OLD, "Last-Modified": "Tue, 01 Jul 2025 00:01:00 GMT"},
    "no clock": {"ETag": None, "Date": "today", "Last-Modified": OLD},
    "no date": {"ETag": None, "Last-Modified": "yesterday"},
    "no zone": {"ETag": None, "Last-Modified": "Tue, 01 Jul 2025 00:00:00 -0000"},
}


@pytest.mark.fault(133)
@pytest.mark.parametrize("headers", UNKNOWN_VERSIONS.values(), ids=list(UNKNOWN_VERSIONS))
def test_a_partial_of_an_unknown_version_is_joined_to_nothing(
    server: HubServer, target: Path, headers: dict[str, str | None]
) -> None:
    """Equal sizes tell nothing; neither in a later call nor in the same one."""
    assert leave_partial(server, target, headers=headers) > 0
    server.files[PATH] = OTHER
    server.always[PATH] = Fault(headers=headers)
    server.faults[PATH] = [Fault(cut_at=150_000, headers=headers)]

    def change(done: int, total: int | None) -> None:
        server.files[PATH] = DATA if done > 100_000 else server.files[PATH]

    download(server.url + PATH, target, size_bytes=len(DATA), report=change)
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [None, None]


@pytest.mark.fault(133)
@pytest.mark.parametrize("headers", UNKNOWN_VERSIONS.values(), ids=list(UNKNOWN_VERSIONS))
def test_a_known_hash_is_a_version(server: HubServer, target: Path, headers: dict[str, str | None]) -> None:
    have = leave_partial(server, target, headers=headers, sha256=SHA256)
    server.always[PATH] = Fault(headers=headers)
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [f"bytes={have}-"]


@pytest.mark.fault(133)
def test_a_date_of_change_that_is_long_past_is_a_version(server: HubServer, target: Path) -> None:
    headers = {"ETag": None, "Last-Modified": OLD}
    have = leave_partial(server, target, headers=headers)
    server.always[PATH] = Fault(headers=headers)
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert [(r.headers.get("range"), r.headers.get("if-range")) for r in server.requests] == [(f"bytes={have}-", OLD)]


@pytest.mark.fault(133)
def test_a_part_that_does_not_say_its_version_is_not_joined(server: HubServer, target: Path) -> None:
    have = leave_partial(server, target)
    tail = {"Content-Range": f"bytes {have}-{len(OTHER) - 1}/{len(OTHER)}", "ETag": None}
    server.files[PATH] = OTHER
    server.faults[PATH] = [Fault(status=206, body=OTHER[have:], headers=tail)]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == OTHER


@pytest.mark.fault(133)
def test_what_came_in_this_call_is_not_read_again(
    server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the server cuts; what an earlier call left is read once."""
    original, read = hashlib.file_digest, list[str]()

    def reading(file: BufferedReader, name: str) -> hashlib._Hash:
        read.append(file.name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", reading)
    server.faults[PATH] = [Fault(cut_at=20_000) for _ in range(5)]
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA and len(server.requests) > 5 and read == []
    leave_partial(server, target)
    server.faults[PATH] = [Fault(cut_at=20_000) for _ in range(3)]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA and len(server.requests) > 3 and len(read) == 1


@pytest.mark.fault(133)
def test_a_file_that_changes_without_end_is_given_up(server: HubServer, target: Path) -> None:
    """Each version comes a little further than the one before, so that there always is progress."""
    server.faults[PATH] = [
        Fault(cut_at=20_000 * k, headers={"ETag": f'"{k}"'}, ignore_range=True) for k in range(1, 40)
    ]
    server.files[PATH] = bytes(900_000)
    with pytest.raises(HubError, match="begun 10 times"):
        download(server.url + PATH, target)
    assert len(server.requests) <= 11


def plant(path: Path, kind: str, outside: Path) -> None:
    """Put something at a place where a download writes."""
    outside.write_bytes(b"mine")
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(outside)
        case "dangling link":
            path.symlink_to(outside.with_name("nothing"))
        case "second name":
            os.link(outside, path)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "sparse file":
            with open(path, "wb") as file:
                file.truncate(1 << 40)


@pytest.mark.fault(134)
@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder", "device", "sparse file"])
@pytest.mark.parametrize("suffix", [".part", ".part.json"])
@pytest.mark.parametrize("resumed", [True, False])
def test_what_lies_where_a_partial_is_kept(
    server: HubServer, target: Path, tmp_path: Path, kind: str, suffix: str, resumed: bool
) -> None:
    """It is never opened, waited for, read whole or written through: refused by name, or made way for."""
    target.parent.mkdir()
    if resumed:
        leave_partial(server, target)
    place, outside = target.with_name(target.name + suffix), tmp_path / "outside"
    plant(place, kind, outside)
    with in_proportion(1):
        try:
            download(server.url + PATH, target, size_bytes=len(DATA))
        except DiskError as error:
            message = str(error)
        else:
            message = ""
    assert outside.read_bytes() == b"mine" and not outside.with_name("nothing").exists()
    if kind == "sparse file":
        assert target.read_bytes() == DATA
    else:
        assert message.startswith(str(place)) and message.endswith("Remove it.") and not target.exists()


@pytest.mark.fault(135)
@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "sentencepiece.bpe.model", "model.ckpt"])
@pytest.mark.parametrize("how", ["known", "announced", "chunks", "sent"])
def test_a_file_is_no_larger_than_its_kind(
    server: HubServer, target: Path, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever says so: an error of the source, for another one may be asked."""
    monkeypatch.setattr(model_files, "MAX_WEIGHT_BYTES" if name == "model.ckpt" else "MAX_OTHER_BYTES", 100_000)
    faults = {
        "announced": Fault(headers={"Content-Length": str(1 << 59)}),
        "chunks": Fault(
            raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", endless=b"1000\r\n" + bytes(4098)
        ),
        "sent": Fault(raw=b"HTTP/1.1 200 OK\r\n\r\n", endless=bytes(5000)),
    }
    server.always[PATH] = faults.get(how, Fault())
    size, sha256 = 1 << 59 if how == "known" else None, SHA256 if how == "sent" else None
    with pytest.raises(HubError, match=f"{name}|100000 bytes at most") as caught:
        download(server.url + PATH, target.with_name(name), size_bytes=size, sha256=sha256)
    assert not isinstance(caught.value, DiskError)
    assert leftovers(target) == [] if target.parent.exists() else how == "known"


@pytest.mark.fault(5)
def test_a_complete_partial_of_unknown_size_is_accepted_on_416(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(status=503)
    server.faults[PATH] = [Fault(cut_at=200_000)]
    with pytest.raises(HubError):
        download(server.url + PATH, target, sha256=SHA256)
    server.always.clear()
    part_of(target).write_bytes(DATA)
    download(server.url + PATH, target, sha256=SHA256)
    assert target.read_bytes() == DATA
    assert server.ranges(PATH)[-1] == "bytes=300000-"


@pytest.mark.fault(5)
@pytest.mark.parametrize("size_bytes", [None, len(DATA)])
def test_a_partial_that_is_too_long_is_discarded(server: HubServer, target: Path, size_bytes: int | None) -> None:
    server.always[PATH] = Fault(status=503)
    server.faults[PATH] = [Fault(cut_at=200_000)]
    with pytest.raises(HubError):
        download(server.url + PATH, target, size_bytes=size_bytes)
    server.always.clear()
    part_of(target).write_bytes(DATA + b"tail")
    download(server.url + PATH, target, size_bytes=size_bytes)
    assert target.read_bytes() == DATA


@pytest.mark.fault(9)
def test_a_wrong_hash_removes_the_file(server: HubServer, target: Path) -> None:
    server.files[PATH] = OTHER
    with pytest.raises(IntegrityError, match=SHA256):
        download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert leftovers(target) == []


def test_a_damaged_partial_is_fetched_again_before_the_server_is_blamed(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(status=503)
    server.faults[PATH] = [Fault(cut_at=200_000)]
    with pytest.raises(HubError):
        download(server.url + PATH, target, sha256=SHA256)
    server.always.clear()
    part_of(target).write_bytes(b"x" * part_of(target).stat().st_size)
    download(server.url + PATH, target, sha256=SHA256)
    assert target.read_bytes() == DATA


def test_another_size_than_announced_is_refused(server: HubServer, target: Path) -> None:
    with pytest.raises(IntegrityError, match="expected 300001 bytes, the server has 300000"):
        download(server.url + PATH, target, size_bytes=len(DATA) + 1)
    assert not target.exists() and len(server.requests) == 1


def test_more_bytes_than_announced_are_refused(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(headers={"Content-Length": None})
    with pytest.raises(IntegrityError, match="more came"):
        download(server.url + PATH, target, size_bytes=1000)
    assert leftovers(target) == []


@pytest.mark.fault(1)
def test_fewer_bytes_than_announced_are_not_taken_for_the_file(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(headers={"Content-Length": None}, cut_at=1000, ignore_range=True)
    with pytest.raises(HubError, match="expected 300000 bytes, the connection ended after 1000"):
        download(server.url + PATH, target, size_bytes=len(DATA))
    assert not target.exists()


@pytest.mark.fault(7)
def test_without_size_and_hash_the_end_cannot_be_told(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(headers={"Content-Length": None})
    with pytest.raises(HubError, match="neither size nor hash"):
        download(server.url + PATH, target, size_bytes=0)
    download(server.url + PATH, target, size_bytes=0, sha256=SHA256)
    assert target.read_bytes() == DATA


@pytest.mark.fault(8)
def test_a_web_page_is_not_taken_for_weights(server: HubServer, target: Path) -> None:
    page = Fault(body=b"\n<html>Log in\x1b[31m</html>\nmore", headers={"Content-Type": "text/html; charset=utf-8"})
    server.always[PATH] = page
    with pytest.raises(HubError, match=r"a web page came instead of model\.ckpt: '<html>Log in\\x1b\[31m</html>'"):
        download(server.url + PATH, target)
    assert leftovers(target) == []


@pytest.mark.fault(8)
@pytest.mark.parametrize("page", [b"<!DOCTYPE html>\n<title>Sign in</title>", b"\n <HTML><p>proxy"])
def test_a_web_page_that_calls_itself_a_file_is_recognised(server: HubServer, target: Path, page: bytes) -> None:
    server.always[PATH] = Fault(body=page)
    with pytest.raises(HubError, match=r"a web page came instead of model\.ckpt"):
        download(server.url + PATH, target)
    assert not target.exists()


@pytest.mark.fault(22)
def test_compressed_files_are_refused(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(headers={"Content-Encoding": "gzip"})
    with pytest.raises(HubError, match="compresses"):
        download(server.url + PATH, target)


@pytest.mark.fault(12)
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_failures_are_tried_again(server: HubServer, target: Path, status: int) -> None:
    server.faults[PATH] = [Fault(status=status), Fault(status=status)]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert len(server.requests) == 3


def test_failures_that_stay_end(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(status=503)
    with pytest.raises(HubError, match=r"HTTP 503 \(tried 5 times\)"):
        download(server.url + PATH, target)
    assert len(server.requests) == 5


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (404, ModelNotFoundError, "no such"),
        (401, HubError, "HF_TOKEN"),
        (403, HubError, "refused"),
        (400, HubError, "400"),
    ],
)
def test_lasting_refusals_are_not_tried_again(
    server: HubServer, target: Path, status: int, kind: type[HubError], text: str
) -> None:
    server.always[PATH] = Fault(status=status, body=b"error text")
    with pytest.raises(HubError, match=text) as caught:
        download(server.url + PATH, target)
    assert type(caught.value) is kind
    assert len(server.requests) == 1 and leftovers(target) == []


class RetryAfter(NamedTuple):
    text: str
    waits_s: float


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    "header",
    [
        RetryAfter("0.2", 0.0),
        RetryAfter("30", 0.3),
        RetryAfter("Fri, 31 Dec 2999 23:59:59 GMT", 0.3),
        RetryAfter("9" * 5000, 0.3),
        RetryAfter("-5", 0.0),
        RetryAfter("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        RetryAfter("soon", 0.0),
    ],
    ids=lambda header: header.text[:10],
)
def test_retry_after_is_kept_within_bounds(
    server: HubServer, target: Path, header: RetryAfter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.3)
    server.faults[PATH] = [Fault(status=429, headers={"Retry-After": header.text})]
    began = time.monotonic()
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert header.waits_s <= time.monotonic() - began < header.waits_s + 5.0


@pytest.mark.fault(11)
def test_a_silent_server_is_given_up(server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "READ_TIMEOUT_S", 0.1)
    server.always[PATH] = Fault(stall_s=0.5)
    with pytest.raises(HubError, match="no data for"):
        download(server.url + PATH, target)
    assert len(server.requests) == 5


@pytest.mark.fault(11)
def test_a_slow_transfer_is_not_cut(server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "READ_TIMEOUT_S", 1.0)
    server.always[PATH] = Fault(pause_s=0.06)
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert len(server.requests) == 1


@pytest.mark.fault(11)
def test_a_body_that_stops_is_given_up(server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "READ_TIMEOUT_S", 0.1)
    server.always[PATH] = Fault(pause_s=0.5, ignore_range=True)
    with pytest.raises(HubError, match=r"no data for 0.1 s \(tried 5 times\)"):
        download(server.url + PATH, target)


def test_a_connection_lost_on_the_way_is_tried_longer(target: Path) -> None:
    with serve(files={PATH: DATA}) as server:
        leave_partial(server, target)
    with pytest.raises(HubError, match=r"Connection refused \(tried 5 times\)"):
        download(server.url + PATH, target, size_bytes=len(DATA))


@pytest.mark.fault(13)
def test_a_closed_port_is_tried_twice(target: Path) -> None:
    with pytest.raises(HubError, match=r"Connection refused \(tried 2 times\)"):
        download("http://127.0.0.1:9/model.ckpt", target)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://host/x", "//host/x", "http://", "http://[", "javascript:1", ""]
)
def test_only_http_is_fetched(url: str, target: Path) -> None:
    with pytest.raises(HubError, match="only http"):
        download(url, target)


@pytest.mark.fault(10)
def test_redirects_are_followed_without_the_token(server: HubServer, target: Path) -> None:
    with serve(files={"/cdn": DATA}) as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        server.always[PATH] = Fault(status=302, body=b"", headers={"Location": f"{elsewhere}/cdn?signature=secret"})
        download(server.url + PATH, target, size_bytes=len(DATA), headers={"Authorization": "Bearer hf_secret"})
        assert server.requests[0].headers["authorization"] == "Bearer hf_secret"
        assert "authorization" not in other.requests[0].headers
    assert target.read_bytes() == DATA


@pytest.mark.fault(10)
@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_to_other_schemes_are_refused(server: HubServer, target: Path, location: str) -> None:
    server.always[PATH] = Fault(status=302, body=b"", headers={"Location": location})
    with pytest.raises(HubError, match="only http"):
        download(server.url + PATH, target)


@pytest.mark.fault(10)
def test_a_redirect_loop_ends(server: HubServer, target: Path) -> None:
    server.always[PATH] = Fault(status=302, body=b"", headers={"Location": PATH})
    with pytest.raises(HubError, match="more than 10 redirects"):
        download(server.url + PATH, target)
    assert len(server.requests) == 11


@pytest.mark.fault(26)
def test_secrets_in_an_address_are_not_shown(server: HubServer, target: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flagai_altdiff")
    server.always[PATH] = Fault(status=503)
    url = server.url.replace("://", "://me:secret@") + PATH + "?signature=secret"
    with pytest.raises(HubError) as caught:
        download(url, target, headers={"Authorization": "Bearer secret"})
    assert "secret" not in str(caught.value) + caplog.text
    server.always.clear()
    server.faults[PATH] = [Fault(cut_at=200_000), *[Fault(status=503)] * 5]
    with pytest.raises(HubError):
        download(url, target, headers={"Authorization": "Bearer secret"})
    assert "secret" not in target.with_name("model.ckpt.part.json").read_text()


@pytest.mark.fault(15)
def test_too_little_space_is_said_before_the_first_byte(
    server: HubServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(HubError, match="needs 300,000 bytes, 1,000 are free") as caught:
        download(server.url + PATH, target, size_bytes=len(DATA))
    assert caught.value.errno == errno.ENOSPC
    assert leftovers(target) == []


@pytest.mark.fault(15)
def test_a_disk_that_fills_up_keeps_what_has_arrived(server: HubServer, target: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(HubError, match=r"Bytes needed: 300,000, free: [\d,]+\. What has arrived is kept") as caught:
            download(server.url + PATH, target, size_bytes=len(DATA))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    have = part_of(target).stat().st_size
    assert 0 < have <= 100_000
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA
    assert server.ranges(PATH) == [None, f"bytes={have}-"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.fault(15)
def test_a_disk_that_others_fill_up_keeps_what_has_arrived(server: HubServer, small_disk: Path) -> None:
    """A real ENOSPC: the space that was there at the start is taken while the file comes."""
    server.files[PATH] = bytes(900_000)
    server.always[PATH] = Fault(pause_s=0.01)
    hog = small_disk / "hog"

    def fill(done: int, total: int | None) -> None:
        if done > 200_000 and not hog.exists():
            hog.write_bytes(bytes(500_000))

    with pytest.raises(HubError, match=r"No space left on device\. Bytes needed: 900,000, free: 0\.") as caught:
        download(server.url + PATH, small_disk / "model.ckpt", report=fill)
    assert caught.value.errno == errno.ENOSPC
    assert not (small_disk / "model.ckpt").exists()
    hog.unlink()
    server.always.clear()
    download(server.url + PATH, small_disk / "model.ckpt")
    assert (small_disk / "model.ckpt").stat().st_size == 900_000
    assert (server.ranges(PATH)[1] or "").startswith("bytes=")


@pytest.mark.fault(16)
def test_a_read_only_folder_is_named_and_its_whole_files_are_used(server: HubServer, small_disk: Path) -> None:
    spec = replace(MODELS["AltDiffusion"], files=(FileSpec(name="config.yaml"),))
    (small_disk / "config.yaml").write_bytes(b"model: {}")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert fetch(spec, small_disk) == small_disk
    with pytest.raises(HubError, match=r"Read-only file system\. Choose a folder that can be written to") as caught:
        fetch(MODELS["AltDiffusion"], small_disk)
    assert caught.value.errno == errno.EROFS


@pytest.mark.fault(16)
def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HubError) as caught:
        download(server.url + PATH, tmp_path / "file" / "model.ckpt")
    assert caught.value.errno in (errno.EEXIST, errno.ENOTDIR)


@pytest.mark.fault(20)
def test_a_planted_link_is_not_written_through(server: HubServer, target: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    target.parent.mkdir()
    part_of(target).symlink_to(outside)
    with pytest.raises(HubError) as caught:
        download(server.url + PATH, target, size_bytes=len(DATA))
    assert caught.value.errno == errno.ELOOP
    assert outside.read_text() == "mine"


ODD = "\xff\x80\xe9 "
HEADERS = {
    "ETag": f'"{ODD}"',
    "Last-Modified": ODD,
    "Content-Type": ODD,
    "Retry-After": ODD,
    "X-Error-Code": ODD,
    "Link": f"<http://[::1>; rel=next, <{ODD}",
    "Server": ODD,
    ODD.strip(): ODD,
}


@pytest.mark.fault(106)
@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_no_text_are_not_believed(server: HubServer, target: Path, name: str) -> None:
    """Also not when a transfer goes on, where some of them are sent back."""
    odd = {name: HEADERS[name], **({"ETag": None} if name == "Last-Modified" else {})}
    server.faults[PATH] = [Fault(cut_at=150_000, headers=odd), Fault(status=503, headers=odd), Fault(headers=odd)]
    download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    assert target.read_bytes() == DATA
    server.always[PATH] = Fault(headers=odd)
    assert client.ask("HEAD", server.url + PATH).text == ""


LENGTHS = [
    "9" * 5000,
    "9" * 60_000,
    "-1",
    "-300000",
    "+300000",
    "\xb2",
    "1e5",
    "300000, 300000",
    "300000, 7",
    "300_000",
]
LENGTHS += ["0x5", "3000 00", "300000;", "", ",", "nan", "\x1b[31m", "300000"]


@pytest.mark.fault(106)
@pytest.mark.parametrize("lines", [1, 2])
@pytest.mark.parametrize("length", LENGTHS, ids=lambda length: length[:10])
def test_a_length_that_is_none_is_not_believed(server: HubServer, target: Path, length: str, lines: int) -> None:
    """Also not when there are two of them."""
    head = "HTTP/1.1 200 OK\r\n" + f"Content-Length: {length}\r\n" * lines + "\r\n"
    server.always[PATH] = Fault(raw=head.encode("latin-1") + DATA)
    try:
        download(server.url + PATH, target, size_bytes=len(DATA), sha256=SHA256)
    except HubError as error:
        message = str(error)
        assert length not in ("300000", "300000, 300000", "") and not target.exists()
        assert server.url in message and len(message) < 300 and message.isprintable()
    else:
        assert target.read_bytes() == DATA


@pytest.mark.fault(106)
@pytest.mark.parametrize(
    "content_range", ["bytes " + "9" * 5000 + "-9/9", "bytes 200000-299999/" + "9" * 5000, "bytes \xb2-\xb3/\xb9"]
)
def test_a_range_that_is_none_starts_over(server: HubServer, target: Path, content_range: str) -> None:
    leave_partial(server, target)
    server.faults[PATH] = [Fault(status=206, body=b"x", headers={"Content-Range": content_range})]
    download(server.url + PATH, target, size_bytes=len(DATA))
    assert target.read_bytes() == DATA


LOCATIONS = [
    "http://[::1",
    "\xff\xfe",
    "http://\xff\xfe/",
    "http://h:port/",
    "//",
    "http://" + "a" * 70,
    "http://h:99999/",
]
LOCATIONS += [
    "http://[fe80::1%25lo]:9/",
    "http://[::1%lo]:9/",
    "http:// /",
    "http://a b/",
    "http://127.0.0.1:9\t/x",
    "///",
]
LOCATIONS += [
    "http://u:p@127.0.0.1:9/",
    "http://127.0.0.1:0/",
    "http://.:9/",
    "http://a..b/",
    "?",
    "#",
    "",
    "http:",
    ":",
    "%",
]
LOCATIONS += [
    "\\\\127.0.0.1:9\\x",
    "http:\\\\h",
    "/" + "a" * 60_000,
    "http://127.0.0.1:9/" + "%zz" * 9_000,
    "\x1b[31m",
    "./../..",
]
LOCATIONS += [
    "http://127.0.0.1:9/\xe7\x8c\xab",
    "http://0x7f.1:9/",
    "http://127.0.0.1:9/, http://h/",
    "HTTP://127.0.0.1:9",
]


@pytest.mark.fault(106)
@pytest.mark.parametrize("location", LOCATIONS, ids=lambda location: ascii(location[:12]))
def test_a_redirect_to_no_address_is_refused(server: HubServer, target: Path, location: str) -> None:
    server.always[PATH] = Fault(status=302, body=b"", headers={"Location": location})
    with in_proportion(1), pytest.raises(HubError) as caught:
        download(server.url + PATH, target)
    message = str(caught.value)
    assert "http://" in message and message.isprintable() and len(message) < 600


ATTACKS = [
    "http://{b}\\@{a}/x",
    "http://{b}%5C@{a}/x",
    "http://{a}@{b}/x",
    "http://{b}#@{a}/x",
    "http://{b}?@{a}/x",
    "//{b}/x",
]
ATTACKS += [
    "http://{b};@{a}/x",
    "\\\\{b}/x",
    "/\\{b}/x",
    "http:\\\\{b}/x",
    "http://{a}\t@{b}/x",
    "http://{b}\\{a}/x",
    "http:{b}",
]


@pytest.mark.fault(26)
@pytest.mark.parametrize("location", ATTACKS)
def test_an_address_that_readers_understand_differently_gets_no_token(
    server: HubServer, target: Path, location: str
) -> None:
    """Neither that of another host, nor the password of the address."""
    with serve(files={"/x": DATA}) as other:
        a, b = server.url.removeprefix("http://"), other.url.removeprefix("http://")
        server.always[PATH] = Fault(status=302, body=b"", headers={"Location": location.format(a=a, b=b)})
        for start, headers in ((server.url, {"Authorization": "Bearer secret"}), (f"http://me:secret@{a}", {})):
            with suppress(HubError):
                download(start + PATH, target, headers=headers)
        assert not [request for request in other.requests if "authorization" in request.headers]
    assert all("authorization" in request.headers for request in server.requests if request.path == PATH)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    "text", ["Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "Mon, 99 Jan 99999"]
)
def test_a_date_beyond_the_calendar_is_no_date(server: HubServer, target: Path, text: str) -> None:
    server.faults[PATH] = [Fault(status=429, headers={"Retry-After": text})]
    download(server.url + PATH, target)
    assert target.read_bytes() == DATA
