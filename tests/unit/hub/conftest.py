"""A clean environment and short waits for every test of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagai_altdiff.hub import client, environment

UNWANTED = ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_DOWNLOAD_TIMEOUT", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy")


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*environment.OFFLINE_VARIABLES, environment.MIRROR_VARIABLE, *UNWANTED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    closed = "http://127.0.0.1:9"
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", closed)
    monkeypatch.setenv("HF_ENDPOINT", closed)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.01)
