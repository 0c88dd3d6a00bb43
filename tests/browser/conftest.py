"""A real browser, Debian's Chromium, and a server with a page of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from flagai_altdiff import load_model, lora
from tests.web_server import Server, serving
from tests.web_tools import needed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    needed(chromium, "chromium")
    needed(importlib.util.find_spec("playwright"), "the Python package playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def server(
    browser: Browser, tmp_path_factory: pytest.TempPathFactory, script_environment: dict[str, str]
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    write_lora(folder / "robot.safetensors")
    with serving(folder, script_environment, "--lora", "robot.safetensors") as running:
        yield running


def write_lora(path: Path) -> None:
    """A LoRA for the embedded model, of numbers by chance."""
    model, generator = load_model("AltDiffusion-mini"), torch.Generator().manual_seed(0)
    for name in lora.make_trainable(model, rank=2, alpha=2, generator=generator):
        up = model.get_submodule(name.rpartition(".")[0]).parametrizations["weight"][0].up  # type: ignore[index,union-attr]
        up.data.normal_(std=0.5, generator=generator)  # type: ignore[operator,union-attr]
    lora.save_lora(path, lora.finished(model), model.config)


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page in English, open; nothing may be asked of other hosts, and no script may fail."""
    yield from opened(browser, server, locale="en-US")


@pytest.fixture
def chinese_page(browser: Browser, server: Server) -> Iterator[Page]:
    yield from opened(browser, server, locale="zh-CN", viewport=PHONE, color_scheme="dark")


def opened(browser: Browser, server: Server, **options: object) -> Iterator[Page]:
    context = browser.new_context(**{"viewport": WIDE, **options})  # type: ignore[arg-type]
    page = context.new_page()
    asked, failed = list[str](), list[str]()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda said: failed.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#prompt textarea")
    yield page
    context.close()
    assert {url for url in asked if not url.startswith((server.url, "data:", "blob:"))} == set()
    assert failed == []


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Where screenshots go, for people to look at."""
    return Path(os.environ.get("ALTDIFF_SHOTS", tmp_path))
