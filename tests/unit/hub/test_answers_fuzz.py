"""Answers that are put together from valid and hostile parts: whoever asks gets an answer or an error of this package.

``ALTDIFF_FUZZ_EXAMPLES=20000`` makes a long run of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.hub import baai, environment, huggingface
from flagai_altdiff.hub.client import ask
from flagai_altdiff.hub.mirror import Mirror
from flagai_altdiff.hub.transfer import download
from tests.cost import in_proportion
from tests.servers import COMMIT

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60"))
MOST_CONNECTIONS = 300
DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()
TREE = [{"type": "file", "path": name, "size": 2} for name in ("model_index.json", "unet/config.json")]
RECORD = [{"name": "config.yaml", "size_bytes": 2, "sha256": "0" * 64, "source": "x"}]


@dataclass
class Script:
    """What a server says, connection by connection and then from the beginning again, and how often it was asked."""

    answers: list[bytes] = field(default_factory=lambda: [b""])
    asked: int = 0
    sent_bytes: int = 0


@contextmanager
def speaking(script: Script) -> Iterator[str]:
    """A server that says what its script says, whatever it is asked; its address."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                connection.settimeout(5)
                connection.recv(1 << 16)
                answer = script.answers[script.asked % len(script.answers)]
                script.asked += 1
                script.sent_bytes += len(answer)
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def times(part: bytes, most: int) -> st.SearchStrategy[bytes]:
    """A part repeated, up to ``most`` bytes of it."""
    return st.integers(0, most // max(len(part), 1)).map(lambda count: part * count)


odd_numbers = st.sampled_from(
    [b"0", b"2", b"-1", b"+5", b"1e3", b"5, 5", b"5, 7", b"0x5", b"nan", b"", b"9" * 20, b"9" * 6000]
)
numbers = st.one_of(
    odd_numbers, st.integers(0, 20_000).map(lambda n: str(n).encode()), st.just(str(len(DATA)).encode())
)
words = st.one_of(
    st.sampled_from(
        [
            b"gzip",
            b"identity",
            b"br",
            b"chunked",
            b"gzip, chunked",
            b"text/html",
            b"close",
            b"keep-alive",
            b"\x1b[2J",
            b"\xff",
        ]
    ),
    st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b" ").replace(b"\r", b" ")),
    times(b"x", 70_000),
    times(b";,=\"' <", 30_000),
)
addresses = st.one_of(
    st.sampled_from(
        [
            b"/",
            b"?a",
            b"//h/",
            b"http://127.0.0.1:9/",
            b"https://127.0.0.1:9/",
            b"http://[::1",
            b"http://h:99999/",
            b"file:///x",
        ]
    ),
    st.sampled_from(
        [b"http://u:p@127.0.0.1:9/", b"\\\\h", b"http://a b/", b"\xe7\x8c\xab", b"..", b"http://[fe80::1%25x]/"]
    ),
    words,
)
links = st.tuples(addresses, words).map(lambda pair: b'<%s>; rel="next"; %s' % pair)
dates = st.sampled_from(
    [
        b"Fri, 31 Dec 2999 23:59:59 GMT",
        b"Tue, 01 Jul 2025 00:00:00 GMT",
        b"Mon, 99 Jan 99999",
        b"Thu, 01 Jan 1970 00:00:00 -2359",
    ]
)
ranges = st.tuples(numbers, numbers, numbers).map(lambda three: b"bytes %s-%s/%s" % three)
headers = st.one_of(
    *(
        st.tuples(st.just(name), values)
        for name, values in {
            b"Content-Length": numbers,
            b"Content-Range": st.one_of(ranges, words),
            b"Transfer-Encoding": words,
            b"Content-Encoding": words,
            b"Content-Type": words,
            b"Location": addresses,
            b"Link": links,
            b"Retry-After": st.one_of(odd_numbers, dates),
            b"ETag": st.one_of(st.sampled_from([b'"a"', b'W/"a"', b'""']), words),
            b"Last-Modified": st.one_of(dates, words),
            b"Date": dates,
            b"Set-Cookie": words,
            b"X-Repo-Commit": st.just(COMMIT.encode()),
            b"X-Error-Code": words,
        }.items()
    ),
    st.tuples(words, words),
)
sizes = st.one_of(st.integers(-2, 1 << 70), st.sampled_from(["2", True, None, 1.5, 1e300, [2], 10**4000]))
names = st.one_of(
    st.sampled_from(["model_index.json", "../x", "a/b", "config.yaml", "", "\x1b", "x" * 5000, 7, ["a"], None]),
    st.text(max_size=5),
)
facts = st.one_of(
    st.just(TREE),
    st.just({"version": 1, "files": RECORD}),
    st.just(["config.yaml", "model.ckpt"]),
    st.lists(names, max_size=4),
    st.lists(
        st.fixed_dictionaries(
            {
                "type": st.sampled_from(["file", "directory", 3]),
                "path": names,
                "size": sizes,
                "lfs": st.one_of(st.none(), st.fixed_dictionaries({"oid": names})),
            }
        ),
        max_size=4,
    ),
    st.fixed_dictionaries(
        {
            "code": st.sampled_from(["20000", "40002", 40002]),
            "url": names,
            "size": sizes,
            "files": st.lists(names, max_size=3),
        }
    ),
    st.fixed_dictionaries(
        {
            "version": st.sampled_from([1, 2, "1", True]),
            "files": st.lists(
                st.fixed_dictionaries({"name": names, "size_bytes": sizes, "sha256": names, "source": names}),
                max_size=3,
            ),
        }
    ),
)
texts = st.one_of(
    facts.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            b"null",
            b"100000",
            b"['a', \"b\"]",
            b"NaN",
            b"-" * 5000 + b"1",
            b"\xef\xbb\xbf[]",
            b"\xff\xfe[\0]\0",
            b"[\0]",
            b"<html>",
        ]
    ),
    times(b"[", 200_000),
    times(b"[],", 2_000_000),
    times(b'{"":', 200_000),
    times(b"9", 100_000),
    times(b"'a',", 60_000).map(lambda inside: b"[" + inside + b"]"),
    st.binary(max_size=40),
)
bodies = st.one_of(
    texts, st.just(DATA), st.integers(0, len(DATA)).map(lambda cut: DATA[:cut]), times(bytes(1000), 5_000_000)
)
packed = bodies.flatmap(
    lambda body: st.sampled_from([body, gzip.compress(body, 1), gzip.compress(gzip.compress(body, 1), 1)])
)


@st.composite
def chunked(draw: st.DrawFn) -> bytes:
    """A body in chunks, right or not."""
    body = draw(bodies)[:100_000]
    size = draw(st.integers(1, 10_000)) if len(body) > 1000 else draw(st.integers(1, 10))
    extension = draw(st.one_of(st.just(b""), st.tuples(words).map(lambda one: b";" + one[0])))[
        : 5_000 if len(body) > 1000 else 70_000
    ]
    pieces = [body[at : at + size] for at in range(0, min(len(body), 200 * size), size)]
    wrong = draw(
        st.sampled_from([b"", b"", b"", b"-5\r\n", b"zz\r\n", b"f" * 70_000, b"+1\r\nx\r\n", b"7fffffffffffffff\r\n"])
    )
    end = draw(st.sampled_from([b"0\r\n\r\n", b"0\r\n", b"", b"0\r\n" + b"X: y\r\n" * 100_000]))
    return b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + wrong + end


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """One answer: what goes before it, status line, headers, body; perhaps cut."""
    before = draw(
        st.one_of(
            st.just(b""),
            st.just(b""),
            times(b"HTTP/1.1 100 Continue\r\n\r\n", 500_000),
            times(b"HTTP/1.1 103 Hints\r\n\r\n", 100),
        )
    )
    status = draw(
        st.sampled_from(
            [200] * 12 + [206] * 4 + [301, 302, 303, 307, 308, 204, 304, 401, 404, 407, 416, 429, 500, 503, 99, 1000]
        )
    )
    line = draw(st.one_of(st.just(b"HTTP/1.1 %d OK" % status), st.just(b"HTTP/1.1 %d OK" % status), words))
    told = draw(st.lists(headers, max_size=5))
    if draw(st.booleans()):
        told, body = [*told, (b"Transfer-Encoding", b"chunked")], draw(chunked())
    else:
        body = draw(packed)
        told = [*told, (b"Content-Length", str(len(body)).encode())] if draw(st.booleans()) else told
    end = draw(st.sampled_from([b"\r\n\r\n"] * 5 + [b"\r\n", b"", b"\n\n"]))
    whole = before + line + b"\r\n" + b"\r\n".join(b"%s: %s" % pair for pair in told) + end + body
    return whole[: draw(st.integers(0, len(whole)))] if draw(st.integers(0, 9)) == 0 else whole


def get_file(address: str, place: Path, **known: object) -> None:
    received = download(f"{address}/model.ckpt", place / "model.ckpt", **known)  # type: ignore[arg-type]
    content = (place / "model.ckpt").read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (received.size_bytes, received.sha256)
    assert known.get("sha256") in (None, received.sha256) and known.get("size_bytes") in (None, received.size_bytes)


def get_names(address: str, place: Path) -> None:
    for file in baai.list_files("AltDiffusion")[:3]:
        assert file.locate().url.startswith("http")


WAYS: dict[str, Callable[[str, Path], object]] = {
    "question": lambda address, place: ask("GET", address).parse_json(),
    "headers": lambda address, place: ask("HEAD", address),
    "file": get_file,
    "file of a size": lambda address, place: get_file(address, place, size_bytes=len(DATA)),
    "file of a hash": lambda address, place: get_file(address, place, sha256=SHA256),
    "config": lambda address, place: download(f"{address}/config.yaml", place / "config.yaml"),
    "baai": get_names,
    "huggingface": lambda address, place: huggingface.list_files("BAAI/AltDiffusion"),
    "mirror": lambda address, place: Mirror(address=address, setting="source", usual_files=("a",)).list_files("b"),
}


@pytest.mark.fault(22)
@pytest.mark.fault(23)
@pytest.mark.fault(106)
@pytest.mark.fault(130)
@pytest.mark.fault(131)
@pytest.mark.parametrize("way", WAYS)
def test_an_odd_answer_is_used_or_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "READ_TIMEOUT_S", 2.0)
    script = Script()

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(said=st.lists(answers(), min_size=1, max_size=4))
    def survives(said: list[bytes]) -> None:
        script.answers, script.asked, script.sent_bytes = said, 0, 0
        place, message = Path(tempfile.mkdtemp(prefix="fuzz-")), ""
        try:
            with in_proportion(sum(map(len, said))):
                WAYS[way](address, place)
        except FlagAIAltDiffError as error:
            message = str(error)
            assert {path.name for path in place.iterdir()} <= {
                f"{name}{end}" for name in ("model.ckpt", "config.yaml") for end in (".part", ".part.json")
            }
        finally:
            shutil.rmtree(place)
        assert not message or ("http" in message and len(message) < 1500 and message.isprintable())
        assert script.asked <= MOST_CONNECTIONS

    with speaking(script) as address:
        for variable in (environment.BAAI_VARIABLE, environment.HF_VARIABLE):
            monkeypatch.setenv(variable, address)
        survives()
