"""What a server may cost before it gives something of use, against servers that give nothing."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import client, environment
from flagai_altdiff.hub.client import ask
from flagai_altdiff.hub.transfer import download
from tests.cost import in_proportion
from tests.servers import Fault, HubServer, serve

PATH = "/model.ckpt"
TARGET = "/target"
BLOCK = bytes(1 << 16)
BOMB = gzip.compress(bytes(200 << 20), 1)


@pytest.fixture
def server() -> Iterator[HubServer]:
    with serve(files={PATH: b"[]", TARGET: b"[]"}) as running:
        yield running


@pytest.fixture(params=["question", "headers", "file"])
def get(request: pytest.FixtureRequest, server: HubServer, tmp_path: Path) -> Callable[[], object]:
    """The three ways to use an address."""
    url = server.url + PATH
    ways: dict[str, Callable[[], object]] = {
        "question": lambda: ask("GET", url),
        "headers": lambda: ask("HEAD", url),
        "file": lambda: download(url, tmp_path / "model.ckpt"),
    }
    return ways[request.param]


def refused(get: Callable[[], object]) -> str:
    """The message of the error that it ends with; empty if it ends well."""
    try:
        get()
    except HubError as error:
        return str(error)
    return ""


@pytest.mark.fault(130)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("coding", ["gzip", "deflate", "", "gzip, gzip"])
def test_what_comes_with_a_redirect_is_not_read(
    server: HubServer, get: Callable[[], object], status: int, coding: str
) -> None:
    head = f"HTTP/1.1 {status} Found\r\nLocation: {TARGET}\r\nContent-Encoding: {coding}\r\nConnection: close\r\n\r\n"
    server.always[PATH] = Fault(raw=head.encode() + BOMB if coding else head.encode(), endless=BLOCK)
    with in_proportion(1, seconds=0.5, megabytes=8):
        get()
    assert server.paths()[-1] == TARGET


@pytest.mark.fault(130)
@pytest.mark.parametrize("status", [400, 401, 404, 410, 500, 503, 226, 300, 304])
def test_what_comes_with_a_refusal_is_not_read(server: HubServer, get: Callable[[], object], status: int) -> None:
    head = f"HTTP/1.1 {status} No\r\nContent-Encoding: gzip\r\nLocation: {TARGET}\r\n\r\n"
    server.always[PATH] = Fault(raw=head.encode(), endless=BOMB[: 1 << 20])
    with in_proportion(1, seconds=0.5, megabytes=8), pytest.raises(HubError, match=rf"127\.0\.0\.1.*HTTP {status}"):
        get()


@pytest.mark.fault(130)
def test_what_comes_after_headers_that_were_asked_for_is_not_read(server: HubServer) -> None:
    server.always[PATH] = Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", endless=BLOCK)
    with in_proportion(1, seconds=0.5, megabytes=8):
        assert ask("HEAD", server.url + PATH).size_bytes == 7


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEADS = {
    "a status line": (b"HTTP/1.1 200 ", b"x"),
    "a header": (HEAD + b"X: ", b"x"),
    "a folded header": (HEAD + b"X: y\r\n", b" y\r\n"),
    "headers": (HEAD, b"X: y\r\n"),
    "headers of 10 kB": (HEAD, b"X: " + b"y" * 10_000 + b"\r\n"),
    "100 Continue": (b"", CONTINUE),
    "100 Continue with headers": (b"", b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 10_000 + b"\r\n\r\n"),
}
BODIES = {
    "a chunk size": (CHUNKED, b"0"),
    "a chunk extension": (CHUNKED + b"1;", b"x"),
    "chunk extensions": (CHUNKED, b"1;" + b"x" * 60_000 + b"\r\n \r\n"),
    "a trailer": (CHUNKED + b"2\r\n[]\r\n0\r\nX: ", b"x"),
    "trailers": (CHUNKED + b"2\r\n[]\r\n0\r\n", b"X: y\r\n"),
}
FLOODS = HEADS | BODIES


@pytest.mark.fault(131)
@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_around_the_content_ends(server: HubServer, get: Callable[[], object], kind: str) -> None:
    raw, again = FLOODS[kind]
    repeated = again * (100_000 // len(again) + 1)
    server.always[PATH] = Fault(raw=raw, endless=repeated)
    began = time.monotonic()
    with in_proportion(1, megabytes=16):
        message = refused(get)
    assert server.url in message or (kind in BODIES and server.requests[0].method == "HEAD")
    assert time.monotonic() - began < 10 and len(server.requests) <= 5


@pytest.mark.fault(131)
@pytest.mark.parametrize("kind", FLOODS)
def test_a_drip_around_the_content_has_a_deadline(
    server: HubServer, get: Callable[[], object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never silent for long, and never of use."""
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.1)
    raw, again = FLOODS[kind]
    server.always[PATH] = Fault(raw=raw, endless=again, piece_bytes=1, pause_s=0.01)
    began = time.monotonic()
    message = refused(get)
    assert (server.url in message and "within 0 s" in message) or (
        kind in BODIES and server.requests[0].method == "HEAD"
    )
    assert time.monotonic() - began < 5


@pytest.mark.fault(131)
def test_all_hops_of_a_request_have_one_deadline(
    server: HubServer, get: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.2)
    server.always[PATH] = Fault(status=302, body=b"", headers={"Location": PATH}, stall_s=0.1)
    with pytest.raises(HubError, match=r"within 0 s \(tried 2 times\)"):
        get()
    assert len(server.requests) <= 6


@pytest.mark.fault(131)
def test_a_proxy_that_drips_has_a_deadline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.1)
    with serve() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        proxy.always["443"] = Fault(raw=b"HTTP/1.1 200 OK\r\n", endless=b"X: y\r\n", pause_s=0.01)
        with pytest.raises(HubError, match="within 0 s"):
            ask("GET", "https://hub.example/answer")


@pytest.mark.fault(131)
def test_users_who_are_patient_with_silence_wait_longer(
    server: HubServer, get: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.1)
    monkeypatch.setenv(environment.TIMEOUT_VARIABLE, "300")
    server.always[PATH] = Fault(stall_s=0.3)
    get()


@pytest.mark.fault(131)
def test_a_file_may_come_in_the_smallest_chunks(server: HubServer, tmp_path: Path) -> None:
    """Much framing is no fault as long as content comes with it."""
    server.files[PATH] = bytes(10_000)
    server.always[PATH] = Fault(chunked=True, piece_bytes=1)
    assert download(server.url + PATH, tmp_path / "file").size_bytes == 10_000


@pytest.mark.fault(131)
def test_a_file_may_take_longer_than_any_piece_of_it(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.3)
    server.files[PATH] = bytes(20)
    server.always[PATH] = Fault(piece_bytes=1, pause_s=0.05)
    assert download(server.url + PATH, tmp_path / "file").size_bytes == 20
    assert len(server.requests) == 1
