"""Tables as people bring them, and what is wrong with others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.evaluation.altclip import read_captions, read_classes
from flagai_altdiff.evaluation.tables import Prompt, read_prompts, read_table
from tests.cost import in_proportion

ROWS = [
    {"language": "zh", "prompt": "一只猫", "id": "7"},
    {"language": "en", "prompt": 'a "cat", red', "id": "7"},
    {"language": "de", "prompt": "ein Hund", "english": "a dog", "id": "8"},
    {"language": "de", "prompt": "eine Burg", "id": "9"},
]


def write(folder: Path, kind: str, rows: list[dict[str, str]]) -> Path:
    path = folder / f"table.{kind}"
    columns = [*dict.fromkeys(name for row in rows for name in row)]
    if kind == "jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
        text = "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\r\n" for line in cells)
    path.write_text("\ufeff" + text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_every_kind_of_table_says_the_same(kind: str, tmp_path: Path) -> None:
    prompts, notes = read_prompts(write(tmp_path, kind, ROWS))
    assert prompts == {
        "de": (
            Prompt(id="8", text="ein Hund", english="a dog"),
            Prompt(id="9", text="eine Burg"),
        ),
        "en": (Prompt(id="7", text='a "cat", red', english='a "cat", red'),),
        "zh": (Prompt(id="7", text="一只猫", english='a "cat", red'),),
    }
    assert not notes


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a cat\n\na dog\n")
    (tmp_path / "PT_br.txt").write_bytes("um gato\r\num cão".encode("utf-16"))
    (tmp_path / "zh.txt").write_text("一只猫\n")
    (tmp_path / "readme.md").write_text("not a prompt")
    prompts, notes = read_prompts(tmp_path, limit=1)
    assert prompts == {
        "en": (Prompt(id="1", text="a cat", english="a cat"),),
        "pt-br": (Prompt(id="1", text="um gato", english="a cat"),),
        "zh": (Prompt(id="1", text="一只猫"),),
    }
    assert notes == ["zh.txt has 1 prompts and en.txt 2: not taken for the same ones"]
    assert [*read_prompts(tmp_path, ["zh", "en"])[0]] == ["zh", "en"]
    assert [*read_prompts(tmp_path / "zh.txt")[0]] == ["zh"]


def test_images_count_from_the_table_or_from_the_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, "csv", [{"language": "en", "prompt": "a cat", "image": "a/1.jpg"}])
    assert read_prompts(path)[0]["en"][0].image == tmp_path / "a/1.jpg"
    assert read_prompts(path, pictures=Path("elsewhere"))[0]["en"][0].image == Path("elsewhere/a/1.jpg")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("en.txt", b"", "no prompt"),
        ("en.txt", "ein Käse".encode("latin-1"), "iconv"),
        ("prompts.txt", b"a cat", "no code of a language"),
        ("t.jsonl", b"", "no row"),
        ("t.jsonl", b"{}\n", "line 1 has no 'language'; 'it is empty'"),
        ("t.jsonl", b'{"language": "en"}', "line 1 has no 'prompt'"),
        ("t.jsonl", b'\n{"language": "en", "prompt"', "line 2 is no JSON"),
        ("t.jsonl", b'["en", "a cat"]', "line 1: expected an object"),
        ("t.jsonl", b'{"language": "en", "prompt": ["a"]}', "line 1: expected an object"),
        ("t.jsonl", b"[" * 100_000, "line 1 is no JSON"),
        ("t.jsonl", b'{"language": "../..", "prompt": "a"}', "no code of a language"),
        ("t.jsonl", b'{"language": "en", "prompt": "\xff"}', "line 1 is not UTF-8"),
        ("t.csv", b"language,prompt\n", "no row"),
        ("t.csv", b"language,prompt\nen\n", "line 2 has no 'prompt'"),
        ("t.csv", b"language,prompt\nen,a cat, red\n", "line 2 has more cells"),
        ("t.csv", b"en,a cat\nde,ein Hund\n", "line 2 has no 'language'"),
        ("t.csv", b"language,prompt\nen," + b"a" * 200_000, "field larger"),
        ("t.tsv", b"language\tprompt\tid\nen\ta\t1\nen\tb\t1\n", "id '1' comes twice in en"),
        ("t.xlsx", b"PK", "expected a .jsonl"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match="prompts=") as error, in_proportion(len(content)):
        read_prompts(path)
    assert message in str(error.value)


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no text file"):
        read_prompts(tmp_path)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_prompts(tmp_path / "gone.csv")
    with pytest.raises(InvalidRequestError, match="there are de, en, zh"):
        read_prompts(write(tmp_path, "csv", ROWS), ["fr"])
    assert read_table(write(tmp_path, "csv", ROWS), "x", ("language",))


def test_captions_name_their_images(tmp_path: Path) -> None:
    rows = [
        {"language": "en", "image": "1.png", "caption": "a cat"},
        {"language": "en", "image": "1.png", "caption": "b"},
    ]
    captions = read_captions(write(tmp_path, "tsv", rows))
    assert [(caption.text, caption.image) for caption in captions["en"]] == [
        ("a cat", tmp_path / "1.png"),
        ("b", tmp_path / "1.png"),
    ]
    (tmp_path / "en.txt").write_text("a cat")
    with pytest.raises(InvalidRequestError, match="names no images"):
        read_captions(tmp_path / "en.txt")


def test_classes_are_named_in_the_order_of_their_folders(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("b", "a", "c"):
        (images / name).mkdir(parents=True)
        (images / name / "1.png").touch()
    templates = tmp_path / "templates"
    templates.mkdir()
    (templates / "en.txt").write_text("a photo of a {}.\na {c}\n")
    rows = [{"language": "en", "class": name, "name": name * 2} for name in "cab"]
    names, sentences = read_classes(write(tmp_path, "csv", rows), templates, images)
    assert names == {"en": ["aa", "bb", "cc"]} and sentences == {"en": ["a photo of a {}.", "a {c}"]}
    (tmp_path / "en.txt").write_text("one\ntwo\n")
    with pytest.raises(InvalidRequestError, match="en has 2 names, but there are 3 folders"):
        read_classes(tmp_path / "en.txt", templates, images)
    with pytest.raises(InvalidRequestError, match="no name for 1 folders: b"):
        read_classes(write(tmp_path, "csv", rows[:2]), templates, images)
    with pytest.raises(InvalidRequestError, match="there are en"):
        read_classes(write(tmp_path, "csv", [{**row, "language": "de"} for row in rows]), templates, images)
    (templates / "en.txt").write_text("a photo")
    with pytest.raises(InvalidRequestError, match="where the name"):
        read_classes(write(tmp_path, "csv", rows), templates, images)
    (images / "d").mkdir()
    with pytest.raises(InvalidRequestError, match="there is no image in it"):
        read_classes(write(tmp_path, "csv", rows), templates, images)
