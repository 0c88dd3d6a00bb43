"""Tiny checkpoints for every test, made once a session, and a network that nothing can reach."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from tests import tiny
from tests.processes import Nursery, nursery

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tiny tensors: more threads only wait for each other. The recipe's processes choose a number of their own."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Commands that run in this process choose what is told; the next test begins as a program does."""
    yield
    logging.getLogger("flagai_altdiff").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def m9_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FlagAI folder of the AltDiffusion / m9 shape; read only."""
    return tiny.write_flagai_folder(tmp_path_factory.mktemp("m9") / "AltDiffusion-m9", "m9")


@pytest.fixture(scope="session")
def m18_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FlagAI folder of the m18 shape; read only."""
    return tiny.write_flagai_folder(tmp_path_factory.mktemp("m18") / "AltDiffusion-m18", "m18")


@pytest.fixture(params=["m9", "m18"])
def variant(request: pytest.FixtureRequest) -> str:
    """Both released shapes in turn."""
    return str(request.param)


@pytest.fixture
def variant_folder(variant: str, request: pytest.FixtureRequest) -> Path:
    """The FlagAI folder of the variant; read only."""
    folder: Path = request.getfixturevalue(f"{variant}_folder")
    return folder


@pytest.fixture(scope="session")
def _m9_loaded(m9_folder: Path) -> LatentDiffusion:
    return load_path(m9_folder)


@pytest.fixture(scope="session")
def _m18_loaded(m18_folder: Path) -> LatentDiffusion:
    return load_path(m18_folder)


def _as_loaded(model: LatentDiffusion) -> LatentDiffusion:
    model.safety_checker = None
    return model


@pytest.fixture
def m9(_m9_loaded: LatentDiffusion) -> LatentDiffusion:
    """A tiny m9; its weights must stay as they are."""
    return _as_loaded(_m9_loaded)


@pytest.fixture
def m18(_m18_loaded: LatentDiffusion) -> LatentDiffusion:
    """A tiny m18; its weights must stay as they are."""
    return _as_loaded(_m18_loaded)


@pytest.fixture
def model(variant: str, request: pytest.FixtureRequest) -> LatentDiffusion:
    """Both tiny models in turn; their weights must stay as they are."""
    loaded: LatentDiffusion = request.getfixturevalue(variant)
    return loaded


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of a socket is an error."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("a socket was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="session")
def fresh_process(script_environment: dict[str, str]) -> Iterator[Nursery]:
    """Runs scripts in processes of their own that have torch and the package loaded."""
    with nursery(script_environment) as process:
        yield process


@pytest.fixture(scope="session")
def script_environment() -> dict[str, str]:
    """Environment of a script that finds the checkout and FlagAI's import names, and no network."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "flagai_altdiff" / "_shim")])
    return {**os.environ, "PYTHONPATH": paths, "FLAGAI_ALTDIFF_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
