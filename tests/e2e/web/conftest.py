"""One server for all tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.web_server import Server, serving


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, script_environment: dict[str, str], m9_folder: Path
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, script_environment, "--models", f"AltDiffusion-mini,{m9_folder}", "--no-page") as running:
        yield running
