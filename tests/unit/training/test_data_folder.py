"""Folders of images with texts beside them, with metadata, and with whatever else people put there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flagai_altdiff.errors import BrokenExampleError, DataError, InvalidRequestError
from flagai_altdiff.training.data.example import Caption, Examples, Tally
from flagai_altdiff.training.data.fields import Facts, decode_text, read_fields
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.source import Reading
from tests.data_files import image_bytes, write_folder


def all_of(examples: Examples) -> dict[str, tuple[Caption, ...] | str]:
    """Key -> captions, or the reason why it is broken."""
    found: dict[str, tuple[Caption, ...] | str] = {}
    for i in range(len(examples)):
        try:
            example = examples[i]
            assert example.key == examples.keys[i] and example.image is not None
            found[example.key] = example.captions
        except BrokenExampleError as error:
            found[error.key] = error.reason
    assert len(found) == len(examples) == sum(examples.layout.parts)
    return found


def left_out(examples: Examples) -> dict[str, list[str]]:
    return examples.left_out.names


def test_texts_beside_images(tmp_path: Path) -> None:
    names = ("cat.png", "dog.JPG", "deep/er/two.dots.png", "red.de.png", ".hidden.png", ".git/x.png", "alone.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(image_bytes())
    texts = {
        "cat.txt": "a cat\n\n  a   small cat \n",
        "cat.de.txt": "eine Katze\r\nein Tier",
        "cat.zh-TW.txt": "貓",
        "dog.txt": "a dog",
        "deep/er/two.dots.txt": "dots",
        "red.de.txt": "of red.de",
        "orphan.txt": "nothing",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    examples = open_examples(tmp_path)
    assert all_of(examples) == {
        "cat.png": (
            Caption("eine Katze", "de"),
            Caption("ein Tier", "de"),
            Caption("a cat"),
            Caption("a small cat"),
            Caption("貓", "zh-tw"),
        ),
        "dog.JPG": (Caption("a dog"),),
        "red.de.png": (Caption("of red.de"),),
        "deep/er/two.dots.png": (Caption("dots"),),
    }
    assert left_out(examples) == {"no caption": ["alone.png"]}
    with_all = open_examples(str(tmp_path), Reading(caption="a thing"))
    assert len(with_all) == 5 and all_of(with_all)["alone.png"] == (Caption("a thing"),)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("é".encode(), "é"),
        (b"\xef\xbb\xbf\xc3\xa9", "é"),
        ("é".encode("utf-16"), "é"),
        (b"\xfe\xff\x00\xe9", "é"),
    ],
)
def test_encodings_that_editors_write(data: bytes, expected: str) -> None:
    assert decode_text(data) == expected


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("é".encode("latin-1"), "ISO-8859-1"),
        ("一只小猫在这里".encode("gb18030"), "GB18030"),
        ("cat".encode("utf-16-le"), "UTF-16 without its mark"),
        (b"\xff\xfea", "."),
        (b"a" * (1 << 20) + b"b", "over 1,048,576 bytes"),
    ],
)
def test_other_encodings_are_named(data: bytes, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        decode_text(data)
    folder = write_folder(tmp_path / "data", 2)
    (folder / "001.txt").write_bytes(data)
    assert all_of(open_examples(folder)) == {"000.png": (Caption("number 0"),), "001.png": "text is not UTF-8"}


def test_broken_files_in_a_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 6)
    (folder / "000.png").write_bytes(image_bytes()[:40])
    (folder / "001.png").write_bytes(b"<html>")
    (folder / "002.txt").write_text(" \n\t\n")
    (folder / "003.png").unlink()
    os.mkfifo(folder / "003.png")
    (folder / "004.png").unlink()
    (folder / "004.png").symlink_to("nowhere")
    assert all_of(open_examples(folder)) == {
        "000.png": "truncated or damaged image",
        "001.png": "not an image",
        "002.png": "no caption",
        "003.png": "file cannot be opened",
        "004.png": "file cannot be opened",
        "005.png": (Caption("number 5"),),
    }


def test_links_may_lead_around(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 2)
    write_folder(tmp_path / "other", 1)
    (folder / "around").symlink_to(folder)
    (folder / "other").symlink_to(tmp_path / "other")
    assert list(open_examples(folder).keys) == ["000.png", "001.png", "other/000.png"]


METADATA = [
    {"file_name": "a.png", "text": "one"},
    {"file_name": "b.png", "captions": ["one", "two"], "language": "DE"},
    {"file_name": "c.png", "captions": ["eins", "un"], "language": ["de", "fr"]},
    {"file_name": "d.png", "captions": [{"text": "eins", "language": "de"}, {"text": "?", "language": "nolang"}]},
    {"file_name": "e.png", "caption": {"de": "eins", "zh_TW": "一"}},
    {"file_name": "f.png", "text": "gone"},
    {"file_name": "a.png", "text": "again"},
]


def test_metadata(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(image_bytes())
    bad = [
        '{"file_name": "a.png"',
        "[1]",
        '{"text": "no file"}',
        '{"file_name": "../x.png", "text": "t"}',
        '{"file_name": "/etc/x.png", "text": "t"}',
        '{"file_name": "b.png", "text": ["", null, 3]}',
        "[" * 100_000,
    ]
    lines = [*map(json.dumps, METADATA), "", *bad]
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"file_name": "a\xff.png"}\n')
    for source in (tmp_path, tmp_path / "metadata.jsonl"):
        examples = open_examples(source)
        assert all_of(examples) == {
            "a.png": (Caption("one"),),
            "b.png": (Caption("one", "de"), Caption("two", "de")),
            "c.png": (Caption("eins", "de"), Caption("un", "fr")),
            "d.png": (Caption("eins", "de"), Caption("?")),
            "e.png": (Caption("eins", "de"), Caption("一", "zh-tw")),
            "f.png": "file cannot be opened",
            "a.png#7": (Caption("again"),),
        }
        assert left_out(examples) == {
            "metadata are not JSON": [
                "metadata.jsonl, line 9",
                "metadata.jsonl, line 10: [1]",
                "metadata.jsonl, line 15",
            ],
            "metadata name no image": ["metadata.jsonl, line 11"],
            "file outside the folder": [
                "metadata.jsonl, line 12: ../x.png",
                "metadata.jsonl, line 13: /etc/x.png",
            ],
            "no caption": ["b.png"],
            "text is not UTF-8": ["metadata.jsonl, line 16: ISO-8859-1 by the look of it"],
        }


def test_metadata_of_spreadsheets(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_bytes())
    rows = 'file_name,text,language\na.png,"one, two",de\n,x,\n'
    (tmp_path / "metadata.csv").write_bytes(rows.encode("utf-16"))
    examples = open_examples(tmp_path)
    assert all_of(examples) == {"a.png": (Caption("one, two", "de"),)} and len(examples.left_out) == 1
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xe9\n")
    with pytest.raises(DataError, match=r"metadata\.csv is not UTF-8"):
        open_examples(tmp_path)
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "a.png", "text": "é"}'.encode("utf-16"))
    assert all_of(open_examples(tmp_path)) == {"a.png": (Caption("é"),)}


def deep(levels: int) -> object:
    found: object = "a"
    for _ in range(levels):
        found = {"de": found}
    return found


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        (
            {"TEXT": "A", "LANGUAGE": "en", "AESTHETIC_SCORE": 5.5, "WIDTH": 7, "HEIGHT": "8"},
            Facts((Caption("A", "en"),), 5.5, 7, 8, "en"),
        ),
        ({"aesthetic": float("nan"), "width": [1], "height": -1, "caption": 5}, Facts(height=-1)),
        ({"aesthetic": 10**400, "language": 7, "text": {"x y": "A"}}, Facts((Caption("A"),))),
        ({"captions": {"de": ["a", "b"], "?": ["c"]}}, Facts((Caption("a", "de"), Caption("b", "de"), Caption("c")))),
        ({"caption": {"text": "a b", "language": "de"}, "lang": "fr"}, Facts((Caption("a b", "de"),), language="fr")),
        ({"caption": [{"text": "a"}, [["b"]], {"de": "c"}, None]}, Facts((Caption("a"),))),
        ({"caption": deep(5000)}, Facts()),
        ({"caption": "cut in an emoji \ud83d"}, Facts((Caption("cut in an emoji \ufffd"),))),
        ({}, Facts()),
    ],
)
def test_fields_by_any_name(record: dict[str, object], facts: Facts) -> None:
    assert read_fields(record) == facts


def test_filters(tmp_path: Path) -> None:
    records: list[dict[str, object]] = [
        {"text": "good", "language": "de-at", "aesthetic": 6},
        {"text": "bad", "language": "fr", "aesthetic": 6},
        {"text": "ugly", "language": "de", "aesthetic": 4.9},
        {"text": "none", "language": "de"},
        {"text": "a", "language": "de", "aesthetic": 6},
        {"text": "a" * 50, "aesthetic": 6},
        {"captions": {"fr": "non", "de": "doch"}, "aesthetic": 6},
        {"text": "small", "aesthetic": 6},
        {"text": "said to be small", "aesthetic": 6, "width": 15, "height": 100},
        {"text": "not there", "aesthetic": 6},
        {"text": "broken", "aesthetic": 6},
    ]
    for i in range(len(records)):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(size=(15, 30) if i == 7 else (20, 16)))
    (tmp_path / "9.png").unlink()
    (tmp_path / "10.png").write_bytes(b"x")
    lines = [json.dumps({"file_name": f"{i}.png", **record}) for i, record in enumerate(records)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    filters = Filters(languages=("de", "unknown"), min_score=5, min_side=16, min_text=2, max_text=40)
    examples = open_examples(tmp_path, Reading(filters=filters))
    assert all_of(examples) == {"0.png": (Caption("good", "de-at"),), "6.png": (Caption("doch", "de"),)}
    assert left_out(examples) == {
        "no caption in a wanted language": ["1.png"],
        "aesthetic score too low": ["2.png"],
        "no aesthetic score": ["3.png"],
        "captions too short": ["4.png"],
        "captions too long": ["5.png"],
        "image too small": ["7.png", "8.png"],
        "file cannot be opened": ["9.png (No such file or directory)"],
        "not an image": ["10.png"],
    }
    assert not Filters() and filters


@pytest.mark.parametrize("wrong", [{"languages": ("German",)}, {"min_side": -1}, {"min_text": 5, "max_text": 4}])
def test_impossible_filters(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError):
        Filters(**wrong)  # type: ignore[arg-type]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no example\. Expected: images with a \.txt"):
        open_examples(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_examples(tmp_path / "gone")
    (tmp_path / "a.png").write_bytes(image_bytes())
    with pytest.raises(DataError, match=r"no example\. Left out: 1 no caption: a\.png"):
        open_examples(tmp_path)
    (tmp_path / "IMG_1.HEIC").write_bytes(b"of a telephone")
    with pytest.raises(DataError, match=r"1 image of a kind that is not read; convert it to JPEG or PNG: IMG_1\.HEIC"):
        open_examples(tmp_path)
    with pytest.raises(DataError, match=r"a\.png: expected a folder"):
        open_examples(tmp_path / "a.png")
    with pytest.raises(DataError, match="no file fits this pattern"):
        open_examples(tmp_path / "*.tar")
    with pytest.raises(DataError, match="expected one folder"):
        open_examples([tmp_path, tmp_path / "a.png"])
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"is further down; open .*train\.$"):
        open_examples(tmp_path)


def test_a_tally_keeps_the_first_names() -> None:
    tally, other = Tally(), Tally()
    for i in range(9):
        tally.add("odd", f"name {i}")
    other.add("odd", "last\x1b")
    other.add("even", "x", 3)
    tally.update([other])
    assert len(tally) == 13 and Tally.from_json(tally.as_json()) == tally
    assert tally.lines() == ["10 odd: name 0, name 1, name 2, name 3, name 4, …", "3 even: x, …"]
    assert other.names["odd"] == ["last\\x1b"]
