"""The record of a model's files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError, HubUnavailableError
from flagai_altdiff.hub import fetch, manifest, record_missing, verify
from flagai_altdiff.hub.manifest import FileRecord
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.registry import MODELS, FileSpec
from tests.servers import COMMIT, Fault, HubServer, etag, serve

SPEC = MODELS["AltDiffusion"]
FILES = {"config.yaml": b"model: {}", "model.ckpt": bytes(100_000), "sentencepiece.bpe.model": b"pieces"}
DIFFUSERS = {
    "model_index.json": b"{}",
    "text_encoder/config.json": b"{}",
    "unet/config.json": b"{}",
    "vae/config.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"{}",
    "text_encoder/model.safetensors": b"text",
    "unet/diffusion_pytorch_model.safetensors": b"unet",
    "vae/diffusion_pytorch_model.safetensors": b"vae",
}


@pytest.fixture
def baai(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FILES}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / SPEC.name


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def states(folder: Path) -> dict[str, str]:
    return {finding.name: finding.state for finding in verify(folder, SPEC)}


def test_every_file_is_recorded_as_it_arrived(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder)
    records = manifest.read(folder)
    assert {name: (r.size_bytes, r.sha256, r.etag) for name, r in records.items()} == {
        name: (len(data), sha256(data), etag(data)) for name, data in FILES.items()
    }
    assert records["model.ckpt"].url == f"{baai.url}/files/100000/model.ckpt"
    assert set(states(folder).values()) == {"ok"}


def test_the_commit_that_the_server_names_binds_all_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(repositories={"BAAI/AltDiffusion": DIFFUSERS}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        fetch(SPEC, folder)
        assert all(COMMIT in path for path in server.paths()[1:])
    assert {record.revision for record in manifest.read(folder).values()} == {COMMIT}


@pytest.mark.fault(26)
def test_no_secret_is_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(files={f"/{SPEC.name}/{name}": data for name, data in FILES.items()}) as server:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        fetch(SPEC, folder, source=server.url.replace("://", "://me:secret@"))
    assert "secret" not in (folder / MANIFEST_NAME).read_text()
    assert manifest.read(folder)["model.ckpt"].url == f"{server.url}/{SPEC.name}/model.ckpt"


def test_a_file_from_an_interrupted_fetch_is_recorded_too(baai: HubServer, folder: Path) -> None:
    baai.always["/files/100000/model.ckpt"] = Fault(status=403)
    with pytest.raises(HubUnavailableError):
        fetch(SPEC, folder)
    baai.always.clear()
    for path in folder.rglob(MANIFEST_NAME):
        path.unlink()
    fetch(SPEC, folder)
    assert set(states(folder).values()) == {"ok"}


@pytest.mark.fault(6)
def test_a_recorded_hash_binds_the_next_download_from_there(baai: HubServer, folder: Path) -> None:
    """As long as the weights are there; nothing else may join them under their version's name."""
    fetch(SPEC, folder)
    (folder / "sentencepiece.bpe.model").unlink()
    baai.models[SPEC.name]["sentencepiece.bpe.model"] = b"another"
    with pytest.raises(HubUnavailableError, match="expected SHA-256"):
        fetch(SPEC, folder)
    assert not (folder / "sentencepiece.bpe.model").exists()
    (folder / "model.ckpt").unlink()
    baai.models[SPEC.name]["model.ckpt"] = bytes(99_999) + b"!"
    fetch(SPEC, folder)
    assert (folder / "model.ckpt").read_bytes().endswith(b"!")
    assert (folder / "sentencepiece.bpe.model").read_bytes() == b"another"


def test_a_check_names_what_is_wrong(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder)
    (folder / "model.ckpt").write_bytes(FILES["model.ckpt"][:-1] + b"!")
    (folder / "config.yaml").write_bytes(b"short")
    (folder / "sentencepiece.bpe.model").unlink()
    (folder / "extra.json").write_bytes(b"{}")
    (folder / "README.md").write_bytes(b"not the model's")
    assert states(folder) == {
        "config.yaml": "wrong size",
        "extra.json": "not recorded",
        "model.ckpt": "wrong hash",
        "sentencepiece.bpe.model": "missing",
    }


def test_what_the_registry_knows_goes_before_the_record(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder)
    known = FileSpec(name="model.ckpt", size_bytes=100_000, sha256=sha256(b"the released one"))
    (finding,) = (f for f in verify(folder, replace(SPEC, files=(known,))) if f.name == "model.ckpt")
    assert finding.state == "wrong hash" and "(registry)" in finding.detail


def test_recording_leaves_records_alone(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder)
    (folder / "model.ckpt").write_bytes(b"another")
    (folder / "extra.json").write_bytes(b"{}")
    assert record_missing(folder) == ["extra.json"]
    assert manifest.read(folder)["extra.json"].source == manifest.LOCAL
    assert states(folder)["model.ckpt"] == "wrong size"
    assert record_missing(folder) == []


RECORD = {"name": "model.ckpt", "size_bytes": 1, "sha256": "0" * 64, "source": "baai"}
BROKEN = {
    "no json": "{",
    "a list": "[]",
    "no version": json.dumps({"files": []}),
    "another version": json.dumps({"version": 2, "files": []}),
    "a number for a list": json.dumps({"version": 1, "files": 7}),
    "an entry that is no object": json.dumps({"version": 1, "files": ["x"]}),
    "a key that is not known": json.dumps({"version": 1, "files": [RECORD | {"run": "rm"}]}),
    "a negative size": json.dumps({"version": 1, "files": [RECORD | {"size_bytes": -1}]}),
    "a true size": json.dumps({"version": 1, "files": [RECORD | {"size_bytes": True}]}),
    "a short hash": json.dumps({"version": 1, "files": [RECORD | {"sha256": "00"}]}),
    "a number for a name": json.dumps({"version": 1, "files": [RECORD | {"name": 1}]}),
    "a way out": json.dumps({"version": 1, "files": [RECORD | {"name": "../../x"}]}),
    "half a character": json.dumps({"version": 1, "files": [RECORD | {"etag": "\ud800"}]}),
    "half a character for a key": json.dumps({"version": 1, "files": [RECORD | {"\ud800": "x"}]}),
    "very deep": "[" * 100_000,
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("text", BROKEN.values(), ids=list(BROKEN))
def test_a_broken_record_is_refused_and_does_not_stop_a_download(
    baai: HubServer, folder: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(text)
    with pytest.raises(HubError) as caught:
        manifest.read(folder)
    str(caught.value).encode()
    fetch(SPEC, folder)
    assert "A new record is begun" in caplog.text
    assert set(states(folder).values()) == {"ok"}


def test_a_record_is_written_whole(folder: Path) -> None:
    folder.mkdir()
    records = {"图.json": FileRecord(name="图.json", size_bytes=1, sha256="0" * 64, source="baai")}
    manifest.write(folder, records)
    assert manifest.read(folder) == records
    assert [path.name for path in folder.iterdir()] == [MANIFEST_NAME]
    with pytest.raises(HubError) as caught:
        manifest.write(folder / "nowhere", records)
    assert caught.value.errno is not None


@pytest.mark.fault(108)
def test_a_record_is_not_written_through_a_planted_link(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    folder.mkdir()
    for name in (MANIFEST_NAME, f"{MANIFEST_NAME}.{os.getpid()}.new"):
        (folder / name).symlink_to(outside)
    manifest.write(folder, {})
    assert outside.read_text() == "mine" and not (folder / MANIFEST_NAME).is_symlink()


def test_a_record_that_an_editor_saved_is_read(folder: Path) -> None:
    folder.mkdir()
    (folder / MANIFEST_NAME).write_text(json.dumps({"version": 1, "files": [RECORD]}), encoding="utf-8-sig")
    assert list(manifest.read(folder)) == ["model.ckpt"]


@pytest.mark.fault(106)
def test_files_whose_names_are_no_text_are_passed_over(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder)
    for name in (b"\xff.json", b"._model.ckpt", b".hidden.json", b"a\x1b.json"):
        (folder / os.fsdecode(name)).write_bytes(b"x")
    assert record_missing(folder) == []
    assert set(states(folder)) == set(FILES)
