"""A clean environment and short waits for every test of the hub."""

from __future__ import annotations

import pytest

from flagai_altdiff.hub import client


@pytest.fixture(autouse=True)
def quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLAGAI_ALTDIFF_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    closed = "http://127.0.0.1:9"
    monkeypatch.setenv("FLAGAI_ALTDIFF_BAAI_ENDPOINT", closed)
    monkeypatch.setenv("HF_ENDPOINT", closed)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(client, "LONGEST_WAIT_S", 0.01)
