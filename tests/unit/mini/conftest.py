"""The embedded model's tokenizer, written once for all tests of its recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``build_tokenizer`` writes; read only."""
    path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.bpe.model"
    build_tokenizer(path)
    return path
