"""``altdiff download`` and ``altdiff verify`` as a user types them, against hubs on this machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flagai_altdiff.cli import main
from flagai_altdiff.cli.common import say
from flagai_altdiff.hub import client
from flagai_altdiff.hub.names import MANIFEST_NAME
from tests.processes import take_ctrl_c
from tests.servers import Fault, HubServer, serve

NAME = "AltDiffusion-m18"
FILES = {"config.yaml": b"model: {}", "model.ckpt": bytes(50_000), "sentencepiece.bpe.model": b"pieces"}
CHECKER = {"config.json": b"{}", "pytorch_model.bin": b"checker"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    for name in (
        "FLAGAI_ALTDIFF_OFFLINE",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "FLAGAI_ALTDIFF_MIRROR",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    monkeypatch.chdir(tmp_path)
    with serve(models={NAME: FILES, "SafetyChecker": CHECKER}) as running:
        monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", running.url)
        yield running


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def run(*words: str, status: int = 0) -> None:
    assert main(list(words)) == status


def test_a_model_is_downloaded_with_its_checker_and_verified(
    server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run("download", NAME.lower())
    assert capsys.readouterr().out.split() == [f"checkpoints/{NAME}", "checkpoints/SafetyChecker"]
    run("verify", NAME)
    assert capsys.readouterr().out.count("ok ") == len(FILES)
    asked = len(server.requests)
    run("download", NAME)
    assert "complete" in capsys.readouterr().out and len(server.requests) == asked


def test_a_dry_run_says_what_would_come_and_writes_nothing(
    server: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    run("download", NAME, "--dry-run", "--no-safety-checker")
    text = capsys.readouterr().out
    for words in (f"from baai ({NAME})", "absent", "50.0 kB  model.ckpt", "3 of 3 files to fetch, 50.0 kB"):
        assert words in text
    assert not Path("checkpoints").exists()
    assert [path for path in server.paths() if path.startswith("/files/")] == []


def test_a_dry_run_knows_what_is_there(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("checkpoints") / NAME
    folder.mkdir(parents=True)
    (folder / "model.ckpt").write_bytes(FILES["model.ckpt"])
    run("download", NAME, "--dry-run", "--no-safety-checker")
    assert "present       50.0 kB  model.ckpt" in capsys.readouterr().out


def test_one_source_can_be_asked_for(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    run("download", NAME, "--source", "huggingface", "--no-safety-checker", status=1)
    assert "baai" not in capsys.readouterr().err
    assert server.requests == []
    run("download", NAME, "--source", f"{server.url}/files/100000", "--no-safety-checker")
    assert (Path("checkpoints") / NAME / "model.ckpt").read_bytes() == FILES["model.ckpt"]
    assert not [path for path in server.paths() if path.startswith("/api/")]
    run("download", "AltDiffusion", "--source", "somewhere", status=1)
    assert "expected baai, huggingface, or the http(s) address of a mirror" in capsys.readouterr().err


def test_a_missing_checker_is_no_failure(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    del server.models["SafetyChecker"]
    run("download", NAME)
    assert "safety checker could not be fetched" in capsys.readouterr().err


def test_verify_names_what_is_wrong(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    run("download", NAME, "--no-safety-checker")
    folder = Path("checkpoints") / NAME
    (folder / "model.ckpt").write_bytes(b"\x01" + FILES["model.ckpt"][1:])
    (folder / "config.yaml").write_bytes(b"model")
    (folder / "sentencepiece.bpe.model").unlink()
    (folder / "tokenizer.json").write_bytes(b"{}")
    capsys.readouterr()
    run("verify", NAME, status=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "wrong size    config.yaml",
        "wrong hash    model.ckpt",
        "missing       sentencepiece.bpe.model",
        "not recorded  tokenizer.json",
    ]
    assert "expected 9 bytes, there are 5" in lines[0]


def test_verify_records_what_nobody_knows(m18_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for path in m18_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    run("verify", str(folder), status=1)
    assert "--record" in capsys.readouterr().err
    run("verify", str(folder), "--record")
    run("verify", str(folder))
    assert "not recorded" not in capsys.readouterr().out
    run("verify", str(folder / "model.ckpt"), status=2)


@pytest.mark.fault(137)
@pytest.mark.parametrize("field", ["source", "revision"])
def test_what_a_record_says_is_shown_escaped_and_short(
    server: HubServer, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    run("download", NAME, "--no-safety-checker")
    path = Path("checkpoints") / NAME / MANIFEST_NAME
    book = json.loads(path.read_text())
    hostile = "\x1b[2J\x1b]0;owned\x07\u202e\nok            model.ckpt" + "A" * 1_000_000
    for entry in book["files"]:
        if entry["name"] != "model.ckpt":
            entry[field] = hostile
    path.write_text(json.dumps(book))
    capsys.readouterr()
    run("verify", NAME, status=1)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "mixed         config.yaml",
        "ok            model.ckpt",
        "mixed         sentencepiece.bpe.model",
    ]
    assert all(line.isprintable() and len(line) < 400 for line in lines) and "\\x1b[2J" in lines[0]


@pytest.mark.fault(137)
def test_a_line_is_printed_as_one_line_that_no_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    say("\x1b[31m\rno\n蓝色" + "A" * 1_000_000)
    out = capsys.readouterr().out
    assert out.startswith("\\x1b[31m\\rno\\n蓝色A") and out.count("\n") == 1 and len(out) < 9_000


@pytest.mark.fault(41)
@pytest.mark.parametrize(
    ("closed", "mode"), [("", 0), ("", 0o744), (NAME, 0), (NAME, 0o744), (f"{NAME}/unet", 0)], ids=str
)
def test_a_folder_that_may_not_be_entered_is_named(
    server: HubServer, capsys: pytest.CaptureFixture[str], closed: str, mode: int
) -> None:
    with tempfile.TemporaryDirectory() as root:  # pytest's own folders are closed to other users
        place = Path(root)
        (place / NAME / "unet").mkdir(parents=True)
        (place / NAME / "unet" / "config.json").write_bytes(b"{}")
        for folder in (place, *place.rglob("*")):
            folder.chmod(0o755)
        main(["doctor", "--model-dir", root])  # imports all that is needed
        (place / closed).chmod(mode)
        capsys.readouterr()
        with as_nobody():
            for words in (["download", NAME], ["verify", NAME], ["generate", "x", "--model", NAME]):
                run(*words, "--model-dir", root, status=1)
                assert re.search(f"error: .*{re.escape(root)}.*Permission denied", capsys.readouterr().err), words
            run("models", "--json", "--model-dir", root)
            known = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
            assert known[NAME]["missing"] is None and "Permission denied" in known[NAME]["error"]
            assert known["AltDiffusion-mini"]["missing"] == []
            run("doctor", "--model-dir", root, status=1)
            assert re.search(f"-> {re.escape(root)}.*Permission denied", capsys.readouterr().out)
        (place / closed).chmod(0o755)
    assert server.requests == []


def test_verify_says_that_there_is_nothing_to_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("verify", str(tmp_path), status=1)
    assert "nothing to check" in capsys.readouterr().err


def test_the_embedded_model_is_the_recorded_one(capsys: pytest.CaptureFixture[str]) -> None:
    """After a new training: remove its altdiff-manifest.json and call ``altdiff verify AltDiffusion-mini --record``."""
    run("verify", "AltDiffusion-mini")
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.fault(19)
def test_an_interrupted_download_exits_as_interrupted_and_goes_on(server: HubServer, tmp_path: Path) -> None:
    path = server.file_path(NAME, "model.ckpt")
    server.always[path] = Fault(pause_s=0.5)
    words = [sys.executable, "-m", "flagai_altdiff", "download", NAME, "--no-safety-checker"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=take_ctrl_c
    )
    until = time.monotonic() + 60
    while not any(part.stat().st_size for part in (tmp_path / "checkpoints").rglob("model.ckpt.part")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "what has arrived is kept" in process.communicate(timeout=10)[1]
    assert process.returncode == 130
    server.always.clear()
    run("download", NAME, "--no-safety-checker")
    assert (tmp_path / "checkpoints" / NAME / "model.ckpt").read_bytes() == FILES["model.ckpt"]
    assert (server.ranges(path)[-1] or "").startswith("bytes=")


def test_baai_has_no_revisions(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    run("download", NAME, "--source", "baai", "--revision", "fp16", status=1)
    assert "no revisions" in capsys.readouterr().err


def test_models_as_json_say_what_is_missing(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    run("download", NAME, "--no-safety-checker")
    capsys.readouterr()
    run("models", "--json")
    missing = {model["name"]: model["missing"] for model in json.loads(capsys.readouterr().out)}
    assert missing[NAME] == missing["AltDiffusion-mini"] == []
    assert "model.ckpt" in missing["AltDiffusion"]
