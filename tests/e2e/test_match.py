"""``altdiff match``, and ``generate --best``, as people type them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flagai_altdiff.cli.main import main
from tests import tiny


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        Image.new("RGB", (40 + i, 30), (80 * i, 0, 90)).save(f"image {i}.png")
    Image.new("P", (10, 10)).save("-odd.gif")
    Path("judge.png").mkdir()
    return str(tiny.write_altclip_folder(tmp_path / "judge"))


def test_a_table_and_a_sheet(judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"image {i}.png" for i in range(3)]
    assert main(["match", "a red house", "ein Hund", "-m", judge, "--", *files, "-odd.gif"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["  1  a red house", "  2  ein Hund"]
    assert [line.split("  ")[0].strip() for line in lines[3:]] == [*files, "-odd.gif"]
    assert all(line.count("*") >= 1 for line in lines[3:])
    with Image.open(tmp_path / "match-0000.png") as sheet:
        assert sheet.height == 2 * (128 + 2 + 12) and sheet.width == 22 + 4 * 130
    assert main(["match", "-m", judge, "--sheet", "mine.png", "a red house", *files]) == 0
    assert (tmp_path / "mine.png").is_file() and not (tmp_path / "match-0001.png").exists()


def test_json(judge: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["match", "--json", "--no-sheet", "-m", judge, "猫", "--", "image 1.png", "image 1.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == ["猫"] and found["images"] == ["image 1.png"] * 2
    (first, second), *rest = found["similarities"]
    assert first == second and -1 <= first <= 1 and not rest


def test_images_are_seen_as_people_see_them(judge: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Upright, transparent ones on white, and 16 bits not as white."""
    grey = np.arange(48 * 32, dtype=np.uint16).reshape(32, 48) // 6
    Image.fromarray(grey.astype(np.uint8)).save("plain.png")
    Image.fromarray(grey * 257).save("sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(grey.astype(np.uint8)).rotate(180).save("turned.png", exif=exif)
    clear = Image.fromarray(np.dstack([np.zeros((32, 48, 3)), 255 - grey]).astype(np.uint8))
    clear.save("clear.png")
    names = ["plain.png", "sixteen.png", "turned.png", "clear.png"]
    assert main(["match", "--json", "--no-sheet", "-m", judge, "a house", "--", *names]) == 0
    found = json.loads(capsys.readouterr().out)["similarities"][0]
    assert found == pytest.approx([found[0]] * 4, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a dog"], "no image"),
        (["--", "image 1.png"], "no text"),
        ([], "no text"),
        (
            ["a dog", "--sheet", "gone/sheet.png", "--", "image 1.png"],
            "--sheet='gone/sheet.png': there is no folder gone",
        ),
        (["a dog", "--sheet", "judge.png", "--", "image 1.png"], "--sheet='judge.png': that is a folder"),
        (["a dog", "--sheet", "sheet.jpg", "--", "image 1.png"], "expected a name that ends in .png"),
        (["a dog", "--", "gone.png"], "gone.png: file cannot be opened (No such file"),
        (["a dog", "--", "judge"], "judge: file cannot be opened (Is a dir"),
    ],
)
def test_what_is_missing_is_said(
    words: list[str], message: str, judge: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = words.index("--") if "--" in words else len(words)
    assert main(["match", *words[:place], "-m", judge, *words[place:]]) in (1, 2)
    assert message in capsys.readouterr().err


def test_the_best_of_many(judge: str, m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["-m", str(m9_folder), "-W", "64", "-H", "64", "--steps", "1", "-o", str(tmp_path / "out")]
    assert main(["generate", "a cat", "--best", "2", "--of", "5", "--judge", judge, *small]) == 0
    assert len([*(tmp_path / "out" / "samples").iterdir()]) == 2
    for wrong in (["--of", "4"], ["--best", "4", "--of", "4"], ["--best", "0"], ["--best", "2", "--n-samples", "3"]):
        assert main(["generate", "a cat", "--judge", judge, *wrong, *small]) == 2
    assert main(["generate", "a cat", "--best", "1", "--judge", "AltDiffusion-m9", *small]) == 2
    assert "another task" in capsys.readouterr().err
