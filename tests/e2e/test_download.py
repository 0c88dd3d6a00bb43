"""AutoLoader against hubs on this machine: what is missing is fetched once, what is there is never asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from flagai_altdiff import AutoLoader, Predictor
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import HubUnavailableError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import client
from flagai_altdiff.hub.names import LOCK_NAME, MANIFEST_NAME
from flagai_altdiff.loading import load_model
from tests import tiny
from tests.servers import serve

NAME = "AltDiffusion-m18"


def files_below(folder: Path) -> dict[str, bytes]:
    """The files of a model, but for the books that downloads keep."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST_NAME, LOCK_NAME))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.fixture
def checker(tmp_path: Path) -> Mapping[str, bytes]:
    return files_below(tiny.write_safety_checker(tmp_path / "made" / "SafetyChecker", 2.0))


@pytest.fixture(autouse=True)
def hubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "FLAGAI_ALTDIFF_OFFLINE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_TOKEN",
        "HTTP_PROXY",
        "http_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.01)
    point_to(monkeypatch, "http://127.0.0.1:9", "http://127.0.0.1:9")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def point_to(monkeypatch: pytest.MonkeyPatch, baai: str, huggingface: str) -> None:
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", baai)
    monkeypatch.setenv("HF_ENDPOINT", huggingface)


def draws(loader: AutoLoader) -> None:
    result = Predictor(loader.get_model()).predict_generate_images("a cat", n_samples=1, ddim_steps=2, H=64, W=64)
    assert len(result.paths) == 1


def test_a_fresh_start_downloads_once_and_draws(
    m18_folder: Path, checker: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(models={NAME: files_below(m18_folder), "SafetyChecker": checker}) as server:
        point_to(monkeypatch, server.url, "http://127.0.0.1:9")
        loader = AutoLoader(task_name="text2img", model_name=NAME, model_dir="./checkpoints")
        draws(loader)
        assert loader.get_model().safety_checker is not None
        asked = len(server.requests)
        assert asked > 0
        draws(AutoLoader(task_name="text2img", model_name=NAME.lower(), model_dir="checkpoints"))
        assert len(server.requests) == asked
    assert {p.name for p in Path("checkpoints").iterdir()} == {NAME, "SafetyChecker"}
    assert files_below(Path("checkpoints") / NAME) == files_below(m18_folder)


def test_hugging_face_is_the_second_source(
    m18_folder: Path, checker: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(m18_folder, tmp_path / "made" / "diffusers", "diffusers")
    repository = files_below(tmp_path / "made" / "diffusers") | {f"safety_checker/{n}": b for n, b in checker.items()}
    with serve(repositories={f"BAAI/{NAME}": repository}) as server:
        point_to(monkeypatch, "http://127.0.0.1:9", server.url)
        loader = AutoLoader(task_name="text2img", model_name=NAME)
        draws(loader)
    assert loader.get_model().safety_checker is not None
    assert (Path("checkpoints") / NAME / "model_index.json").is_file()


def test_a_checker_that_cannot_be_had_is_a_loud_warning(
    m18_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(models={NAME: files_below(m18_folder)}) as server:
        point_to(monkeypatch, server.url, "http://127.0.0.1:9")
        with caplog.at_level(logging.WARNING):
            draws(AutoLoader(task_name="text2img", model_name=NAME))
    assert "NOT checked" in caplog.text


def test_a_checker_that_is_required_is_an_error(m18_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={NAME: files_below(m18_folder)}) as server:
        point_to(monkeypatch, server.url, "http://127.0.0.1:9")
        with pytest.raises(ModelNotFoundError, match="SafetyChecker"):
            load_model(NAME, safety_checker=True)


def test_no_source_at_all_lists_every_attempt() -> None:
    with pytest.raises(HubUnavailableError) as error:
        load_model(NAME)
    for word in ("baai", "huggingface", "HF_ENDPOINT", "checkpoints"):
        assert word in str(error.value)


def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        load_model(NAME)


def test_local_files_never_touch_the_network(m18_folder: Path, no_network: None) -> None:
    """Nor does a folder whose tokenizer lies in a sibling folder."""
    folder = Path("checkpoints") / NAME
    folder.mkdir(parents=True)
    for name in ("config.yaml", "model.ckpt"):
        (folder / name).write_bytes((m18_folder / name).read_bytes())
    beside = Path("checkpoints") / "AltCLIP-XLMR-L-m18"
    beside.mkdir()
    (beside / "sentencepiece.bpe.model").write_bytes((m18_folder / "sentencepiece.bpe.model").read_bytes())
    draws(AutoLoader(task_name="text2img", model_name=NAME))


def test_config_only_fetches_no_weights(m18_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={NAME: files_below(m18_folder)}) as server:
        point_to(monkeypatch, server.url, "http://127.0.0.1:9")
        loader = AutoLoader(task_name="text2img", model_name=NAME, only_download_config=True)
    tokenizer = loader.get_tokenizer()
    assert tokenizer is not None and tokenizer("a cat")["input_ids"][0] == 0
    assert not (Path("checkpoints") / NAME / "model.ckpt").exists()
