"""Hugging Face: which files of a repository are wanted, and where the token goes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError, ModelNotFoundError
from flagai_altdiff.hub import huggingface
from flagai_altdiff.hub.transfer import download
from tests.cost import in_proportion
from tests.servers import COMMIT, Fault, HubServer, serve

NAME = "BAAI/AltDiffusion-m18"
TREE = f"/api/models/{NAME}/tree/{COMMIT}"
INDEX = f"/{NAME}/resolve/main/model_index.json"
TOKEN = "hf_secret"
WANTED = {
    "model_index.json": b"{}",
    "feature_extractor/preprocessor_config.json": b"{}",
    "safety_checker/config.json": b"{}",
    "safety_checker/pytorch_model.bin": b"checker",
    "scheduler/scheduler_config.json": b"{}",
    "text_encoder/config.json": b"{}",
    "text_encoder/pytorch_model.bin": b"text",
    "tokenizer/sentencepiece.bpe.model": b"pieces",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.bin": b"vae",
}
UNWANTED = {
    ".gitattributes": b"",
    "README.md": b"",
    "m18.ckpt": b"all",
    "m18.safetensors": b"all",
    "safety_checker/pytorch_model.fp16.bin": b"half",
    "text_encoder/model.fp16-00001-of-00002.safetensors": b"half",
    "unet/diffusion_pytorch_model.bin": b"twice",
    "unet/diffusion_pytorch_model.non_ema.bin": b"other",
    "unet/model.onnx": b"onnx",
    "vae/diffusion_flax_model.msgpack": b"flax",
    "vae/deeper/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors.index.fp16.json": b"{}",
    "vae_decoder/config.json": b"{}",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(repositories={NAME: {**WANTED, **UNWANTED}}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def test_one_set_of_weights_per_part_is_wanted(server: HubServer) -> None:
    files = {file.name: file for file in huggingface.list_files(NAME)}
    assert set(files) == set(WANTED)
    assert {name: file.size_bytes for name, file in files.items()} == {name: len(data) for name, data in WANTED.items()}
    assert files["unet/diffusion_pytorch_model.safetensors"].sha256 == hashlib.sha256(b"unet").hexdigest()
    assert files["unet/config.json"].sha256 is None
    assert files["unet/config.json"].locate().url == f"{server.url}/{NAME}/resolve/{COMMIT}/unet/config.json"


def test_names_are_quoted_in_addresses(server: HubServer, tmp_path: Path) -> None:
    server.repositories[NAME]["unet/a ?#%2e.json"] = b"odd"
    (odd,) = (file for file in huggingface.list_files(NAME) if "odd" in file.name or "a " in file.name)
    download(odd.locate().url, tmp_path / "odd")
    assert (tmp_path / "odd").read_bytes() == b"odd"


def test_long_lists_come_in_pages(server: HubServer) -> None:
    first, second = ([{"type": "file", "path": path, "size": 2}] for path in ("model_index.json", "unet/config.json"))
    server.faults[TREE] = [
        Fault(body=json.dumps(first).encode(), headers={"Link": f'<{server.url}{TREE}?cursor=2>; rel="next"'}),
        Fault(body=json.dumps(second).encode()),
    ]
    assert [file.name for file in huggingface.list_files(NAME)] == ["model_index.json", "unet/config.json"]
    assert server.requests[2].query == {"cursor": "2"}


def test_the_next_page_is_not_asked_from_another_host(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as other:
        server.always[TREE] = Fault(body=b"[]", headers={"Link": f'<{other.url}/next>; rel="next"'})
        with pytest.raises(HubError, match="another host"):
            huggingface.list_files(NAME)
        assert other.requests == []


@pytest.mark.fault(106)
@pytest.mark.parametrize("link", ["http://[::1", "http://h:port/"])
def test_a_next_page_at_no_address_is_refused(server: HubServer, link: str) -> None:
    server.always[TREE] = Fault(body=b"[]", headers={"Link": f'<{link}>; rel="next"'})
    with pytest.raises(HubError):
        huggingface.list_files(NAME)


def page(number: int, entries: int = 1, link: str = "") -> Fault:
    """A page of a list that names a further one."""
    listed = [{"type": "file", "path": f"unet/{number}-{k}.json", "size": 1} for k in range(entries)]
    return Fault(body=json.dumps(listed).encode(), headers={"Link": f'<{link or f"?cursor={number}"}>; rel="next"'})


@pytest.mark.fault(22)
@pytest.mark.fault(132)
def test_an_endless_list_ends(server: HubServer) -> None:
    server.faults[TREE] = [page(number) for number in range(10 * huggingface.MAX_PAGES)]
    with pytest.raises(HubError, match="has no end") as caught:
        huggingface.list_files(NAME)
    assert type(caught.value) is HubError
    assert server.paths().count(TREE) == huggingface.MAX_PAGES


@pytest.mark.fault(132)
@pytest.mark.parametrize("links", [[f"{TREE}?recursive=true"], ["?cursor=1", "?cursor=2", "?cursor=1"], ["", "#x"]])
def test_a_list_that_goes_in_a_circle_ends(server: HubServer, links: list[str]) -> None:
    server.faults[TREE] = [page(0, link=link or f"{TREE}?recursive=true") for link in links]
    server.always[TREE] = page(0, link="?cursor=1")
    with pytest.raises(HubError, match="has no end"):
        huggingface.list_files(NAME)
    assert server.paths().count(TREE) <= 4


@pytest.mark.fault(132)
def test_a_list_is_limited_in_entries(server: HubServer) -> None:
    server.faults[TREE] = [page(number, 15_000) for number in range(4)]
    with in_proportion(2_000_000), pytest.raises(HubError, match="more than 20,000 files"):
        huggingface.list_files(NAME)
    assert server.paths().count(TREE) == 2


@pytest.mark.fault(132)
def test_two_entries_for_one_file_are_refused(server: HubServer) -> None:
    listed = [{"type": "file", "path": "model_index.json", "size": size} for size in (2, 3)]
    server.always[TREE] = Fault(body=json.dumps(listed).encode())
    with pytest.raises(HubError, match=r"'model_index\.json' twice"):
        huggingface.list_files(NAME)


@pytest.mark.fault(26)
def test_the_token_goes_to_the_endpoint_only(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\n")
    with serve(files={"/cdn": b"unet"}) as cdn:
        (unet,) = (file for file in huggingface.list_files(NAME) if file.name.endswith(".safetensors"))
        location = unet.locate()
        path = location.url.removeprefix(server.url)
        server.always[path] = Fault(status=302, body=b"", headers={"Location": cdn.url + "/cdn"})
        download(location.url, tmp_path / "file", sha256=unet.sha256, headers=location.headers)
        assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {TOKEN}"] * 3
        assert ["authorization" in request.headers for request in cdn.requests] == [False]
    assert TOKEN not in caplog.text + repr(location) + repr(unet)


def test_without_a_token_none_is_sent(server: HubServer) -> None:
    huggingface.list_files(NAME)
    assert "authorization" not in server.requests[0].headers


@pytest.mark.fault(26)
@pytest.mark.parametrize("token", ["hf_a\nX-Header: b", "hf_a b", "hf_é"])
def test_a_malformed_token_is_refused_and_not_shown(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as caught:
        huggingface.list_files(NAME)
    assert "hf_" not in str(caught.value).replace("HF_TOKEN", "")
    assert server.requests == []


@pytest.mark.parametrize(
    "fault",
    [Fault(status=404), Fault(status=401, headers={"X-Error-Code": "RepoNotFound"}), Fault(body=b"[]")],
    ids=["404", "hidden", "empty"],
)
def test_a_repository_that_is_not_there(server: HubServer, fault: Fault) -> None:
    server.always[TREE] = fault
    with pytest.raises(ModelNotFoundError):
        huggingface.list_files(NAME)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    "text",
    [
        "<html>",
        "{}",
        "[1]",
        '[{"type": "file"}]',
        '[{"path": 1, "size": 1}]',
        '[{"path": "a", "size": "1"}]',
        '[{"path": "a", "size": true}]',
        '[{"path": "a", "size": -1}]',
        '[{"path": "a", "size": 1, "lfs": {"oid": "../x"}}]',
        '[{"path": "a", "size": 1, "lfs": {"oid": 7}}]',
        '[{"path": "a", "size": ' + "9" * 5000 + "}]",
        "[" * 100_000,
    ],
    ids=lambda text: text[:40],
)
def test_a_list_of_another_shape_is_refused(server: HubServer, text: str) -> None:
    server.always[TREE] = Fault(body=text.encode())
    with pytest.raises(HubError) as caught:
        huggingface.list_files(NAME)
    assert type(caught.value) is HubError


MATCHING = {
    "config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "sentencepiece.bpe.model": b"pieces",
    "tokenizer.json": b"{}",
}
WEIGHTS = {
    "safetensors": {"model.safetensors": b"weights"},
    "pickle": {"pytorch_model.bin": b"weights"},
    "shards": {
        "model.safetensors.index.json": b"{}",
        "model-00001-of-00002.safetensors": b"1",
        "model-00002-of-00002.safetensors": b"2",
    },
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_matching_model_lies_in_the_root(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {} if kind == "pickle" else {"pytorch_model.bin": b"twice"}
    files = {**MATCHING, **WEIGHTS[kind], **other, "README.md": b"", "flax_model.msgpack": b"", "onnx/model.onnx": b""}
    with serve(repositories={"BAAI/AltCLIP": files}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        listed = huggingface.list_files("BAAI/AltCLIP")
    assert {file.name for file in listed} == {*MATCHING, *WEIGHTS[kind]}
    assert {file.revision for file in listed} == {COMMIT}


def test_a_repository_without_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(repositories={"BAAI/other": {"README.md": b"", "model.safetensors": b"x"}}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        with pytest.raises(ModelNotFoundError):
            huggingface.list_files("BAAI/other")
