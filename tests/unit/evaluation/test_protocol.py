"""The papers' protocol on a tiny model: whose images, which numbers, and what happens to work that was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flagai_altdiff.decoding import open_image
from flagai_altdiff.errors import InvalidRequestError, OutputError
from flagai_altdiff.evaluation.measuring import Share
from flagai_altdiff.evaluation.metrics import FrechetDistance, Moments
from flagai_altdiff.evaluation.protocol import Evaluation
from flagai_altdiff.evaluation.references import Crop, find_images
from flagai_altdiff.evaluation.scorers import AltCLIPFeatures, ClipSimilarity
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.pipeline import generate
from tests import tiny

PROMPTS = {
    "en": tuple(Prompt(id=str(i), text=text, english=text) for i, text in enumerate(("a cat", "a dog", "a hen"))),
    "zh": (Prompt(id="0", text="一只猫", english="a cat"), Prompt(id="9", text="一" * 200)),
}
SMALL = {"steps": 1, "height": 64, "width": 64, "batch_size": 2}

Make = Callable[..., Evaluation]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> AltCLIP:
    return load_matching_model(tiny.write_altclip_folder(tmp_path_factory.mktemp("judge")))


@pytest.fixture
def make(m9: LatentDiffusion, judge: AltCLIP, tmp_path: Path) -> Make:
    def make(**changes: Any) -> Evaluation:
        values: dict[str, Any] = {
            "model": m9,
            "prompts": PROMPTS,
            "folder": tmp_path / "out",
            "scorers": [ClipSimilarity(judge)],
            "options": SMALL,
            "facts": {"model": "tiny"},
            "bootstrap": 20,
        }
        return Evaluation(**(values | changes))

    return make


def pictures(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((70 + i, 60), 40 + i).convert("RGB").save(folder / f"{i}.png")
    return [path for path in find_images(folder) if isinstance(path, Path)]


def files(folder: Path) -> Mapping[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_the_protocol_is_the_papers(make: Make) -> None:
    settings = make(options={"height": 64, "width": 64}).settings
    assert (settings.sampler, settings.steps, settings.guidance_scale, settings.eta) == ("ddim", 50, 9.0, 0.0)
    assert (settings.seed, settings.negative_prompt, settings.batch_size) == (54551, "", 10)
    assert make(options={}).settings.height == 512
    with pytest.raises(InvalidRequestError, match="steps=0"):
        _ = make(options={"steps": 0}).settings


def test_images_are_those_of_the_pipeline(make: Make, m9: LatentDiffusion) -> None:
    task = make()
    task.work(Share())
    options: dict[str, Any] = {**SMALL, "seed": 54551, "guidance_scale": 9.0}
    wanted = generate(m9, [prompt.text for prompt in PROMPTS["en"]], **options).images
    drawn = [open_image(task.folder / "en" / f"0000{i}.png") for i in range(3)]
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in wanted]


@pytest.mark.parametrize("processes", [2, 3, 7])
def test_any_number_of_processes_does_the_same_work(processes: int, make: Make, tmp_path: Path) -> None:
    references = pictures(tmp_path / "pictures", 3)
    one, many = (make(folder=tmp_path / name, pictures=references) for name in ("one", "many"))
    one.work(Share())
    for rank in reversed(range(processes)):
        assert not many.complete
        many.work(Share(rank, processes))
    assert many.complete and one.complete
    assert files(many.folder) == files(one.folder)
    assert len([*one.folder.glob("*/*.png")]) == 5
    assert many.report().as_json() == one.report().as_json()


def test_work_goes_on_where_it_stopped(make: Make, tmp_path: Path) -> None:
    task = make()
    task.work(Share())
    before = files(task.folder)
    (task.folder / "en" / "00001.png").unlink()
    cut = task.folder / "zh" / "00000.png"
    cut.write_bytes(cut.read_bytes()[:500])
    next(task.folder.glob("measured/zh-*/000000.safetensors")).unlink()
    kept = (task.folder / "en" / "00000.png").stat().st_mtime_ns
    again = make()
    assert not again.complete
    again.work(Share())
    assert files(task.folder) == before
    assert (task.folder / "en" / "00000.png").stat().st_mtime_ns == kept
    untouched = {path: path.stat().st_mtime_ns for path in task.folder.rglob("*.*")}
    make().work(Share())
    assert {path: path.stat().st_mtime_ns for path in task.folder.rglob("*.*")} == untouched


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {**SMALL, "guidance_scale": 5.0}}, "guidance_scale is 9.0, not 5.0"),
        ({"prompts": {"en": (Prompt(id="0", text="a cow"),)}}, "prompt is 'a cat', not 'a cow'"),
        ({"facts": {"model": "other"}}, "model is 'tiny', not 'other'"),
    ],
)
def test_images_of_other_settings_are_never_taken_for_these(
    changes: Mapping[str, Any], message: str, make: Make
) -> None:
    make().work(Share())
    with pytest.raises(OutputError, match=message):
        make(**changes).work(Share())


def test_weights_that_were_trained_on_are_others(make: Make) -> None:
    make().work(Share())
    model = tiny.fresh_model("m9")
    with torch.no_grad():
        next(model.model.diffusion_model.parameters()).add_(1e-3)
    other = make(model=model)
    with pytest.raises(OutputError, match="run is 'evaluation-"):
        other.drawings[0].missing([0])


def test_an_image_of_somebody_else_is_not_replaced(make: Make) -> None:
    theirs = make().folder / "en" / "00000.png"
    theirs.parent.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(theirs)
    with pytest.raises(OutputError, match="--outdir"):
        make().work(Share())
    assert open_image(theirs).size == (9, 9)


def test_numbers_are_those_of_the_images(make: Make, judge: AltCLIP, tmp_path: Path) -> None:
    references = pictures(tmp_path / "pictures", 40)
    (tmp_path / "pictures" / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "pictures" / "empty.png").touch()
    os.mkfifo(tmp_path / "pictures" / "pipe.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    scorer = AltCLIPFeatures(judge)
    task = make(pictures=find_images(tmp_path / "pictures"), features=scorer)
    task.work(Share())
    report = task.report()
    crop = Crop(width=64, height=64)
    real = scorer.score([crop(open_image(path)) for path in references], ())["features"]
    drawn = scorer.score([open_image(path) for path in sorted((task.folder / "en").iterdir())], ())["features"]
    wanted = FrechetDistance(Moments.of([real]))(drawn)
    fid = report.languages["en"]["fid"]
    assert fid.value == pytest.approx(wanted, rel=1e-4) and fid.count == 3
    assert (fid.low or 0) <= fid.value <= (fid.high or 0)
    similarity = report.languages["zh"]["clip_similarity"]
    assert similarity.value == similarity.value  # the second has no English, and does not count
    notes = "\n".join(report.notes)
    assert "broken reference images, left out: 3" in notes
    assert all(name in notes for name in ("broken.jpg", "empty.png", "pipe.png"))
    assert "FID from no more images than features (24)" in notes and "en (3 images, 40 references)" in notes
    assert "zh: prompts longer than 77 tokens, cut: 1, by id 9" in notes
    assert "zh: prompts without English captions: 1, by id 9" in notes
    assert report.settings["reference images"] == 40 and report.settings["steps"] == 1


def test_a_language_may_have_reference_images_of_its_own(make: Make, judge: AltCLIP, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "pictures", 5)
    prompts = {
        language: tuple(Prompt(id=str(i), text="a cat", image=paths[i]) for i in own)
        for language, own in (("en", (0, 1, 2)), ("fr", (2, 3, 4)))
    }
    scorer = AltCLIPFeatures(judge)
    task = make(prompts=prompts, features=scorer)
    task.work(Share())
    crop = Crop(width=64, height=64)
    real = scorer.score([crop(open_image(path)) for path in paths[2:]], ())["features"]
    drawn = scorer.score([open_image(path) for path in sorted((task.folder / "fr").iterdir())], ())["features"]
    wanted = FrechetDistance(Moments.of([real]))(drawn)
    assert task.report().languages["fr"]["fid"].value == pytest.approx(wanted, rel=1e-4)


def test_too_few_images_have_no_fid(make: Make, judge: AltCLIP, tmp_path: Path) -> None:
    task = make(pictures=pictures(tmp_path / "pictures", 1), features=AltCLIPFeatures(judge))
    task.work(Share())
    report = task.report()
    assert "fid" not in report.languages["en"] and "no FID" in "\n".join(report.notes)


def test_several_images_of_a_prompt(make: Make) -> None:
    task = make(options={**SMALL, "images_per_prompt": 3})
    task.work(Share())
    assert len([*(task.folder / "en").iterdir()]) == 9
    assert task.report().languages["en"]["clip_similarity"].count == 9
    assert task.drawings[0].prompt_of(5).text == "a dog"


def test_a_damaged_measurement_is_named(make: Make) -> None:
    task = make()
    task.work(Share())
    path = next(task.folder.glob("measured/en-*/000000.safetensors"))
    path.write_bytes(b"nothing")
    with pytest.raises(OutputError, match=str(path)):
        task.report()


def test_the_report_is_json_without_nan(make: Make) -> None:
    prompts = {"zh": (Prompt(id="0", text="一只猫"), Prompt(id="1", text="一只狗"))}
    task = make(prompts=prompts)
    task.work(Share())
    found = json.loads(task.report().as_json())
    assert found["languages"] == {"zh": {}} and found["settings"]["seed"] == 54551


@pytest.mark.parametrize(
    "environment", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"WORLD_SIZE": "0"}, {"RANK": "-1"}]
)
def test_a_share_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError, match="RANK"):
        Share.of_environment(environment)


def test_shares_are_all_of_the_work() -> None:
    shares = [Share.of_environment({"RANK": str(rank), "WORLD_SIZE": "3"}) for rank in range(3)]
    assert sorted(number for share in shares for number in share.of(10, 7)) == [*range(10)]
    assert Share.of_environment({}) == Share(0, 1)
