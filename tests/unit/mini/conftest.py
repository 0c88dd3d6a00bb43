"""A few things with their packages, and the tokenizer of their names, made once for all tests of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flagai_altdiff.mini.recipe import judge
from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer
from flagai_altdiff.mini.things import catalogue, shards
from flagai_altdiff.mini.things.catalogue import Thing, make_catalogue
from flagai_altdiff.mini.things.packages import Package
from tests.things import CODES, make_archives


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[Package, Path]:
    """The packages, with four things in them."""
    return make_archives(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def few_things(archives: dict[Package, Path]) -> Iterator[None]:
    """No more things than those packages have, which stand in for npm's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalogue, "THINGS", {"some": CODES})
        patch.setattr(shards, "fetch", lambda folder: archives)
        patch.setattr(judge, "CODES", CODES)
        yield


@pytest.fixture(scope="session")
def things(archives: dict[Package, Path], few_things: None) -> tuple[Thing, ...]:
    """What the things are called."""
    return make_catalogue(archives)


@pytest.fixture(scope="session")
def tokenizer_file(things: tuple[Thing, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``build_tokenizer`` writes; read only."""
    path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.bpe.model"
    build_tokenizer(path, things)
    return path
