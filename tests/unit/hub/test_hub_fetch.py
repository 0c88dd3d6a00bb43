"""From a model's spec to a complete folder, over several sources."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flagai_altdiff import hub
from flagai_altdiff.errors import (
    DiskError,
    FilesInTheWayError,
    HubError,
    HubUnavailableError,
    ModelNotFoundError,
    OfflineError,
)
from flagai_altdiff.hub import fetch, fetching, missing_files, sources
from flagai_altdiff.hub.names import LOCK_NAME, MANIFEST_NAME
from flagai_altdiff.registry import MODELS, SAFETY_CHECKER, FileSpec
from tests.servers import Fault, HubServer, serve

SPEC = MODELS["AltDiffusion-m18"]
WEIGHTS = bytes(i * i % 253 for i in range(200_000))
FLAGAI = {
    "config.yaml": b"model: {}",
    "model.ckpt": WEIGHTS,
    "preprocessor_config.json": b"{}",
    "sentencepiece.bpe.model": b"pieces",
    "special_tokens_map.json": b"{}",
}
DIFFUSERS = {
    "model_index.json": b"{}",
    "tokenizer/sentencepiece.bpe.model": b"pieces",
    "text_encoder/pytorch_model.bin": b"text",
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.bin": WEIGHTS,
    "vae/diffusion_pytorch_model.bin": b"vae",
}
CHECKER = {"config.json": b"{}", "pytorch_model.bin": b"checker", "preprocessor_config.json": b"{}"}
CKPT = "/files/100000/model.ckpt"


@pytest.fixture
def baai(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(models={SPEC.name: FLAGAI, "SafetyChecker": CHECKER}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


@pytest.fixture
def huggingface(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve(repositories={"BAAI/AltDiffusion-m18": DIFFUSERS}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / SPEC.name


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, but for the books that downloads keep."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST_NAME, LOCK_NAME))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def staging(folder: Path, hub_name: str) -> Path:
    """Where the files of a hub are gathered."""
    return fetching.plan(replace(SPEC, sources=((hub_name, dict(SPEC.sources)[hub_name]),)), folder).staging


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_every_source_in_the_registry_is_a_hub() -> None:
    assert {source for spec in (*MODELS.values(), SAFETY_CHECKER) for source, _ in spec.sources} <= set(sources.HUBS)


def test_the_first_source_fills_the_folder(baai: HubServer, huggingface: HubServer, folder: Path) -> None:
    assert fetch(SPEC, folder) == folder
    assert contents(folder) == FLAGAI
    assert missing_files(SPEC, folder) == []
    assert huggingface.requests == []


def test_a_complete_folder_asks_nothing(baai: HubServer, folder: Path) -> None:
    write(folder, dict.fromkeys(FLAGAI, b"the user's own"))
    fetch(SPEC, folder)
    assert baai.requests == []
    assert contents(folder)["config.yaml"] == b"the user's own"


def test_the_checker_comes_the_same_way(baai: HubServer, folder: Path) -> None:
    fetch(SAFETY_CHECKER, folder)
    assert contents(folder) == CHECKER


def test_only_what_is_missing_is_downloaded(baai: HubServer, folder: Path) -> None:
    write(folder, {name: data for name, data in FLAGAI.items() if name != "config.yaml"})
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI
    assert [path for path in baai.paths() if path.startswith("/files/")] == ["/files/100000/config.yaml"]


@pytest.mark.fault(122)
def test_a_file_of_another_size_is_never_replaced(baai: HubServer, folder: Path) -> None:
    """A download that was broken off, or the user's own: nobody here can tell."""
    write(folder, {"model.ckpt": WEIGHTS[:1000]})
    with pytest.raises(FilesInTheWayError, match=r"model\.ckpt.*move them away \(mkdir .* && mv .*--model-dir"):
        fetch(SPEC, folder)
    assert contents(folder) == {"model.ckpt": WEIGHTS[:1000]}
    assert [path for path in baai.paths() if path.startswith("/files/")] == []


def test_weights_beside_the_models_own_are_left_there(baai: HubServer, folder: Path) -> None:
    baai.models[SPEC.name] |= {"extra.bin": b"x", "pytorch_model.bin": b"x", "model-ema.ckpt": b"x"}
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI


def test_the_next_source_is_used_when_one_is_down(
    huggingface: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS
    assert missing_files(SPEC, folder) == []
    assert [record.levelno for record in caplog.records if "is unavailable from baai" in record.message] == [
        logging.WARNING
    ]


def test_sources_are_not_mixed(baai: HubServer, huggingface: HubServer, folder: Path) -> None:
    baai.always[CKPT] = Fault(status=403)
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS


@pytest.mark.fault(9)
def test_a_file_with_the_wrong_hash_sends_us_to_the_next_source(
    baai: HubServer, huggingface: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = replace(SPEC, sources=(("huggingface", "BAAI/AltDiffusion-m18"), ("baai", SPEC.name)))
    path = f"/BAAI/AltDiffusion-m18/resolve/{SPEC.revision}/unet/diffusion_pytorch_model.bin"
    huggingface.always[path] = Fault(body=WEIGHTS[::-1])
    fetch(spec, folder)
    assert contents(folder) == FLAGAI
    assert "expected SHA-256" in caplog.text


@pytest.mark.fault(26)
def test_the_token_is_sent_to_hugging_face_only(
    baai: HubServer, huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    baai.always[CKPT] = Fault(status=403)
    fetch(SPEC, folder)
    assert len(huggingface.requests) == len(DIFFUSERS) + 1
    assert {request.headers.get("authorization") for request in huggingface.requests} == {"Bearer hf_secret"}
    assert {request.headers.get("authorization") for request in baai.requests} == {None}


def test_an_interrupted_fetch_leaves_the_folder_untouched_and_goes_on(baai: HubServer, folder: Path) -> None:
    baai.always[CKPT] = Fault(status=503)
    baai.faults[CKPT] = [Fault(cut_at=150_000)]
    with pytest.raises(HubUnavailableError):
        fetch(SPEC, folder)
    assert {name.split("/")[0] for name in contents(folder)} == {".incoming-baai"}
    baai.always.clear()
    baai.requests.clear()
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI
    assert baai.ranges(CKPT)[0] not in (None, "bytes=0-") and len(baai.ranges(CKPT)) == 1
    others = {path for path in baai.paths() if path.startswith("/files/")} - {CKPT}
    assert {tuple(baai.ranges(path)) for path in others} == {("bytes=0-0",)}  # whether they are still what had come


@pytest.mark.fault(19)
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(baai: HubServer, folder: Path) -> None:
    baai.always[CKPT] = Fault(pause_s=0.05)
    code = (
        "import sys; from pathlib import Path; from flagai_altdiff.hub import fetch; "
        f"from flagai_altdiff.registry import MODELS; fetch(MODELS[{SPEC.name!r}], Path(sys.argv[1]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    part = folder / ".incoming-baai" / "model.ckpt.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size > 60_000):
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (folder / "model.ckpt").exists()
    baai.always.clear()
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI
    assert baai.ranges(CKPT)[1] is not None


def test_an_interruption_while_files_are_moved_is_mended(huggingface: HubServer, folder: Path) -> None:
    write(
        staging(folder, "huggingface"), {name: data for name, data in DIFFUSERS.items() if not name.startswith("unet/")}
    )
    write(folder, {name: data for name, data in DIFFUSERS.items() if name.startswith("unet/")})
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS
    assert [path for path in huggingface.paths() if "resolve" in path] == []


def test_the_file_that_names_the_layout_is_moved_last(
    huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    original = os.link

    def record(source: Path, target: Path, **options: bool) -> None:
        moved.append(Path(target).name)
        original(source, target, **options)

    monkeypatch.setattr(os, "link", record)
    fetch(SPEC, folder)
    assert moved[-1] == "model_index.json"


def test_config_only_leaves_the_weights_out(baai: HubServer, folder: Path) -> None:
    fetch(SPEC, folder, config_only=True)
    assert set(contents(folder)) == set(FLAGAI) - {"model.ckpt"}
    assert CKPT not in baai.paths()
    requests = len(baai.requests)
    fetch(SPEC, folder, config_only=True)
    assert len(baai.requests) == requests
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI


def test_config_only_from_hugging_face_can_be_completed(huggingface: HubServer, folder: Path) -> None:
    fetch(SPEC, folder, config_only=True)
    assert set(contents(folder)) == {name for name in DIFFUSERS if not name.endswith(".bin")}
    assert missing_files(SPEC, folder, config_only=True) == []
    assert missing_files(SPEC, folder) == ["text_encoder/*.safetensors", "unet/*.safetensors", "vae/*.safetensors"]
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS


def test_a_lesser_file_that_the_hub_lost_is_done_without(
    baai: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    baai.faults["/api/searchModelFileByName"] = [Fault(body=str([*FLAGAI, "readme.txt"]).encode())]
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI
    assert "goes on without readme.txt" in caplog.text


@pytest.mark.fault(24)
def test_a_needed_file_that_the_hub_lost_ends_the_source(baai: HubServer, huggingface: HubServer, folder: Path) -> None:
    baai.faults["/api/searchModelFileByName"] = [Fault(body=str(list(FLAGAI)).encode())]
    del baai.models[SPEC.name]["sentencepiece.bpe.model"]
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS
    assert CKPT not in baai.paths()


def test_an_incomplete_list_is_refused_before_anything_is_downloaded(baai: HubServer, folder: Path) -> None:
    del baai.models[SPEC.name]["model.ckpt"]
    with pytest.raises(HubError, match=r"without model\.ckpt"):
        fetch(SPEC, folder)
    assert contents(folder) == {}
    assert len(baai.requests) == 2


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "CONFIG.YAML", "a\\b", ".incoming-baai/x"])
def test_dangerous_names_end_the_source_before_anything_is_downloaded(baai: HubServer, folder: Path, name: str) -> None:
    baai.models[SPEC.name][name] = b"escaped"
    with pytest.raises(HubUnavailableError, match="refused the file name"):
        fetch(SPEC, folder)
    assert contents(folder) == {}


@pytest.mark.fault(20)
@pytest.mark.parametrize("link", ["STAGING", "STAGING/unet", "unet"])
def test_planted_links_are_not_followed(huggingface: HubServer, folder: Path, tmp_path: Path, link: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    planted = folder / link.replace("STAGING", staging(folder, "huggingface").name)
    planted.parent.mkdir(parents=True)
    planted.symlink_to(outside)
    with pytest.raises(HubUnavailableError, match="symbolic link"):
        fetch(SPEC, folder)
    assert list(outside.iterdir()) == []


@pytest.mark.fault(13)
def test_when_all_sources_fail_each_attempt_is_listed(huggingface: HubServer, folder: Path) -> None:
    huggingface.always[f"/api/models/BAAI/AltDiffusion-m18/tree/{SPEC.revision}"] = Fault(status=403)
    with pytest.raises(HubUnavailableError) as caught:
        fetch(SPEC, folder)
    text = str(caught.value)
    assert (
        "baai (AltDiffusion-m18): http://127.0.0.1:9/api/searchModleByName: connection failed: Connection refused"
        in text
    )
    assert f"huggingface (BAAI/AltDiffusion-m18 at {SPEC.revision})" in text and "HTTP 403" in text
    assert "model.ckpt" in text and str(folder) in text and "HF_ENDPOINT" in text


def test_a_model_that_no_source_has(baai: HubServer, huggingface: HubServer, folder: Path) -> None:
    baai.models.clear()
    huggingface.repositories.clear()
    with pytest.raises(ModelNotFoundError, match="there is no model 'AltDiffusion-m18'"):
        fetch(SPEC, folder)


def test_an_embedded_model_is_not_looked_for_elsewhere(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.yaml, model\.safetensors.*no hub"):
        fetch(MODELS["AltDiffusion-mini"], folder)


@pytest.mark.fault(16)
def test_a_full_disk_does_not_try_another_source(
    baai: HubServer, huggingface: HubServer, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(HubError) as caught:
        fetch(SPEC, folder)
    assert caught.value.errno is not None
    assert huggingface.requests == []


@pytest.mark.fault(15)
def test_a_disk_that_is_too_small_does_not_try_another_source(
    baai: HubServer, huggingface: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskError, match="Make room") as caught:
        fetch(SPEC, folder)
    assert caught.value.errno == errno.ENOSPC and huggingface.requests == []


@pytest.mark.fault(14)
@pytest.mark.parametrize("variable", hub.OFFLINE_VARIABLES)
@pytest.mark.parametrize("value", ["1", "on", "Yes", "TRUE"])
def test_offline_opens_no_socket(folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv(variable, value)
    write(folder, {"config.yaml": b"model: {}"})
    with pytest.raises(OfflineError, match=rf"model\.ckpt, sentencepiece\.bpe\.model.*{variable}={value}"):
        fetch(SPEC, folder)
    write(folder, FLAGAI)
    assert fetch(SPEC, folder) == folder


@pytest.mark.parametrize("value", ["", "0", "off", "no", "false"])
def test_other_values_do_not_mean_offline(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub.offline_switch() is None


def test_missing_files_of_the_flagai_layout(folder: Path) -> None:
    assert missing_files(SPEC, folder) == [file.name for file in SPEC.files]
    write(
        folder,
        {"config.yaml": b"model: {}", "model.ckpt": b"", "preprocessor_config.json": b"{}", "tokenizer.json": b"{}"},
    )
    assert missing_files(SPEC, folder) == ["model.ckpt"]
    write(folder, {"model.safetensors": b"x"})
    assert missing_files(SPEC, folder) == []


def test_missing_files_knows_sizes_and_one_layout_is_enough(folder: Path) -> None:
    spec = replace(SPEC, files=(FileSpec(name="config.yaml"), FileSpec(name="model.ckpt", size_bytes=10)))
    write(folder, {"config.yaml": b"model: {}", "model.ckpt": b"short"})
    assert missing_files(spec, folder) == ["model.ckpt"]
    write(folder, {"model.ckpt": b"0123456789", "model_index.json": b"{}"})
    assert missing_files(spec, folder) == []


def test_the_hub_is_light_until_something_is_asked() -> None:
    code = "import sys, flagai_altdiff.hub as h; sys.exit(len({'torch', 'requests', 'tqdm', 'ssl'} & set(sys.modules)))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_a_model_can_be_a_key() -> None:
    assert {spec: name for name, spec in MODELS.items()}[SPEC] == SPEC.name


@pytest.mark.parametrize("name", ["._model.ckpt", ".DS_Store", ".cache/x.json"])
def test_hidden_files_are_not_fetched(baai: HubServer, folder: Path, name: str) -> None:
    """macOS leaves such files beside each real one where it packs or copies a folder."""
    baai.models[SPEC.name][name] = b"hidden"
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI


def test_hidden_weights_do_not_make_a_model(folder: Path) -> None:
    write(folder, {"config.yaml": b"model: {}", "._model.ckpt": WEIGHTS, "tokenizer.json": b"{}"})
    assert missing_files(SPEC, folder) == ["model.ckpt"]


@pytest.mark.fault(106)
def test_answers_with_half_characters_are_refused_or_harmless(
    baai: HubServer, huggingface: HubServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    baai.faults["/api/searchModelFileByName"] = [Fault(body=b'["config.yaml", "model\\ud800.ckpt"]')]
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS
    assert "refused the file name 'model\\ud800.ckpt'" in caplog.text
    caplog.text.encode()


@pytest.mark.fault(106)
def test_an_answer_may_begin_with_a_byte_order_mark(baai: HubServer, folder: Path) -> None:
    baai.faults["/api/searchModelFileByName"] = [Fault(body=b"\xef\xbb\xbf" + str(list(FLAGAI)).encode())]
    fetch(SPEC, folder)
    assert contents(folder) == FLAGAI


@pytest.mark.parametrize("size", [10**30, -1, 1.5, True, "7", None])
def test_a_size_beyond_belief_is_refused(baai: HubServer, huggingface: HubServer, folder: Path, size: object) -> None:
    answer = json.dumps({"code": "20000", "url": f"{baai.url}/x", "size": size}).encode()
    baai.always["/api/downloadCode"] = Fault(body=answer)
    fetch(SPEC, folder)
    assert contents(folder) == DIFFUSERS
