"""Prompt files in the encodings and with the line ends that editors write."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.prompt_files import has_requests, parse_prompts, read_prompt_file, read_requests
from tests.cost import in_proportion


@pytest.mark.fault(121)
@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"a cat\na dog\n", ["a cat", "a dog"]),
        (b"a cat\r\na dog", ["a cat", "a dog"]),
        (b"a cat\ra dog\r", ["a cat", "a dog"]),
        (b"a cat\r\n\ra dog\n\r", ["a cat", "a dog"]),
        (b"# a cat\na #dog", ["# a cat", "a #dog"]),
        (b"a\n\xef\xbb\xbfb\n\xe2\x80\x8b\n\x1a", ["a", "b"]),
        (b"\xef\xbb\xbfa cat\n", ["a cat"]),
        (b"\n\na cat\n  \n\t\na dog\n\n", ["a cat", "a dog"]),
        ("一只猫\nقطة\n".encode(), ["一只猫", "قطة"]),
        ("a\u2028b\x0bc\x85d\n".encode(), ["a\u2028b\x0bc\x85d"]),
        ("a cat\r\n一只猫\r\n".encode("utf-16"), ["a cat", "一只猫"]),
        (b"\xfe\xff" + "قطة".encode("utf-16-be"), ["قطة"]),
    ],
)
def test_prompt_files(data: bytes, prompts: list[str]) -> None:
    assert parse_prompts(data, "p.txt") == tuple(prompts)


@pytest.mark.fault(49)
@pytest.mark.parametrize(
    ("data", "line", "encoding"),
    [
        ("a cat\n一只戴着帽子的猫\n".encode("gbk"), "line 2 ", "GB18030"),
        ("a\nb\n\n帽子\n".encode("gbk"), "line 4 ", "GB18030"),
        ("a cat\n".encode("utf-16-le"), "NUL ", "UTF-16LE"),
        ("a cat\n".encode("utf-16-be"), "NUL ", "UTF-16BE"),
        (b"a\xff", "line 1 ", "ISO-8859-1"),
        ("a cat\nun corazón rojo\n".encode("latin-1"), "line 2 ", "ISO-8859-1"),
        (b"\xff\xfea\0b", "line 1 ", "UTF-16LE"),
    ],
)
def test_a_prompt_file_of_another_encoding_is_refused_with_its_line(data: bytes, line: str, encoding: str) -> None:
    with pytest.raises(
        InvalidRequestError, match=rf"{line}.*iconv -f {encoding} -t UTF-8 p\.txt > p\.utf8\.txt$"
    ) as caught:
        parse_prompts(data, "p.txt")
    assert caught.value.field == "from_file"
    assert "p.txt" in str(caught.value)


@pytest.mark.fault(49)
@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_a_prompt_file_without_prompts_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequestError, match="no prompt"):
        parse_prompts(data, "p.txt")


def test_comments_are_left_out_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"# animals\na cat\n  # more\na #dog\n")
    assert read_prompt_file(path, comments=True) == ("a cat", "a #dog")
    assert read_prompt_file(str(path)) == ("# animals", "a cat", "  # more", "a #dog")
    path.write_bytes(b"# nothing\n")
    with pytest.raises(InvalidRequestError, match="no prompt"):
        read_prompt_file(path, comments=True)


def test_a_line_of_another_encoding_is_counted_with_every_line_end() -> None:
    with pytest.raises(InvalidRequestError, match="line 3 "):
        parse_prompts(b"a\rb\r\n\xff", "p.txt")


@pytest.mark.parametrize("name", ["missing.txt", ".", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read") as caught:
        read_prompt_file(tmp_path / name)
    assert caught.value.field == "from_file"


@pytest.mark.fault(49)
def test_an_endless_prompt_file_is_refused() -> None:
    with in_proportion(64 << 20), pytest.raises(InvalidRequestError, match="more than 64 MiB"):
        read_prompt_file("/dev/zero")


def test_json_lines_hold_a_request_each(tmp_path: Path) -> None:
    file = tmp_path / "prompts.JSONL"
    file.write_bytes('\ufeff{"prompt": "一只猫", "steps": 3}\n\n{"prompts": ["a", "b"]}\n'.encode())
    assert has_requests(file) and not has_requests("prompts.txt")
    assert read_requests(file) == [{"prompt": "一只猫", "steps": 3}, {"prompts": ["a", "b"]}]
    for text, message in (
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is no JSON"),
        ('{"steps": 3}', "line 1: it has no prompt; expected"),
        ('["a"]', "line 1: it has no prompt; expected"),
        ("[" * 100_000, "line 1 is no JSON"),
        ("\n\n", "no request"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match=message):
            read_requests(file)


def test_json_lines_may_have_comments(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('# mine\n{"prompt": "a"}\n')
    assert read_requests(file, comments=True) == [{"prompt": "a"}]
    with pytest.raises(InvalidRequestError, match="line 1 is no JSON"):
        read_requests(file)
