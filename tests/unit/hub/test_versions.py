"""A folder never holds two versions of a model, however its sources change between two runs or during one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flagai_altdiff.errors import HubError, HubUnavailableError
from flagai_altdiff.hub import disk, fetch, fetching, manifest, threads, verify
from flagai_altdiff.hub.disk import Digests
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.registry import MODELS
from tests.servers import COMMIT, Fault, HubServer, serve

SPEC = MODELS["AltDiffusion-m9"]
NAMES = ("config.yaml", "model.ckpt", "preprocessor_config.json", "sentencepiece.bpe.model")
PARTS = (
    "model_index.json",
    "tokenizer/sentencepiece.bpe.model",
    "text_encoder/pytorch_model.bin",
    "unet/config.json",
    "unet/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.bin",
)
OTHER_COMMIT = "f" * 40


def version(number: int, names: tuple[str, ...] = NAMES) -> dict[str, bytes]:
    """Files of one size each, whatever the version."""
    return {name: f"{name} of version {number}".encode() * 2000 for name in names}


def serve_as_mirror(files: Mapping[str, bytes], with_list: bool) -> dict[str, bytes]:
    records = [
        {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "source": "x"}
        for name, data in files.items()
    ]
    listed = {MANIFEST_NAME: json.dumps({"version": 1, "files": records}).encode()} if with_list else {}
    return {f"/{SPEC.name}/{name}": data for name, data in {**files, **listed}.items()}


@pytest.fixture(autouse=True)
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small files first, then the weights."""
    monkeypatch.setattr(threads.run_all, "__defaults__", (1,))


@pytest.fixture
def mirror() -> Iterator[HubServer]:
    with serve(files=serve_as_mirror(version(1), with_list=False)) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / SPEC.name


def versions_in(folder: Path, names: tuple[str, ...] = NAMES) -> set[str]:
    return {(folder / name).read_bytes().decode()[-1] for name in names if (folder / name).is_file()}


def without_validators(server: HubServer) -> None:
    """As BAAI's files come: nothing tells one content from another."""
    for path in server.files:
        server.always[path] = Fault(headers={"ETag": None})


def interrupt(server: HubServer, folder: Path) -> None:
    """A first attempt that brings all but the weights."""
    path = f"/{SPEC.name}/model.ckpt"
    question = [] if f"/{SPEC.name}/{MANIFEST_NAME}" in server.files else [server.always.get(path, Fault())]
    server.faults[path] = [*question, Fault(status=403)]
    with pytest.raises(HubUnavailableError):
        fetch(SPEC, folder, source=server.url)
    assert server.faults[path] == [] and len(list(folder.rglob("config.yaml"))) == 1


@pytest.mark.fault(123)
@pytest.mark.parametrize("with_list", [False, True])
@pytest.mark.parametrize("validators", [False, True])
def test_a_source_that_changes_between_two_runs_gives_one_version(
    mirror: HubServer, folder: Path, with_list: bool, validators: bool
) -> None:
    mirror.files = serve_as_mirror(version(1), with_list)
    if not validators:
        without_validators(mirror)
    interrupt(mirror, folder)
    mirror.files = serve_as_mirror(version(2), with_list)
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"2"}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_what_has_arrived_is_used_if_the_source_still_has_it(mirror: HubServer, folder: Path) -> None:
    interrupt(mirror, folder)
    mirror.requests.clear()
    fetch(SPEC, folder, source=mirror.url)
    assert mirror.ranges(f"/{SPEC.name}/config.yaml")[1:] == ["bytes=0-0"]  # HEAD, and the question


@pytest.mark.fault(123)
def test_without_any_identity_what_has_arrived_comes_again(mirror: HubServer, folder: Path) -> None:
    without_validators(mirror)
    interrupt(mirror, folder)
    mirror.requests.clear()
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"1"}
    assert None in [r.headers.get("range") for r in mirror.requests if "config" in r.path and r.method == "GET"]


@pytest.mark.fault(123)
@pytest.mark.parametrize("validators", [False, True])
def test_a_config_that_came_first_is_not_joined_to_later_weights(
    mirror: HubServer, folder: Path, validators: bool
) -> None:
    """The record of the first download binds the later one."""
    if not validators:
        without_validators(mirror)
    fetch(SPEC, folder, config_only=True, source=mirror.url)
    mirror.files = serve_as_mirror(version(2), with_list=False)
    with pytest.raises(HubError, match=r"expected SHA-256.*earlier download.*move .* away"):
        fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"1"} and not (folder / "model.ckpt").exists()


@pytest.mark.fault(123)
def test_a_config_of_a_list_that_changed_gives_way(mirror: HubServer, folder: Path) -> None:
    mirror.files = serve_as_mirror(version(1), with_list=True)
    fetch(SPEC, folder, config_only=True, source=mirror.url)
    mirror.files = serve_as_mirror(version(2), with_list=True)
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"2"}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_files_of_another_source_give_way(mirror: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={SPEC.name: version(1)}) as baai:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", baai.url)
        fetch(SPEC, folder, config_only=True)
    mirror.files = serve_as_mirror(version(2), with_list=False)
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"2"}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_files_of_another_layout_give_way(mirror: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of the first source would be taken before the second's own."""
    fetch(SPEC, folder, config_only=True, source=mirror.url)
    with serve(repositories={"BAAI/AltDiffusion-m9": version(2, PARTS)}) as huggingface:
        monkeypatch.setenv("HF_ENDPOINT", huggingface.url)
        fetch(SPEC, folder)
    assert versions_in(folder) == set() and versions_in(folder, PARTS) == {"2"}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_a_source_that_lacks_what_must_give_way_is_passed_over(mirror: HubServer, folder: Path) -> None:
    fetch(SPEC, folder, config_only=True, source=mirror.url)
    files = {f"/{name}": data for name, data in version(2).items() if name != "sentencepiece.bpe.model"}
    with serve(files=files) as other, pytest.raises(HubError, match=r"without sentencepiece"):
        fetch(SPEC, folder, source=other.url)
    assert versions_in(folder) == {"1"}


@pytest.mark.fault(123)
def test_a_branch_that_moves_gives_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(repositories={"BAAI/AltDiffusion-m9": version(1, PARTS)}) as huggingface:
        monkeypatch.setenv("HF_ENDPOINT", huggingface.url)
        fetch(SPEC, folder, config_only=True)
        huggingface.repositories["BAAI/AltDiffusion-m9"] = version(2, PARTS)
        fetch(SPEC, folder, revision=OTHER_COMMIT)
    assert versions_in(folder, PARTS) == {"2"}
    assert {record.revision for record in manifest.read(folder).values()} == {OTHER_COMMIT}


@pytest.mark.fault(123)
def test_what_two_commits_share_is_not_fetched_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes tell it; the record then names the version that the folder has."""
    files = version(1, PARTS)
    with serve(repositories={"BAAI/AltDiffusion-m9": files}) as huggingface:
        monkeypatch.setenv("HF_ENDPOINT", huggingface.url)
        fetch(SPEC, folder)
        (folder / "vae" / "diffusion_pytorch_model.bin").unlink()
        huggingface.requests.clear()
        fetch(SPEC, folder, revision=OTHER_COMMIT)
    assert not [path for path in huggingface.paths() if "unet/diffusion" in path]
    assert {record.revision for record in manifest.read(folder).values()} == {OTHER_COMMIT}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_a_source_that_changes_during_a_long_fetch_is_noticed(
    mirror: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RECHECK_S", 0.0)
    original = fetching._bring

    def bring(file: object, *rest: object) -> object:
        if getattr(file, "name", "") == "model.ckpt":
            mirror.files = serve_as_mirror(version(2), with_list=False)
        return original(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fetching, "_bring", bring)
    with pytest.raises(HubError, match="has changed at its source"):
        fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == set()
    monkeypatch.undo()
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"2"}


@pytest.mark.fault(123)
@pytest.mark.parametrize("steps", range(8))
def test_an_interruption_between_two_moves_leaves_no_mixed_model(
    mirror: HubServer, folder: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of version 1 give way to version 2; the process dies after so many steps."""
    mirror.files = serve_as_mirror(version(1), with_list=True)
    fetch(SPEC, folder, config_only=True, source=mirror.url)
    mirror.files = serve_as_mirror(version(2), with_list=True)
    left = [steps]

    def dying(original: object) -> object:
        def step(*arguments: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return original(*arguments)  # type: ignore[operator]

        return step

    for name in ("_set_aside", "_place"):
        monkeypatch.setattr(fetching, name, dying(getattr(fetching, name)))
    try:
        fetch(SPEC, folder, source=mirror.url)
    except KeyboardInterrupt:
        assert disk.missing_files(SPEC, folder)
    monkeypatch.undo()
    fetch(SPEC, folder, source=mirror.url)
    assert versions_in(folder) == {"2"}
    assert {check.state for check in verify(folder, SPEC)} == {"ok"}


@pytest.mark.fault(123)
def test_verify_notices_a_mixed_folder(mirror: HubServer, folder: Path) -> None:
    fetch(SPEC, folder, source=mirror.url)
    book = json.loads((folder / MANIFEST_NAME).read_text())
    for entry in book["files"]:
        if entry["name"] == "config.yaml":
            entry["source"] = "baai"
    (folder / MANIFEST_NAME).write_text(json.dumps(book))
    found = {check.name: check for check in verify(folder, SPEC) if check.state != "ok"}
    assert {name: check.state for name, check in found.items()} == {"config.yaml": "mixed"}
    assert "of baai, but the largest files are of mirror-" in found["config.yaml"].detail


def test_one_commit_is_one_version_wherever_it_came_from() -> None:
    assert manifest.version("huggingface", COMMIT) == manifest.version("huggingface-cache", COMMIT)
    assert manifest.version("huggingface", "main") != manifest.version("huggingface", "fp16")


@pytest.mark.fault(123)
def test_each_file_is_read_once_in_all_attempts(
    folder: Path, mirror: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes are not hashed again and again, not even by the next run."""
    mirror.files = serve_as_mirror(version(1), with_list=True)
    read: list[str] = []
    original = disk.digest

    def digest(path: Path) -> tuple[int, str]:
        read.append(os.path.relpath(path, folder))
        return original(path)

    monkeypatch.setattr(disk, "digest", digest)
    interrupt(mirror, folder)
    interrupt(mirror, folder)
    fetch(SPEC, folder, source=mirror.url)
    assert read == []
    (folder / "config.yaml").unlink()
    fetch(SPEC, folder, source=mirror.url)
    assert sorted(read) == ["model.ckpt", "preprocessor_config.json", "sentencepiece.bpe.model"]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    digests, path = Digests(), tmp_path / "a"
    path.write_bytes(b"one")
    first = digests.of(path)
    os.utime(path, ns=(1, 1))
    path.write_bytes(b"two")
    assert first == hashlib.sha256(b"one").hexdigest() and digests.of(path) == hashlib.sha256(b"two").hexdigest()
    assert digests.of(tmp_path / "b") is None
