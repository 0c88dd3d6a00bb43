"""Where credentials go, which addresses are asked, and how long a small answer may take."""

from __future__ import annotations

import gzip
import logging
import time
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
