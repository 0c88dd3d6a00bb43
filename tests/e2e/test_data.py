"""``altdiff data report`` as people type it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from flagai_altdiff.cli.main import main
from tests.data_files import plain_shard, write_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "data", 12)
    (folder / "003.png").write_bytes(b"no image")
    (folder / "004.txt").unlink()
    return folder


def test_a_report_and_a_sheet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "report", "data", "--workers", "0", "--sheet", "sheet.png"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0] == "11 examples: 10 good, 1 broken" and lines[1].endswith(" of them a second")
    assert f"{'unknown':>14} {10:>10} {'#' * 40}" in lines
    assert "  1 no caption: 004.png" in lines and "  1 not an image: 003.png" in lines
    assert "   1 000.png: number 0" in shown.err.splitlines() and shown.err.endswith("sheet.png\n")
    with Image.open("sheet.png") as sheet:
        assert sheet.size == (8 * 130, 2 * 142)


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "0.tar").write_bytes(plain_shard(3))
    (folder / "1.tar").write_bytes(b"")
    words = ["data", "report", "data/{0..2}.tar", "--skip-shards", "--json", "--workers", "0"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 3 and found["captions"] == {"unknown": 3} and found["shorter_sides"] == {"0": 3}
    assert found["left_out"]["shard without examples"] == {"count": 1, "first": ["1.tar"]}
    assert main([*words, "--language", "de"]) == 1
    assert main([*words, "--language", "German"]) == 2


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["gone"], 1, "gone does not exist"),
        (["drawn:xx"], 2, "expected some of"),
        (["*.tar"], 1, "no file fits this pattern"),
        (["data", "--min-side", "500"], 1, "Left out: 10 image too small"),
        (["data", "--most", "0"], 2, "most=0"),
        (["data", "--workers", "-1"], 2, "workers=-1"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], status: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "report", *words]) == status
    assert message in capsys.readouterr().err
