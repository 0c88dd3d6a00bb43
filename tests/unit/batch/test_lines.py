"""Files of prompts that are read line by line: the same lines as those that are read at once, and nothing kept."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from flagai_altdiff.batch.lines import PromptLines
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.prompt_files import parse_prompts


def lines(path: Path, data: bytes, **options: bool) -> list[tuple[int, str]]:
    path.write_bytes(data)
    found = PromptLines(path, **options)
    return [(found.number(i), found[i]) for i in range(len(found))]


@pytest.mark.parametrize(
    "data",
    [
        b"a cat\na dog\n",
        b"a cat\r\na dog",
        b"a cat\ra dog\r",
        b"a cat\r\n\ra dog\n\r",
        b"a\n\xef\xbb\xbfb\n\xe2\x80\x8b\n\x1a",
        b"\xef\xbb\xbfa cat\n",
        "一只猫\nقطة\n".encode(),
        "a\u2028b\x0bc\x85d\n".encode(),
        "a cat\r\n一只猫\r\n".encode("utf-16"),
        b"\xfe\xff" + "قطة".encode("utf-16-be"),
    ],
)
def test_the_lines_are_those_that_are_read_at_once(data: bytes, tmp_path: Path) -> None:
    assert tuple(text for _, text in lines(tmp_path / "p.txt", data)) == parse_prompts(data, "p.txt")


def test_lines_have_the_numbers_that_editors_show(tmp_path: Path) -> None:
    assert lines(tmp_path / "p.txt", b"a\n\nb\r\nc\rd\n\n\ne") == [(1, "a"), (3, "b"), (4, "c"), (5, "d"), (8, "e")]
    assert lines(tmp_path / "p.txt", b"# x\na\n # y\n#b\n", comments=True) == [(2, "a")]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\nb\n\xff\n", "line 3 is not UTF-8; save it as UTF-8"),
        (b"a\rb\r\xff\n", "line 3 is not UTF-8"),
        (b"a\nb\0c\n", "line 2 has NUL"),
        (b"\n \n", "no prompt"),
        (b"\xff\xfea\0b", "damaged UTF-16"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        lines(tmp_path / "p.txt", data)
    assert caught.value.field == "from_file"


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        PromptLines(tmp_path / name)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\n")
    found = PromptLines(path)
    assert found[1] == "b"
    path.write_text("c\nd\n")
    os.utime(path, ns=(1, 1))
    with pytest.raises(InvalidRequestError, match="changed meanwhile"):
        found[0]


def test_no_line_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("".join(f"{'a long prompt ' * 20}{n}\n" for n in range(20_000)))
    tracemalloc.start()
    found = PromptLines(path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 20_000 and path.stat().st_size > 5_000_000
    assert held < 40 * 20_000
