"""Whether somebody sees a bar."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flagai_altdiff.progress import bar_class, show_bars
from tests.servers import serve

ROOT = Path(__file__).parent.parent.parent
WITHOUT_CONSOLE = """
import sys
real, sys.stdout, sys.stderr = sys.stdout, None, None
from pathlib import Path
from flagai_altdiff.hub import fetch
from flagai_altdiff.registry import MODELS
fetch(MODELS["AltDiffusion"], Path(sys.argv[1]))
real.write("done")
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TERM", "HF_HUB_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.fault(107)
@pytest.mark.parametrize(
    ("stream", "seen"),
    [
        (Terminal(), True),
        (io.StringIO(), False),
        (None, False),
        (io.TextIOWrapper(io.BytesIO()), False),
        (SimpleNamespace(write=print), False),
    ],
    ids=["terminal", "text", "none", "file", "something with write"],
)
def test_where_bars_are_seen(stream: object, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert show_bars() is seen


def test_a_closed_stream_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert show_bars() is False


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("TERM", "dumb", False),
        ("TERM", "", True),
        ("TERM", os.fsdecode(b"\xff"), True),
        ("HF_HUB_DISABLE_PROGRESS_BARS", " yes", False),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "0", True),
        ("TQDM_DISABLE", "1", False),
    ],
)
def test_the_user_decides(name: str, value: str, seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv(name, value)
    assert show_bars() is seen


@pytest.mark.fault(107)
def test_a_notebook_shows_bars_although_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", ModuleType("ipykernel.zmqshell"))
    assert show_bars() is True
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert show_bars() is False


def test_a_bar_is_drawn_and_none_without_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with bar_class()(total=2, desc="a", disable=not show_bars()) as bar:
        bar.update(2)
    assert "2/2" in stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    with bar_class()(total=2, desc="a", disable=not show_bars()) as bar:
        bar.update(2)


@pytest.mark.fault(107)
def test_without_a_console_a_model_is_fetched(tmp_path: Path) -> None:
    files = {"config.yaml": b"model: {}", "model.ckpt": bytes(5_000), "sentencepiece.bpe.model": b"pieces"}
    with serve(models={"AltDiffusion": files}) as server:
        endpoints = {"FLAGAI_ALTDIFF_BAAI_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        words = [sys.executable, "-c", WITHOUT_CONSOLE, str(tmp_path / "model")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **endpoints}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("done", 0), done.stderr
