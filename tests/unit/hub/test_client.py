"""Where credentials go, which addresses are asked, and how long a small answer may take."""

from __future__ import annotations

import gzip
import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub import addresses, client, environment
from flagai_altdiff.hub.client import ask, send
from flagai_altdiff.hub.transfer import download
from tests.cost import in_proportion
from tests.servers import Fault, HubServer, serve

PATH = "/answer"
TOKEN = {"Authorization": "Bearer hf_secret"}


@pytest.fixture
def server() -> Iterator[HubServer]:
    client._warn_of_exposure.cache_clear()
    with serve(files={PATH: b"[]"}) as running:
        yield running


@pytest.mark.fault(11)
def test_an_answer_that_drips_has_a_deadline(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_DEADLINE_S", 0.3)
    server.always[PATH] = Fault(body=b" " * 10_000, piece_bytes=1, pause_s=0.02)
    began = time.monotonic()
    with pytest.raises(HubError, match=r"no whole answer within 0 s \(tried 2 times\)"):
        ask("GET", server.url + PATH)
    assert time.monotonic() - began < 10


@pytest.mark.fault(11)
def test_the_time_of_silence_is_the_users_to_choose(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    server.always[PATH] = Fault(stall_s=2.0)
    with pytest.raises(HubError, match="no data for 1 s"):
        ask("HEAD", server.url + PATH)
    for text in ("0", "soon", ""):
        monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", text)
        assert environment.read_timeout_s() == 30.0


@pytest.mark.fault(10)
def test_https_is_not_left_for_http(
    secure: HubServer, server: HubServer, certificate: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert ask("GET", secure.url + PATH).text == "[]"
    secure.always[PATH] = Fault(status=302, body=b"", headers={"Location": server.url + PATH})
    with pytest.raises(HubError, match="redirects from https to http"):
        ask("GET", secure.url + PATH)
    with pytest.raises(HubError, match="redirects from https to http"):
        download(secure.url + PATH, tmp_path / "file", headers=TOKEN)
    assert server.requests == []


@pytest.mark.fault(25)
def test_a_certificate_that_nobody_vouches_for_is_refused(
    secure: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    with pytest.raises(HubError, match="certificate was refused"):
        ask("GET", secure.url + PATH, headers=TOKEN)
    with pytest.raises(HubError, match="certificate was refused"):
        download(secure.url + PATH, tmp_path / "file")
    assert secure.requests == []
    assert list(tmp_path.glob("file*")) == []


@pytest.mark.fault(26)
@pytest.mark.parametrize("redirect_to", ["another port", "another name"])
def test_credentials_stay_with_their_host(server: HubServer, redirect_to: str) -> None:
    with serve(files={PATH: b"[]"}) as other:
        target = other.url if redirect_to == "another port" else server.url.replace("127.0.0.1", "localhost")
        server.faults[PATH] = [Fault(status=302, body=b"", headers={"Location": target + PATH})]
        ask("GET", server.url + PATH, headers=TOKEN)
        first, second = [*server.requests, *other.requests]
    assert first.headers["authorization"] == "Bearer hf_secret"
    assert "authorization" not in second.headers


@pytest.mark.fault(26)
def test_a_token_is_not_sent_where_everybody_can_read_it(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server stands for a proxy, so that a host of any name can be asked."""
    monkeypatch.setenv("http_proxy", server.url)
    for _ in range(2):
        ask("GET", "http://mirror.example/answer", headers=TOKEN)
    assert [request.headers.get("authorization") for request in server.requests] == [None, None]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "the token is not sent to http://mirror.example" in warnings[0]
    assert "hf_secret" not in caplog.text


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("https://huggingface.co/x", True),
        ("http://127.0.0.1:80/x", True),
        ("http://[::1]/x", True),
        ("http://localhost/x", True),
        ("http://localhost.example/x", False),
        ("http://10.0.0.1/x", False),
        ("http://127.0.0.1.example/x", False),
    ],
)
def test_which_addresses_are_private(url: str, private: bool) -> None:
    assert addresses.is_private(url) is private


@pytest.mark.fault(26)
def test_a_netrc_is_not_used(server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\nmachine localhost login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    server.faults[PATH] = [
        Fault(status=302, body=b"", headers={"Location": server.url.replace("127.0.0.1", "localhost") + PATH})
    ]
    ask("GET", server.url + PATH)
    ask("GET", server.url + PATH, headers=TOKEN)
    assert [request.headers.get("authorization") for request in server.requests] == [None, None, "Bearer hf_secret"]


def test_a_name_and_password_in_an_address_are_used(server: HubServer) -> None:
    ask("GET", server.url.replace("://", "://me:secret@") + PATH)
    assert server.requests[0].headers["authorization"].startswith("Basic ")


@pytest.mark.fault(22)
@pytest.mark.parametrize(
    "form", ["gzip", "GZIP", "identity, gzip", "gzip, gzip, gzip", "deflate", "br", "zstd", "x" * 60_000]
)
def test_a_compressed_bomb_is_cut_off(server: HubServer, form: str) -> None:
    """It is not unpacked at all: no answer is asked for in packed form."""
    server.always[PATH] = Fault(body=gzip.compress(bytes(50 << 20)), headers={"Content-Encoding": form})
    with in_proportion(50_000, megabytes=8), pytest.raises(HubError, match="compresses what it sends"):
        ask("GET", server.url + PATH)
    assert server.requests[0].headers["accept-encoding"] == "identity"


def test_an_answer_may_come_in_chunks(server: HubServer, tmp_path: Path) -> None:
    server.always[PATH] = Fault(chunked=True, piece_bytes=1)
    assert ask("GET", server.url + PATH).text == "[]"
    assert download(server.url + PATH, tmp_path / "file").size_bytes == 2
    server.always[PATH] = Fault(chunked=True, piece_bytes=1, cut_at=1)
    with pytest.raises(HubError, match="connection was cut"):
        ask("GET", server.url + PATH)


def test_proxies_come_from_the_environment(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    assert ask("GET", "http://hub.example/answer").text == "[]"
    assert server.requests[0].headers["host"] == "hub.example"


def test_an_answer_is_returned_whatever_its_status(server: HubServer) -> None:
    with send("GET", server.url + "/nothing") as response:
        assert response.status == 404


SECRETS = {
    "no such host": Fault(),
    "cut": Fault(cut_at=1),
    "garbage": Fault(raw=b"hunter2\r\n\r\n"),
    "no status": Fault(raw=b"HTTP/1.1 hunter2\r\n\r\n"),
    "no header": Fault(raw=b"HTTP/1.1 404 No\r\nnot a header hunter2\r\n\r\n"),
    "no length": Fault(raw=b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"),
    "redirect": Fault(status=302, headers={"Location": "http://me:hunter2@127.0.0.1:9/?token=hunter2#hunter2"}),
    "redirect to nothing": Fault(
        status=302, headers={"Location": "ftp://me:hunter2@127.0.0.1:9/?token=hunter2#hunter2"}
    ),
    "redirect to no port": Fault(status=302, headers={"Location": "http://me:hunter2@h:port/?token=hunter2"}),
    "redirect in a circle": Fault(status=302, headers={"Location": "?token=hunter2"}),
    "refused": Fault(status=403),
    "not there": Fault(status=404),
    "busy": Fault(status=503),
    "silent": Fault(stall_s=0.3),
    "no text": Fault(body=b"\xff"),
    "chunks": Fault(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n"),
}


@pytest.mark.fault(137)
@pytest.mark.parametrize("kind", SECRETS)
def test_no_secret_of_an_address_is_in_an_error_its_causes_or_the_log(
    server: HubServer, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flagai_altdiff")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.1")
    server.always[PATH] = SECRETS[kind]
    url = server.url.replace("://", "://me:hunter2@") + PATH + "?token=hunter2"
    url = url.replace("127.0.0.1", "nowhere.invalid") if kind == "no such host" else url
    said = []
    for get in (lambda: ask("GET", url), lambda: download(url, tmp_path / "file")):
        try:
            get()
        except HubError as error:
            said += traceback.format_exception(error)
    assert said
    assert "hunter2" not in "".join(said)
    assert "hunter2" not in caplog.text


@pytest.mark.fault(137)
def test_no_secret_of_a_proxy_is_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "hub.example/answer?token=hunter2"
    for proxy in ("http://me:hunter2@127.0.0.1:9", "http://me:hunter2@nowhere.invalid:80"):
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", proxy)
            with pytest.raises(HubError) as caught:
                ask("GET", f"{scheme}://{address}")
            assert "hunter2" not in "".join(traceback.format_exception(caught.value))


NASTY = "\x1b[2J\x1b]0;owned\x07" + "A" * 50_000


@pytest.mark.fault(137)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(raw=f"HTTP/1.1 418 {NASTY}\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 {NASTY}\r\n\r\n".encode()),
        Fault(raw=f"{NASTY}\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 302 Found\r\nLocation: http://h:{NASTY}/\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/{NASTY}\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 200 OK\r\nContent-Encoding: {NASTY}\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 200 OK\r\nContent-Length: {NASTY}\r\n\r\n".encode()),
        Fault(raw=f"HTTP/1.1 200 OK\r\n{NASTY}\r\nContent-Length: 9\r\n\r\n{NASTY}".encode()),
        Fault(body=NASTY.encode()),
        Fault(body=f"<html>{NASTY}".encode(), headers={"Content-Type": "text/html"}),
    ],
)
def test_what_a_server_says_is_shown_escaped_and_short(
    server: HubServer, tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    server.always[PATH] = fault
    for get in (
        lambda: ask("GET", server.url + PATH).parse_json(),
        lambda: download(server.url + PATH, tmp_path / "f", sha256="0" * 64),
    ):
        with pytest.raises(HubError) as caught:
            get()
        assert len(str(caught.value)) < 700
        assert all(char.isprintable() or char == "\n" for char in str(caught.value) + caplog.text)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("url", "shows"),
    [
        ("https://me:secret%40h.example/x", "h.example/x"),
        ("http://h.example/" + "a" * 5000, "http://h.example/" + "a" * 180 + "..."),
        ("http://h.example:x/\n\x1b", "http://h.example:x/\\n\\x1b"),
    ],
)
def test_addresses_are_shown_without_secrets_and_short(url: str, shows: str) -> None:
    assert addresses.redact_url(url) == shows
