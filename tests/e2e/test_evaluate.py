"""``altdiff evaluate`` as people type it, in one process, in several, and under torchrun."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from flagai_altdiff.cli.main import main
from flagai_altdiff.decoding import open_image
from tests import tiny

SMALL = ["-W", "64", "-H", "64", "--steps", "1", "--batch-size", "2", "--bootstrap", "10"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts, pictures and a matching model, which is the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("prompts").mkdir()
    Path("prompts/en.txt").write_text("a cat\na dog\na hen\na cow\na fox\n")
    Path("prompts/zh.txt").write_text("一只猫\n一只狗\n一只鸡\n一头牛\n一只狐狸\n")
    Path("pictures").mkdir()
    for i in range(4):
        Image.effect_noise((70 + i, 60), 40 + i).convert("RGB").save(f"pictures/{i}.png")
    tiny.write_altclip_folder(tmp_path / "judge")
    return tmp_path


def files(folder: str) -> Mapping[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.*") if path.is_file()
    }


def drawing(m9_folder: Path, outdir: str, *words: str) -> list[str]:
    return ["evaluate", str(m9_folder), "--prompts", "prompts", "-o", outdir, *SMALL, *words]


MEASURED = ("--pictures", "pictures", "--features", "judge", "--clip", "judge")


def test_a_table_and_its_files(m9_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(drawing(m9_folder, "out", *MEASURED, "--processes", "1")) == 0
    out, err = capsys.readouterr()
    head, _, *rows = out.splitlines()
    assert head == "| language | FID ↓ | CLIP Sim ↑ |"
    assert [row.split("|")[1].strip() for row in rows] == ["en", "zh"] and "–" in rows[0]
    assert "note: FID from no more images" in err
    assert out.strip() in Path("out/evaluation.md").read_text()
    found = json.loads(Path("out/evaluation.json").read_text())
    assert found["model"] == "AltDiffusion-m9" and found["settings"]["guidance_scale"] == 9.0
    assert {"value", "low", "high", "count"} == found["languages"]["zh"]["clip_similarity"].keys()
    assert open_image(Path("out/evaluation.png")).width > 500
    assert main(drawing(m9_folder, "out", *MEASURED, "--processes", "1", "--json")) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_several_processes_make_the_very_same_files(
    m9_folder: Path, place: Path, script_environment: dict[str, str]
) -> None:
    for count in ("1", "2"):
        words = drawing(m9_folder, count, *MEASURED, "--processes", count)
        done = subprocess.run(
            [sys.executable, "-m", "flagai_altdiff", *words],
            env=script_environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("| language |"), done.stdout
    one, two = files("1"), files("2")
    assert sum(name.endswith(".png") for name in one) == 11
    assert one == two


def test_under_torchrun_who_is_last_writes_the_report(
    m9_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert not Path("out/evaluation.md").exists()
        assert main(drawing(m9_folder, "out", *MEASURED)) == 0
    out, err = capsys.readouterr()
    assert "share 1 of 2 is done" in err and out.count("| language |") == 1
    assert main(drawing(m9_folder, "out", "--processes", "2")) == 2
    assert "the work is divided already" in capsys.readouterr().err


def test_a_process_that_fails_ends_the_others(m9_folder: Path, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("out/zh").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save("out/zh/00004.png")
    assert main(drawing(m9_folder, "out", "--clip", "judge", "--processes", "2")) == 1
    err = capfd.readouterr().err
    assert err.count("error: ") == 1 and "out/zh/00004.png is an image of other settings" in err
    assert "Traceback" not in err and not Path("out/evaluation.md").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "name one of --prompts, --retrieval and --zero-shot"),
        (
            ["--prompts", "prompts", "--retrieval", "x.csv"],
            2,
            "one of --prompts, --retrieval and --zero-shot at a time",
        ),
        (["--prompts", "gone"], 2, "--prompts='gone': expected a .jsonl"),
        (
            ["--prompts", "prompts", "--languages", "fr,en"],
            2,
            "--languages='fr': prompts has nothing in it; there are en, zh",
        ),
        (["--prompts", "prompts"], 2, "nothing would be measured. Add --clip"),
        (["--prompts", "prompts"], 2, "altdiff download AltCLIP-XLMR-L-m9"),
        (["--prompts", "prompts"], 2, "curl -LO https://"),
        (["--prompts", "prompts", "--pictures", "pictures"], 2, "curl -LO https://"),
        (
            ["--prompts", "prompts", "--pictures", "prompts", "--features", "judge"],
            2,
            "--pictures='prompts': there is no image",
        ),
        (["--prompts", "prompts", "--features", "gone.pth"], 2, "there is no such file; get it: curl"),
        (["--prompts", "prompts", "--features", "prompts"], 1, "no folder of a matching model"),
        (["--prompts", "prompts", "--clip", "AltDiffusion-m9"], 2, "another task"),
        (["--prompts", "prompts", "--steps", "0"], 2, "--steps=0"),
        (["--prompts", "prompts", "--limit", "0"], 2, "--limit=0"),
        (["--prompts", "prompts", "--bootstrap", "-1"], 2, "--bootstrap=-1"),
        (["--prompts", "prompts", "--batch-size", "0"], 2, "--batch-size=0"),
        (["--zero-shot", "pictures"], 2, "--zero-shot needs --classes and --templates"),
        (["--retrieval", "gone.csv"], 2, "--retrieval='gone.csv': cannot be read"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], status: int, message: str, m9_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(m9_folder), *words, "--processes", "1", "-o", "out"]) == status
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_model_of_the_other_kind(m9_folder: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("table.csv").write_text("language,image,caption\nen,pictures/0.png,a cat\n")
    assert main(["evaluate", str(m9_folder), "--retrieval", "table.csv", "-o", "out"]) == 1
    assert "no folder of a matching model" in capsys.readouterr().err
    assert main(["evaluate", "AltCLIP-XLMR-L-m9", "--prompts", "prompts", "-o", "out"]) == 2
    assert "another task" in capsys.readouterr().err
    assert main(["evaluate", "judge", "--prompts", "prompts", "--clip", "judge", "-o", "out"]) == 1
    assert "AltCLIP or CLIP, which matches texts and images but draws none" in capsys.readouterr().err


def test_retrieval(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{language},{i}.png,{language} caption {n} of {i}"
        for language in ("en", "de")
        for i in range(4)
        for n in (0, 1)
    ]
    Path("table.csv").write_text("\n".join(["language,image,caption", *rows, "en,gone.png,a cat", "fr,0.png,un chat"]))
    words = [
        "evaluate",
        "judge",
        "--retrieval",
        "table.csv",
        "--pictures",
        "pictures",
        "-o",
        "out",
        "--bootstrap",
        "10",
    ]
    assert main([*words, "--languages", "de,en"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith("| language | text to image R@1 % ↑ |")
    assert "broken images, left out: 1, pictures/gone.png" in err
    found = json.loads(Path("out/evaluation.json").read_text())
    assert [*found["languages"]] == ["de", "en"]
    assert found["languages"]["en"]["text_to_image_r5"]["value"] == 1  # of four images
    assert found["settings"]["captions"] == {"de": 8, "en": 9}
    assert len([*Path("out/measured").iterdir()]) == 1


def test_zero_shot(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("cat", "dog")):
        Path("classes", name).mkdir(parents=True)
        Path(f"pictures/{i}.png").rename(f"classes/{name}/{i}.png")
    Path("names.csv").write_text(
        "language,class,name\nen,cat,a cat\nen,dog,a dog\nde,cat,eine Katze\nde,dog,ein Hund\n"
    )
    Path("templates.csv").write_text("language,template\nen,a photo of {}\nen,{c}\nde,ein Bild von {}\n")
    words = ["evaluate", "judge", "--zero-shot", "classes", "--classes", "names.csv", "--templates", "templates.csv"]
    assert main([*words, "-o", "out", "--json", "--bootstrap", "10"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found["languages"]] == ["de", "en"]
    assert [*found["languages"]["en"]] == ["accuracy_at_1", "mean_class_recall"]
    assert found["settings"]["templates"] == {"de": 1, "en": 2} and found["settings"]["images"] == 2
