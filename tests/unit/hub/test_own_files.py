"""What is in a model's folder and not in our record stays, whatever its name and size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from flagai_altdiff.errors import FilesInTheWayError, HubError
from flagai_altdiff.hub import fetch, fetching, manifest, missing_files, plan, record_missing
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.registry import MODELS, SAFETY_CHECKER
from tests.servers import Fault, HubServer, serve

SPEC = MODELS["AltDiffusion-m9"]
FLAGAI = {
    "config.yaml": b"model: {}",
    "model.ckpt": bytes(50_000),
    "preprocessor_config.json": b"{}",
    "sentencepiece.bpe.model": b"pieces",
}
DIFFUSERS = {
    "model_index.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"pieces of HF",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": bytes(range(200)),
    "vae/diffusion_pytorch_model.bin": b"vae",
}
FINE_TUNE = {"config.yaml": b"model: {mine: true}", "model.ckpt": b"a fine-tune"}


@pytest.fixture
def baai(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FLAGAI}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(repositories={"BAAI/AltDiffusion-m9": DIFFUSERS}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / SPEC.name


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith((".", MANIFEST_NAME)))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def downloads(server: HubServer) -> list[str]:
    return [path for path in server.paths() if path.startswith("/files/") or "/resolve/" in path]


@pytest.mark.fault(122)
@pytest.mark.parametrize("weights", ["model.ckpt", "model.safetensors", "dreambooth_model.ckpt"])
def test_a_fine_tune_without_tokenizer_gets_the_tokenizer_only(baai: HubServer, folder: Path, weights: str) -> None:
    mine = {"config.yaml": FINE_TUNE["config.yaml"], weights: b"a fine-tune"}
    write(folder, mine)
    fetch(SPEC, folder)
    assert contents(folder) == mine | {"sentencepiece.bpe.model": b"pieces"}
    assert missing_files(SPEC, folder) == []
    assert list(manifest.read(folder)) == ["sentencepiece.bpe.model"]


@pytest.mark.fault(122)
def test_a_fine_tune_gets_the_tokenizer_from_another_layout_too(huggingface: HubServer, folder: Path) -> None:
    """A second model beside it would be loaded instead."""
    write(folder, FINE_TUNE)
    fetch(SPEC, folder)
    assert contents(folder) == FINE_TUNE | {"tokenizer/sentencepiece.bpe.model": b"pieces of HF"}
    assert missing_files(SPEC, folder) == []


@pytest.mark.fault(122)
@pytest.mark.parametrize(
    "mine",
    [
        {"config.yaml": b"mine"},
        {"model.ckpt": b"mine"},
        {"model.safetensors": b"mine", "sentencepiece.bpe.model": b"pieces"},
        {"config.yaml": b"mine", "sentencepiece.bpe.model": b"pieces"},
        {"sentencepiece.bpe.model": b"mine"},
        {"tokenizer.json": b"mine"},
        {"unet/diffusion_pytorch_model.bin": b"mine"},
        {"model_index.json": b"mine"},
    ],
    ids=lambda mine: "+".join(mine),
)
def test_half_a_model_of_the_users_stops_before_anything_comes(
    baai: HubServer, huggingface: HubServer, folder: Path, mine: dict[str, bytes]
) -> None:
    write(folder, mine)
    with pytest.raises(FilesInTheWayError) as caught:
        fetch(SPEC, folder)
    assert contents(folder) == mine
    assert str(folder) in str(caught.value) and next(iter(mine)) in str(caught.value)
    assert "move them away" in str(caught.value) and "--model-dir" in str(caught.value)
    assert downloads(baai) == [] and [path for path in downloads(huggingface) if "model_index" not in path] == []
    with pytest.raises(FilesInTheWayError):
        plan(SPEC, folder)


@pytest.mark.fault(122)
def test_an_empty_file_is_the_users_too(baai: HubServer, folder: Path) -> None:
    write(folder, {"model.ckpt": b""})
    with pytest.raises(FilesInTheWayError, match=r"model\.ckpt"):
        fetch(SPEC, folder, source="baai")
    assert contents(folder) == {"model.ckpt": b""}


@pytest.mark.fault(122)
def test_a_part_of_another_hash_is_the_users(huggingface: HubServer, folder: Path) -> None:
    mine = DIFFUSERS | {"unet/diffusion_pytorch_model.bin": bytes(reversed(range(200)))}
    del mine["vae/diffusion_pytorch_model.bin"]
    write(folder, mine)
    with pytest.raises(FilesInTheWayError, match="unet/diffusion_pytorch_model"):
        fetch(SPEC, folder)
    assert contents(folder) == mine


@pytest.mark.fault(122)
def test_what_does_not_matter_stays_and_stops_nothing(baai: HubServer, folder: Path) -> None:
    mine = {"preprocessor_config.json": b"the user's own", "notes.txt": b"mine", "README.md": b"mine", "lora.pt": b"x"}
    write(folder, mine)
    baai.models[SPEC.name]["notes.txt"] = b"a hub's"
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI | mine


@pytest.mark.fault(122)
@pytest.mark.parametrize("how", ["changed", "shorter", "recorded by hand"])
def test_what_was_changed_since_it_came_is_the_users(baai: HubServer, folder: Path, how: str) -> None:
    fetch(SPEC, folder)
    mine = {"changed": bytes(49_999) + b"!", "shorter": b"mine", "recorded by hand": b"mine"}[how]
    (folder / "model.ckpt").write_bytes(mine)
    if how == "recorded by hand":
        (folder / MANIFEST_NAME).unlink()
        record_missing(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(FilesInTheWayError, match=r"model\.ckpt"):
        fetch(SPEC, folder)
    assert (folder / "model.ckpt").read_bytes() == mine
    write(folder, {"config.yaml": b"mine"})
    (folder / "sentencepiece.bpe.model").unlink()
    fetch(SPEC, folder)
    assert (folder / "model.ckpt").read_bytes() == mine and (folder / "config.yaml").read_bytes() == b"mine"
    assert (folder / "sentencepiece.bpe.model").read_bytes() == b"pieces"


@pytest.mark.fault(122)
@pytest.mark.parametrize("name", ["model.ckpt", "config.yaml", "sentencepiece.bpe.model"])
def test_what_appears_while_files_come_is_not_replaced(baai: HubServer, folder: Path, name: str) -> None:
    """Between the plan and the move, a program of the user's writes there."""
    original = fetching._put_in_place

    def late(*arguments: object) -> None:
        write(folder, {name: b"mine"})
        original(*arguments)  # type: ignore[arg-type]

    fetching._put_in_place = late  # type: ignore[assignment]
    try:
        with pytest.raises(HubError, match="files of yours"):
            fetch(SPEC, folder)
    finally:
        fetching._put_in_place = original
    assert (folder / name).read_bytes() == b"mine"
    assert not (folder / "config.yaml").exists() or name == "config.yaml"
    (folder / name).unlink()
    baai.requests.clear()
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI
    assert set(baai.ranges("/files/100000/model.ckpt")) <= {"bytes=0-0"}  # nothing comes twice


@pytest.mark.fault(122)
def test_an_outdated_file_of_ours_that_the_user_changes_meanwhile_stays(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder, config_only=True)
    with serve(files={f"/{name}": data[:-1] + b"2" for name, data in FLAGAI.items()}) as mirror:
        original = fetching._put_in_place

        def late(*arguments: object) -> None:
            write(folder, {"config.yaml": b"mine"})
            original(*arguments)  # type: ignore[arg-type]

        fetching._put_in_place = late  # type: ignore[assignment]
        try:
            with pytest.raises(HubError, match=r"config\.yaml"):
                fetch(SPEC, folder, source=mirror.url)
        finally:
            fetching._put_in_place = original
    assert (folder / "config.yaml").read_bytes() == b"mine"
    assert not (folder / "model.ckpt").exists()


@pytest.mark.fault(122)
def test_a_link_of_the_users_to_his_weights_is_kept(baai: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(FINE_TUNE["model.ckpt"])
    write(folder, {"config.yaml": b"mine"})
    (folder / "model.ckpt").symlink_to(tmp_path / "disk")
    fetch(SPEC, folder)
    assert os.readlink(folder / "model.ckpt") == str(tmp_path / "disk")
    assert (tmp_path / "disk").read_bytes() == FINE_TUNE["model.ckpt"]
    assert (folder / "sentencepiece.bpe.model").read_bytes() == b"pieces"


@pytest.mark.fault(122)
def test_a_folder_of_the_users_with_a_name_like_ours_stays(baai: HubServer, folder: Path) -> None:
    write(folder, {".incoming-photos/a.png": b"mine", ".incoming-old": b"mine"})
    baai.always["/files/100000/model.ckpt"] = Fault(status=403)
    with pytest.raises(HubError):
        fetch(SPEC, folder)
    baai.always.clear()
    fetch(SPEC, folder)
    assert (folder / ".incoming-photos" / "a.png").read_bytes() == (folder / ".incoming-old").read_bytes() == b"mine"
    assert not (folder / ".incoming-baai").exists()


@pytest.mark.fault(122)
def test_the_checker_of_the_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"config.json": b"mine"}
    write(tmp_path / "SafetyChecker", mine)
    with serve(models={"SafetyChecker": {"config.json": b"{}", "pytorch_model.bin": b"checker"}}) as server:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", server.url)
        with pytest.raises(FilesInTheWayError, match=r"config\.json"):
            fetch(SAFETY_CHECKER, tmp_path / "SafetyChecker")
    assert contents(tmp_path / "SafetyChecker") == mine


@pytest.mark.fault(122)
def test_a_checker_that_the_user_put_there_stops_nothing(baai: HubServer, folder: Path) -> None:
    mine = {"safety_checker/config.json": b"mine", "safety_checker/model.safetensors": b"mine"}
    write(folder, mine)
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI | mine
