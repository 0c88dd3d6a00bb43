"""Texts without images, as batches for a text encoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagai_altdiff.errors import BrokenExampleError, DataError
from flagai_altdiff.training.data.batches import Share, batches
from flagai_altdiff.training.data.example import Caption
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.preparation import Preparation
from flagai_altdiff.training.data.report import report
from flagai_altdiff.training.data.source import Reading

LINES = [
    b'{"en": "a cat", "de": "eine Katze", "source": "x"}',
    b"",
    b'{"captions": ["a dog", "ein Hund"], "language": ["en", "de"]}',
    b'{"text": "plain"}',
    b"[1]",
    b"{",
    b'{"en": "\xff"}',
    b'{"source": "no language"}',
]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "parallel.jsonl"
    path.write_bytes(b"\n".join(LINES))
    examples = open_examples(path)
    assert len(examples) == 7 and examples.keys[0] == "parallel.jsonl/0"
    assert examples[0].captions == (Caption("a cat", "en"), Caption("eine Katze", "de")) and examples[0].image is None
    assert examples[1].captions == (Caption("a dog", "en"), Caption("ein Hund", "de"))
    assert examples[2].captions == (Caption("plain"),)
    for i in range(3, 7):
        with pytest.raises(BrokenExampleError):
            examples[i]
    assert len(open_examples(path, Reading(filters=Filters(languages=("de",))))) == 2
    found = report(examples)
    assert (found.good, found.captions, found.largest) == (3, {"en": 2, "de": 2, "unknown": 1}, None)


def test_a_table(tmp_path: Path) -> None:
    path = tmp_path / "parallel.tsv"
    path.write_bytes("\ufeffen\tzh-TW\r\na cat\t貓\r\n\ta  dog\r\nonly english\r\n".encode())
    examples = open_examples(path)
    assert [examples[i].captions for i in range(3)] == [
        (Caption("a cat", "en"), Caption("貓", "zh-tw")),
        (Caption("a dog", "zh-tw"),),
        (Caption("only english", "en"),),
    ]
    share = Share(count=3, batch_size=3)
    (batch,) = batches(examples, share, None, seed=1, steps=1)
    assert "image" not in batch and [("a cat", "en"), ("貓", "zh-tw")] in batch["captions"]
    with pytest.raises(DataError, match="is text without an image"):
        list(batches(examples, share, Preparation(side=8), seed=1, steps=1))
    path.write_bytes(b"English\tGerman\nx\ty\n")
    with pytest.raises(DataError, match="'English' in its first line is no language"):
        open_examples(path)
