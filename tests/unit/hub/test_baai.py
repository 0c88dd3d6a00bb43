"""BAAI's hub: its requests, and answers that are not what they should be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError, HubUnavailableError, ModelNotFoundError
from flagai_altdiff.hub import baai, client, fetch
from flagai_altdiff.registry import MODELS, FileSpec
from tests.cost import in_proportion
from tests.servers import Fault, HubServer, serve

NAME = "AltDiffusion-m18"
FILES = {"config.yaml": b"model: {}", "model.ckpt": b"weights"}
FIND, LIST, CODE = "/api/searchModleByName", "/api/searchModelFileByName", "/api/downloadCode"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={NAME: FILES}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url + "/")
        yield running


def test_the_requests_are_those_of_the_protocol(server: HubServer) -> None:
    files = baai.list_files(NAME)
    assert [file.name for file in files] == ["config.yaml", "model.ckpt"]
    location = files[1].locate()
    assert (location.url, location.size_bytes) == (f"{server.url}/files/100000/model.ckpt", 7)
    assert [(r.method, r.path, r.query) for r in server.requests] == [
        ("GET", FIND, {"model_name": NAME}),
        ("GET", LIST, {"model_name": NAME}),
        ("POST", CODE, {}),
    ]
    assert json.loads(server.requests[2].body) == {"model_id": "100000", "checkpoint_name": "model.ckpt"}
    assert server.requests[2].headers["content-type"] == "application/json"


@pytest.mark.fault(24)
def test_an_unknown_model_is_told_apart_from_a_broken_hub(server: HubServer) -> None:
    with pytest.raises(ModelNotFoundError, match="AltDiffusion-m99"):
        baai.list_files("AltDiffusion-m99")


@pytest.mark.fault(24)
def test_a_missing_file_lists_the_known_ones(server: HubServer) -> None:
    (file, _) = baai.list_files(NAME)
    del server.models[NAME]["config.yaml"]
    with pytest.raises(ModelNotFoundError, match=r"config\.yaml.*It has \['model\.ckpt'\]"):
        file.locate()


@pytest.mark.parametrize("text", ["", "<html>502 Bad Gateway</html>", "1; rm -rf /", "[1]", "x" * 65, "\uff11"])
def test_only_an_id_is_taken_for_an_id(server: HubServer, text: str) -> None:
    server.always[FIND] = Fault(body=text.encode())
    with pytest.raises(HubError, match="not a model id"):
        baai.list_files(NAME)


@pytest.mark.parametrize("text", ["100096", "100096\n", '"6541f0-a_b"'])
def test_an_id_is_sent_back_as_it_came(server: HubServer, text: str) -> None:
    server.always[FIND] = Fault(body=text.encode())
    with pytest.raises(ModelNotFoundError):
        baai.list_files(NAME)[0].locate()
    assert json.loads(server.requests[-1].body)["model_id"] == text.strip()


@pytest.mark.parametrize("text", ['["a", "b"]', "['a', 'b']", " [ 'a', \"b\", ]\n"])
def test_a_list_may_be_json_or_a_python_literal(server: HubServer, text: str) -> None:
    server.always[LIST] = Fault(body=text.encode())
    assert [file.name for file in baai.list_files(NAME)] == ["a", "b"]


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "text",
    [
        "[f for f in ['config.yaml'] if print('ran on the client') or True]",
        "[__import__('os').system('touch ran')]",
        "['a' * 10**9]",
        "[b'a']",
        "[1]",
        "{'a': 1}",
        "'config.yaml'",
        "null",
        "",
        "<html>",
        "[" * 60_000,
        "-" * 60_000 + "1",
        "(" * 60_000,
        json.dumps(["x" * 70_000]),
    ],
    ids=lambda text: text[:12],
)
def test_a_list_is_never_evaluated(server: HubServer, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.always[LIST] = Fault(body=text.encode())
    with pytest.raises(HubError, match="not a list of files"):
        baai.list_files(NAME)
    assert capsys.readouterr().out == ""


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "answer",
    [
        "not json",
        "[]",
        "null",
        "{}",
        '{"url": "http://h/x"}',
        '{"url": "http://h/x", "size": "7"}',
        '{"url": "http://h/x", "size": true}',
        '{"url": "http://h/x", "size": -1}',
        '{"url": ["http://h/x"], "size": 7}',
        '{"url": "file:///etc/passwd", "size": 7}',
        '{"a":' * 50_000,
    ],
    ids=lambda text: text[:30],
)
def test_an_address_without_url_and_size_is_refused(server: HubServer, answer: str) -> None:
    server.always[CODE] = Fault(body=answer.encode())
    with pytest.raises(HubError):
        baai.list_files(NAME)[0].locate()


def test_questions_are_asked_again_after_passing_failures(server: HubServer) -> None:
    server.faults = {FIND: [Fault(status=502)] * 4, LIST: [Fault(cut_at=3)], CODE: [Fault(status=429)]}
    assert baai.list_files(NAME)[1].locate().size_bytes == 7
    assert server.paths() == [FIND] * 5 + [LIST] * 2 + [CODE] * 2


@pytest.mark.fault(22)
def test_an_endless_answer_is_cut_off(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1000)
    server.always[LIST] = Fault(body=b" " * 2000)
    with pytest.raises(HubError, match="more than 1000 bytes"):
        baai.list_files(NAME)


def test_an_answer_in_another_encoding_is_refused(server: HubServer) -> None:
    server.always[LIST] = Fault(body=b'["\xff"]')
    with pytest.raises(HubError, match="not UTF-8 text"):
        baai.list_files(NAME)


@pytest.mark.fault(136)
@pytest.mark.parametrize("known", [True, False])
def test_a_hub_of_https_hands_out_no_addresses_without(
    server: HubServer,
    secure: HubServer,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
) -> None:
    """Unless the hash is known; where the user named the hub by http, nothing is lost."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    secure.models = server.models
    sums = {name: hashlib.sha256(data).hexdigest() if known else None for name, data in FILES.items()}
    spec = replace(
        MODELS[NAME], sources=(("baai", NAME),), files=tuple(FileSpec(name=name, sha256=sums[name]) for name in FILES)
    )
    with monkeypatch.context() as patched:
        patched.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", secure.url)
        secure.answer_url = server.url
        if known:
            fetch(spec, tmp_path / "known")
        else:
            with pytest.raises(
                HubUnavailableError, match=rf"https://.* hands out an address without https, {server.url}"
            ):
                fetch(spec, tmp_path / "unknown")
            assert server.requests == []
            secure.answer_url = ""
            fetch(spec, tmp_path / "safe")
    fetch(spec, tmp_path / "typed")


@pytest.mark.fault(23)
@pytest.mark.fault(132)
@pytest.mark.parametrize(
    "text",
    [
        "['" + " " * 60_000,
        "[" + "'a'," * 16_000 + "]",
        "[" + "," * 60_000 + "]",
        "['" * 30_000,
        "[" + "9" * 60_000 + "]",
        '{"a":1}',
        "['a' 'b']",
        "['a\\x41']",
        "[a]",
        "['a',,'b']",
        "[,]",
        "['a'",
        json.dumps([str(k) for k in range(1001)]),
    ],
    ids=lambda text: text[:8],
)
def test_a_list_of_names_is_read_at_a_cost_in_proportion(server: HubServer, text: str) -> None:
    server.always[LIST] = Fault(body=text.encode())
    with in_proportion(len(text)), pytest.raises(HubError, match="not a list of files"):
        baai.list_files(NAME)


@pytest.mark.fault(132)
def test_a_name_that_is_listed_twice_is_one_file(server: HubServer) -> None:
    server.always[LIST] = Fault(body=b'["config.yaml", "config.yaml"]')
    assert [file.name for file in baai.list_files(NAME)] == ["config.yaml"]
