"""An interrupted call goes on, and its set of pictures is the one that an uninterrupted call makes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from flagai_altdiff import Predictor
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import GenerationResult
from flagai_altdiff.sampling import Step
from tests import tiny

REQUEST: dict[str, Any] = {"n_samples": 2, "n_iter": 3, "ddim_steps": 2, "H": 64, "W": 64, "seed": 11}
PROMPTS = [tiny.CAT, tiny.SENTENCES[5]]
TOTAL = 12


def draw(model: LatentDiffusion, folder: Path, **changes: Any) -> GenerationResult:
    return Predictor(model).predict_generate_images(PROMPTS, folder, **{**REQUEST, **changes})


def interrupted(model: LatentDiffusion, folder: Path, at_step: int, **changes: Any) -> None:
    seen: list[Step] = []

    def stop(step: Step) -> None:
        seen.append(step)
        if len(seen) == at_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(model, folder, callback=stop, **changes)


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): Image.open(p).tobytes() for p in sorted(folder.rglob("*.png"))}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"seed_mode": "per_image"},
    {"plms": True},
    {"ddim_eta": 0.7},
    {"sampler": "euler_ancestral"},
    {"sampler": "dpmpp_2m", "fixed_code": True},
]


@pytest.mark.fault(53)
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_finished_set_is_that_of_an_uninterrupted_run(
    changes: dict[str, Any], m9: LatentDiffusion, tmp_path: Path
) -> None:
    whole = draw(m9, tmp_path / "whole", **changes)
    interrupted(m9, tmp_path / "cut", at_step=6, **changes)
    assert 0 < len(pictures(tmp_path / "cut")) < TOTAL
    resumed = draw(m9, tmp_path / "cut", resume=True, **changes)
    assert pictures(tmp_path / "cut") == pictures(tmp_path / "whole")
    assert [p.prompt for p in resumed.samples] == [p.prompt for p in whole.samples]
    assert (resumed.seeds, resumed.safety) == (whole.seeds, whole.safety)
    assert [p.relative_to(tmp_path / "cut") for p in resumed.paths] == [
        p.relative_to(tmp_path / "whole") for p in whole.paths
    ]


@pytest.mark.fault(53)
def test_a_batch_that_was_saved_in_part_is_completed(m9: LatentDiffusion, tmp_path: Path) -> None:
    whole = draw(m9, tmp_path / "whole")
    cut = draw(m9, tmp_path / "cut")
    assert cut.grid_path is not None
    cut.grid_path.unlink()
    for path in cut.paths[5:]:
        path.unlink()
    steps: list[Step] = []
    draw(m9, tmp_path / "cut", resume=True, callback=steps.append)
    assert pictures(tmp_path / "cut") == pictures(tmp_path / "whole")
    assert len(steps) == 2 * 4, "the batch of picture 5 and the three behind it"
    assert len(whole.samples) == TOTAL


def test_a_run_that_is_complete_is_left_alone(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path)
    before = pictures(tmp_path)
    again = draw(m9, tmp_path, resume=True, callback=lambda step: pytest.fail("it drew"))
    assert pictures(tmp_path) == before
    assert (again.paths, again.grid_path) == (first.paths, first.grid_path)


def test_only_the_latest_run_of_the_very_request_goes_on(m9: LatentDiffusion, tmp_path: Path) -> None:
    draw(m9, tmp_path)
    interrupted(m9, tmp_path, at_step=4)
    draw(m9, tmp_path, seed=12, n_iter=1)
    result = draw(m9, tmp_path, resume=True)
    numbers = [int(path.stem) for path in result.paths]
    assert numbers == [12, *range(13, 13 + 1), *range(18, 18 + 10)]
    fresh = draw(m9, tmp_path, resume=True, scale=3.0, n_iter=1)
    assert len(fresh.samples) == 4 and min(int(path.stem) for path in fresh.paths) == 28


def test_without_resume_everything_is_drawn_anew(m9: LatentDiffusion, tmp_path: Path) -> None:
    first, second = draw(m9, tmp_path, n_iter=1), draw(m9, tmp_path, n_iter=1)
    runs = [{read_record(path)["run"] for path in result.paths} for result in (first, second)]
    assert len(runs[0]) == len(runs[1]) == 1 and runs[0] != runs[1]
    assert [read_record(path)["index"] for path in second.paths] == [0, 1, 2, 3]


def test_pictures_that_cannot_be_read_are_drawn_again(m9: LatentDiffusion, tmp_path: Path) -> None:
    draw(m9, tmp_path / "whole")
    cut = draw(m9, tmp_path / "cut", skip_grid=True)
    data = cut.paths[3].read_bytes()
    cut.paths[3].write_bytes(data[: len(data) * 2 // 3])
    resumed = draw(m9, tmp_path / "cut", resume=True, skip_grid=True)
    assert [p.stem for p in resumed.paths[2:5]] == ["00002", "00012", "00004"]
    wanted = pictures(tmp_path / "whole")
    assert [image.tobytes() for image in resumed.images] == [wanted[f"samples/{i:05d}.png"] for i in range(TOTAL)]


@pytest.mark.parametrize("changes", [{"seed": -1}, {"seed": None}, {"skip_save": True}])
def test_what_cannot_be_resumed_is_refused(changes: dict[str, Any], m9: LatentDiffusion, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="resume") as caught:
        draw(m9, tmp_path / "out", resume=True, **changes)
    assert caught.value.field == next(iter(changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.fault(45)
def test_records_of_strange_files_are_empty(tmp_path: Path) -> None:
    huge = PngImagePlugin.PngInfo()
    huge.add_itxt("flagai_altdiff", '{"run": "' + "a" * (64 << 20) + '"}', zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=huge)
    for name, record in (("list", "[1]"), ("text", "no json"), ("deep", "[" * 100_000), ("number", "1e999")):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("flagai_altdiff", record)
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", "JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    header = bytearray((tmp_path / "list.png").read_bytes())
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "giant.png").write_bytes(header)
    for path in sorted(tmp_path.iterdir()):
        assert read_record(path) == {}, path.name
