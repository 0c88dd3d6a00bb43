"""A mirror that the user names, and what other programs left in Hugging Face's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flagai_altdiff.errors import HubError, HubUnavailableError, IntegrityError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import environment, fetch, manifest, missing_files, plan
from flagai_altdiff.hub.sources import Wanted, find_sources
from flagai_altdiff.registry import MODELS, SAFETY_CHECKER
from tests.servers import COMMIT, Fault, HubServer, serve

SPEC = MODELS["AltDiffusion"]
REPOSITORY = "BAAI/AltDiffusion"
FLAGAI = {"config.yaml": b"model: {}", "model.ckpt": bytes(50_000), "sentencepiece.bpe.model": b"pieces"}
DIFFUSERS = {
    "model_index.json": b"{}",
    "text_encoder/config.json": b"{}",
    "unet/config.json": b"{}",
    "vae/config.json": b"{}",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"pieces",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/diffusion_pytorch_model.bin": bytes(range(256)) * 100,
    "vae/diffusion_pytorch_model.bin": b"vae",
}
LOADED = sorted(set(DIFFUSERS) - {"model_index.json"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / SPEC.name


@pytest.fixture
def plain(folder: Path) -> Iterator[HubServer]:
    """A web server with FlagAI's files and no list of them."""
    with serve(files={f"/models/{SPEC.name}/{name}": data for name, data in FLAGAI.items()}) as running:
        yield running


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(repositories={REPOSITORY: DIFFUSERS}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def fill_cache(files: dict[str, bytes] = DIFFUSERS, commit: str = COMMIT) -> Path:
    """Hugging Face's cache with a snapshot, as its own library lays it out."""
    repository = Path(os.environ["HF_HOME"]) / "hub" / "models--BAAI--AltDiffusion"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    for name, data in files.items():
        blob = repository / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        path = repository / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(blob, path.parent))
    return repository


def has(folder: Path, files: dict[str, bytes]) -> bool:
    return all(
        (folder / name).read_bytes() == data and not (folder / name).is_symlink() for name, data in files.items()
    )


@pytest.mark.parametrize("address", ["/models", "/models/", f"/models/{SPEC.name}"])
def test_a_mirror_is_a_folder_of_files(plain: HubServer, folder: Path, address: str) -> None:
    fetch(SPEC, folder, source=plain.url + address)
    assert has(folder, FLAGAI)


def test_the_mirror_of_the_environment_goes_first(
    plain: HubServer, huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_MIRROR", plain.url + "/models")
    fetch(SPEC, folder)
    assert has(folder, FLAGAI) and huggingface.requests == []


@pytest.mark.fault(13)
def test_a_mirror_that_is_down_is_named_and_the_hubs_are_tried(
    huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_MIRROR", "http://127.0.0.1:9/models")
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert "is unavailable from mirror-" in caplog.text and "http://127.0.0.1:9/models" in caplog.text


@pytest.mark.fault(13)
def test_a_name_that_does_not_resolve_ends_with_every_attempt_listed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_MIRROR", "http://nowhere.invalid/models")
    with pytest.raises(HubUnavailableError) as caught:
        fetch(SPEC, folder)
    for word in ("nowhere.invalid", "mirror-", "baai (", "huggingface ("):
        assert word in str(caught.value)


def test_a_served_download_is_a_mirror_with_hashes(huggingface: HubServer, folder: Path, tmp_path: Path) -> None:
    """Whatever its layout: the record of the files is their list."""
    fetch(SPEC, folder)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        fetch(SPEC, tmp_path / "second", source=address)
        assert has(tmp_path / "second", DIFFUSERS)
        (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"!!!")
        with pytest.raises(HubUnavailableError, match="expected SHA-256"):
            fetch(SPEC, tmp_path / "third", source=address)
    finally:
        server.shutdown()
        server.server_close()


def test_a_mirror_without_files_says_what_it_looked_for(plain: HubServer, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has neither altdiff-manifest\.json nor config\.yaml"):
        fetch(SPEC, folder, source=plain.url + "/nothing")
    with pytest.raises(HubError, match="expected baai, huggingface, or the http"):
        fetch(SPEC, folder, source="ftp-mirror")
    with pytest.raises(HubUnavailableError, match="does not begin with http:// or https://"):
        fetch(SPEC, folder, source="ftp://mirror/models")


def test_the_checker_comes_from_a_mirror_too(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"checker"}
    with serve(files={f"/SafetyChecker/{name}": data for name, data in files.items()}) as server:
        fetch(SAFETY_CHECKER, tmp_path / "SafetyChecker", source=server.url)
    assert has(tmp_path / "SafetyChecker", files)


def test_equivalent_files_will_do(folder: Path) -> None:
    files = {"config.yaml": b"model: {}", "model.safetensors": b"weights", "tokenizer.json": b"{}"}
    with serve(files={f"/{name}": data for name, data in files.items()}) as server:
        fetch(SPEC, folder, source=server.url)
    assert has(folder, files)


def test_revisions_are_for_hugging_face(huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_MIRROR", "http://127.0.0.1:9/models")
    made = plan(SPEC, folder, revision="refs/pr/1")
    assert made.source.label == "huggingface"
    assert huggingface.requests[0].path.startswith(f"/{REPOSITORY}/resolve/refs/pr/1/")
    assert {file.remote.revision for file in made.files} == {COMMIT}
    with pytest.raises(HubError, match="revisions"):
        plan(SPEC, folder, source="http://127.0.0.1:9/models", revision="fp16")


@pytest.mark.fault(14)
def test_a_whole_snapshot_in_the_cache_works_offline(
    folder: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = fill_cache()
    before = sorted((path, path.lstat().st_mtime_ns) for path in repository.rglob("*"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert {record.revision for record in manifest.read(folder).values()} == {COMMIT}
    assert sorted((path, path.lstat().st_mtime_ns) for path in repository.rglob("*")) == before


@pytest.mark.fault(20)
def test_a_whole_snapshot_is_not_downloaded_again(huggingface: HubServer, folder: Path) -> None:
    fill_cache()
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS) and huggingface.requests == []


def test_single_cached_files_are_used(huggingface: HubServer, folder: Path) -> None:
    fill_cache({name: DIFFUSERS[name] for name in ("unet/diffusion_pytorch_model.bin", "model_index.json")})
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert not [path for path in huggingface.paths() if "unet/diffusion" in path]


def test_a_cache_of_another_commit_is_not_used(huggingface: HubServer, folder: Path) -> None:
    fill_cache({"unet/diffusion_pytorch_model.bin": DIFFUSERS["unet/diffusion_pytorch_model.bin"]}, commit="f" * 40)
    fetch(SPEC, folder)
    assert [path for path in huggingface.paths() if "unet" in path]


def test_a_damaged_cache_is_noticed(huggingface: HubServer, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    repository = fill_cache({"unet/diffusion_pytorch_model.bin": DIFFUSERS["unet/diffusion_pytorch_model.bin"]})
    (blob,) = (repository / "blobs").iterdir()
    blob.write_bytes(blob.read_bytes()[::-1])
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert "truncated or corrupt file" in caplog.text


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", LOADED)
def test_a_half_filled_cache_is_no_source(huggingface: HubServer, folder: Path, name: str) -> None:
    fill_cache({other: data for other, data in DIFFUSERS.items() if other != name})
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS)
    assert [path for path in huggingface.paths() if path.endswith(name)]


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", LOADED)
def test_a_file_that_the_loader_needs_comes_again_when_it_is_gone(
    huggingface: HubServer, folder: Path, name: str
) -> None:
    fetch(SPEC, folder)
    (folder / name).unlink()
    assert missing_files(SPEC, folder) != []
    fetch(SPEC, folder)
    assert has(folder, DIFFUSERS) and missing_files(SPEC, folder) == []


@pytest.mark.fault(14)
@pytest.mark.parametrize("gone", ["", "model-00002-of-00002.bin", "model.bin.index.json", "both"])
def test_shards_are_whole_when_all_are_there(huggingface: HubServer, folder: Path, gone: str) -> None:
    parts = {f"unet/diffusion_pytorch_{n}": b"x" for n in ("model-00001-of-00002.bin", "model-00002-of-00002.bin")}
    files = {name: data for name, data in DIFFUSERS.items() if name != "unet/diffusion_pytorch_model.bin"} | parts
    files["unet/diffusion_pytorch_model.bin.index.json"] = b"{}"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name in ("model-00002-of-00002.bin", "model.bin.index.json"):
        if gone in (name, "both"):
            (folder / f"unet/diffusion_pytorch_{name}").unlink()
    assert len(missing_files(SPEC, folder)) == {"": 0, "both": 2}.get(gone, 1)


@pytest.mark.fault(14)
def test_a_damaged_cache_offline_is_an_error(folder: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = fill_cache()
    blob = repository / "blobs" / hashlib.sha256(b"vae").hexdigest()
    blob.write_bytes(b"eav")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="truncated or corrupt file"):
        fetch(SPEC, folder)
    assert not (folder / "model_index.json").exists()
    assert issubclass(IntegrityError, HubError)


@pytest.mark.parametrize("variables", [{"HF_HUB_CACHE": "a"}, {"HF_HOME": "b"}, {"XDG_CACHE_HOME": "c"}, {}])
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places = {"HF_HUB_CACHE": "a", "HF_HOME": "b/hub", "XDG_CACHE_HOME": "c/huggingface/hub"}
    expected = next((places[name] for name in variables), "/home/me/.cache/huggingface/hub")
    assert environment.hf_cache() == Path(expected).absolute()


def test_an_address_that_ran_out_is_asked_for_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BAAI's addresses may hold for a while only; what has arrived is kept."""
    with serve(models={SPEC.name: FLAGAI}) as server:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", server.url)
        path = server.file_path(SPEC.name, "model.ckpt")
        server.faults[path] = [Fault(cut_at=20_000), Fault(status=403)]
        answers = iter(range(100))
        original = HubServer._download_code

        def with_signature(self: HubServer, question: dict[str, str]) -> dict[str, object]:
            answer = original(self, question)
            return {**answer, "url": f"{answer['url']}?signature={next(answers)}"}

        monkeypatch.setattr(HubServer, "_download_code", with_signature)
        fetch(SPEC, folder)
        assert server.ranges(path) == [None, "bytes=20000-", "bytes=20000-", "bytes=0-0"]
    assert has(folder, FLAGAI)


@pytest.mark.fault(137)
def test_the_label_of_a_mirror_tells_no_password(tmp_path: Path) -> None:
    """Nor is the mirror another one when its password changes, or a slash comes behind it."""
    wanted = Wanted(spec=SPEC, folder=tmp_path)
    spellings = (
        "http://h.example/m",
        "http://h.example/m/",
        "http://me:one@h.example/m",
        "http://me:two@h.example/m/?a",
    )
    assert len({find_sources(wanted, address, None)[0].label for address in spellings}) == 1
    assert (
        find_sources(wanted, "http://h.example/n", None)[0].label != find_sources(wanted, spellings[0], None)[0].label
    )


@pytest.mark.fault(127)
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"source": 5}, "source is 5: expected a text"),
        ({"revision": ["a"]}, r"revision is \['a'\]: expected a text"),
        ({"spec": SAFETY_CHECKER, "source": "huggingface"}, "SafetyChecker is not at huggingface. .*: baai"),
        ({"spec": SAFETY_CHECKER, "revision": "main"}, "SafetyChecker is not at a hub with revision 'main'. .*: baai"),
        ({"folder": Path("a\0b")}, r"a\\x00b has a zero byte in it"),
        ({"folder": "a\0b"}, r"a\\x00b has a zero byte in it"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_named(tmp_path: Path, arguments: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"spec": SPEC, "folder": tmp_path, **arguments}
    with pytest.raises(HubError, match=told):
        fetch(**given)
    if "folder" not in arguments:
        with pytest.raises(HubError, match=told):
            plan(**given)
