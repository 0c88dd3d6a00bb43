"""Drawing into folders: other disks, no console, folders with many files, grids of any size, memory that stays flat."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flagai_altdiff import GenerationRequest, Output, Predictor, draw_to_folder, images, runs
from flagai_altdiff.errors import InvalidRequestError, OutputError
from flagai_altdiff.images import highest_number
from flagai_altdiff.metadata import png_texts, read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.output import OpenFolder
from flagai_altdiff.pipeline import GenerationResult, Sample, prepare
from flagai_altdiff.sampling import Step
from tests import tiny
from tests.cost import in_proportion

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 1, "seed": 5}


def draw(model: LatentDiffusion, folder: Path, callback: Any = None, **changes: Any) -> GenerationResult:
    output = {name: changes.pop(name) for name in ("columns", "skip_save", "skip_grid", "resume") if name in changes}
    request = GenerationRequest(prompts=(tiny.CAT,), **{**SMALL, **changes})
    return draw_to_folder(model, request, Output(folder=folder, **output), callback=callback)


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system than ``tmp_path``."""
    place = next(
        (p for p in ("/dev/shm", "/run") if os.path.isdir(p) and os.stat(p).st_dev != tmp_path.stat().st_dev), ""
    )
    if not place:
        pytest.skip("this machine has one file system")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.mark.fault(117)
def test_samples_may_lie_on_another_disk(m9: LatentDiffusion, tmp_path: Path, other_disk: Path) -> None:
    (tmp_path / "samples").symlink_to(other_disk)
    first = draw(m9, tmp_path, images_per_prompt=3)
    assert files(other_disk) == ["00000.png", "00001.png", "00002.png"]
    assert all(Image.open(path).size == (64, 64) for path in first.paths)
    first.paths[1].unlink()
    again = draw(m9, tmp_path, images_per_prompt=3, resume=True)
    assert [path.name for path in again.paths] == ["00000.png", "00003.png", "00002.png"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["grid-0000.png"]


@pytest.mark.fault(117)
def test_a_disk_that_cannot_move_files_leaves_no_empty_one(
    m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Invalid cross-device link"):
        draw(m9, tmp_path)
    assert files(tmp_path) == []


WITHOUT_CONSOLE = """
import sys
sys.stderr = sys.stdout = None
from flagai_altdiff import AutoLoader, Predictor
from flagai_altdiff.cli import main
model = AutoLoader(model_name=sys.argv[1], safety_checker=False).get_model()
result = Predictor(model).predict_generate_images("a cat " * 100, sys.argv[2], n_samples=1, ddim_steps=6, H=64, W=64)
assert len(result.paths) == 1
small = ["-n", "1", "-s", "1", "-H", "64", "-W", "64"]
assert main(["generate", "a cat", "-m", sys.argv[1], "-o", sys.argv[2], *small]) == 0
assert main(["generate", "a cat", "-m", "nothing"]) == 2
"""


@pytest.mark.fault(118)
def test_a_program_without_a_console_draws(m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]) -> None:
    words = [sys.executable, "-c", WITHOUT_CONSOLE, str(m9_folder), str(tmp_path / "out")]
    done = subprocess.run(words, env=script_environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(tmp_path / "out") == ["grid-0000.png", "grid-0001.png", "samples/00000.png", "samples/00001.png"]


@pytest.mark.fault(120)
def test_saved_images_are_not_kept_in_memory(m9: LatentDiffusion, tmp_path: Path) -> None:
    result = draw(m9, tmp_path, images_per_prompt=2)
    pixels = [np.asarray(image) for image in result.images]
    assert all((np.asarray(Image.open(p)) == a).all() for p, a in zip(result.paths, pixels, strict=True))
    kept = weakref.ref(result.samples[0].image)
    gc.collect()
    assert kept() is None
    unsaved = draw(m9, tmp_path / "none", skip_save=True, skip_grid=True)
    assert unsaved.images[0] is unsaved.samples[0].image
    assert not (tmp_path / "none").exists()


@pytest.mark.fault(120)
def test_each_folder_is_looked_through_once(
    m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = os.listdir

    def listdir(path: str) -> list[str]:
        seen.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    draw(m9, tmp_path / "out", images_per_prompt=3, iterations=2)
    assert sorted(seen) == ["out", "samples"]


@pytest.mark.fault(120)
def test_a_grid_of_thousands_is_found_again(
    m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pixels are more than Pillow opens; resume must know it all the same, and not draw it again."""
    first = draw(m9, tmp_path)
    assert first.grid_path is not None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(first.grid_path)
    again = draw(m9, tmp_path, resume=True, callback=lambda step: pytest.fail("it drew"))
    assert again.grid_path == tmp_path / "grid-0000.png"
    assert files(tmp_path) == ["grid-0000.png", "samples/00000.png"]


@pytest.mark.fault(120)
def test_a_grid_that_cannot_be_made_costs_no_image(
    m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(images, "_MAX_GRID_PIXELS", 64 * 64 * 2)
    result = draw(m9, tmp_path, images_per_prompt=3)
    assert result.grid_path is None
    assert [note.kind for note in result.notes] == ["grid"]
    assert "All 3 images are there" in caplog.text
    assert files(tmp_path) == [f"samples/0000{i}.png" for i in range(3)]


def test_a_forged_sample_of_another_size_is_drawn_again(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=2, skip_grid=True)
    texts = images.read_texts(first.paths[1])
    first.paths[1].unlink()
    forged = images.NumberedFolder(tmp_path / "samples", "%05d.png").save(Image.new("RGB", (128, 64)), texts)
    again = draw(m9, tmp_path, images_per_prompt=2, resume=True, skip_grid=True)
    assert forged not in again.paths and len(again.paths) == 2


def test_output_options_are_checked_before_anything_is_written(m9: LatentDiffusion, tmp_path: Path) -> None:
    for name, value in (("columns", -1), ("columns", 1.5), ("skip_grid", "maybe"), ("folder", 7), ("colums", 1)):
        with pytest.raises(InvalidRequestError) as caught:
            Output(**{name: value})  # type: ignore[arg-type]
        assert caught.value.field == name
    assert Output(folder=str(tmp_path), columns=np.int64(3)).columns == 3  # type: ignore[arg-type]
    assert Output(folder=str(tmp_path)).folder == tmp_path  # type: ignore[arg-type]


@pytest.mark.fault(118)
def test_a_models_name_that_is_no_text_is_recorded(m9: LatentDiffusion, tmp_path: Path) -> None:
    """A folder's name in another encoding reaches Python as half surrogates."""
    from dataclasses import replace

    before = m9.spec
    m9.spec = replace(before, name="mod\udce8le")
    try:
        result = draw(m9, tmp_path)
    finally:
        m9.spec = before
    assert read_record(result.paths[0])["model"] == "mod\\udce8le"


@pytest.mark.fault(121)
def test_flagais_call_takes_what_scripts_have(m9: LatentDiffusion, tmp_path: Path) -> None:
    steps: list[Step] = []
    result = Predictor(m9).predict_generate_images(
        tiny.CAT,
        tmp_path / "out",
        n_samples=np.int64(2),  # type: ignore[arg-type]
        n_rows=np.int32(1),  # type: ignore[arg-type]
        H=np.int64(64),  # type: ignore[arg-type]
        W=64,
        ddim_steps=np.int16(1),  # type: ignore[arg-type]
        seed=np.uint32(4294967295),  # type: ignore[arg-type]
        negative_prompt=None,
        callback=steps.append,
    )
    assert result.grid_path is not None and Image.open(result.grid_path).size == (68, 134)
    assert result.request.seed == 4294967295
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"# mine\ra cat\ra dog\r")
    result = Predictor(m9).predict_generate_images(
        from_file=path, outpath=tmp_path / "lines", comments=True, H=64, W=64, ddim_steps=1
    )
    assert [s.prompt for s in result.samples] == ["a cat", "a dog"]


@pytest.mark.parametrize("make", ["file", "dangling link"])
def test_samples_that_cannot_be_a_folder_are_refused_before_drawing(
    make: str, m9: LatentDiffusion, tmp_path: Path
) -> None:
    if make == "file":
        (tmp_path / "samples").touch()
    else:
        (tmp_path / "samples").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="nothing was drawn"):
        draw(m9, tmp_path, callback=lambda step: pytest.fail("it drew"))


def test_a_program_may_change_its_folder(m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    result = draw(m9, Path("out"), images_per_prompt=2, callback=lambda step: os.chdir(tmp_path / "other"))
    assert files(tmp_path) == ["out/grid-0000.png", "out/samples/00000.png", "out/samples/00001.png"]
    assert result.paths[0] == Path("out/samples/00000.png")
    assert len(result.images) == 2


CLOSED_STDERR = """
import os, sys
from flagai_altdiff import draw_to_folder, load_model
model = load_model(sys.argv[1], safety_checker=False)
sys.stderr = open(os.devnull, "w")
sys.stderr.close()
result = draw_to_folder(model, "a cat", sys.argv[2], width=70, height=64, steps=1)
assert [note.kind for note in result.notes] == ["floored size"] and len(result.paths) == 1
"""


@pytest.mark.fault(118)
def test_a_closed_stderr_costs_no_image(m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]) -> None:
    words = [sys.executable, "-c", CLOSED_STDERR, str(m9_folder), str(tmp_path)]
    subprocess.run(words, env=script_environment, timeout=300, check=True)


@pytest.mark.fault(154)
def test_what_a_record_claims_is_believed_within_the_request_only(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=2, skip_grid=True)
    texts = images.read_texts(first.paths[1])
    record = json.loads(texts["flagai_altdiff"])
    for index in (7, -1, 10**30, True, None, "1"):
        forged = {**texts, "flagai_altdiff": json.dumps({**record, "index": index})}
        images.NumberedFolder(tmp_path / "samples", "%05d.png").save(Image.new("RGB", (64, 64)), forged)
    os.mkfifo(tmp_path / "samples" / "00099.png")
    os.mkfifo(tmp_path / "grid-0009.png")
    images.NumberedFolder(tmp_path, "grid-%04d.png").save(Image.new("RGB", (8, 8)), texts)  # a sample, not a grid
    again = draw(m9, tmp_path, images_per_prompt=2, resume=True, callback=lambda step: pytest.fail("it drew"))
    assert again.paths == first.paths
    assert again.grid_path is not None and Image.open(again.grid_path).size == (134, 68)


def test_a_folder_is_enough_to_draw_into(m9: LatentDiffusion, tmp_path: Path) -> None:
    result = draw_to_folder(m9, tiny.CAT, str(tmp_path), **SMALL)
    assert [path.name for path in result.paths] == ["00000.png"]


def test_where_nothing_goes_on_that_is_said(
    m9: LatentDiffusion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(m9, tmp_path, resume=True)
    assert "everything is drawn" in caplog.text


def test_a_number_beyond_belief_blocks_nothing(m9: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / f"{'9' * 250}.png").touch()
    assert [path.name for path in draw(m9, tmp_path).paths] == ["00000.png"]


@pytest.mark.fault(154)
@pytest.mark.parametrize(
    "lie",
    [
        '"index": NaN',
        '"index": 0.0',
        '"index": 1e400',
        f'"index": {"9" * 6000}',
        '"index": [[0]]',
        '"index": ' + "[" * 100_000,
        '"safety": "\\u001b[2J"',
        '"safety": null',
        '"run": "RUN and more"',
        '"run": "RUN\\n"',
        '"run": 7',
    ],
    ids=lambda lie: str(lie)[:20],
)
def test_records_with_odd_values_are_no_records(lie: str, m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=2, skip_grid=True)
    texts = images.read_texts(first.paths[0])
    lie = lie.replace("RUN", json.loads(texts["flagai_altdiff"])["run"])
    texts["flagai_altdiff"] = texts["flagai_altdiff"].removesuffix("}") + f", {lie}" + "}"  # the last of two counts
    for path in first.paths:
        path.unlink()
    images.NumberedFolder(tmp_path / "samples", "%05d.png").save(Image.new("RGB", (64, 64)), texts)
    again = draw(m9, tmp_path, images_per_prompt=2, resume=True, skip_grid=True)
    assert [path.name for path in again.paths] == ["00001.png", "00002.png"]  # both were drawn


@pytest.mark.fault(154)
def test_a_forged_record_decides_neither_prompt_nor_seed(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=2, skip_grid=True, seed_mode="per_image")
    texts = images.read_texts(first.paths[0])
    record = json.loads(texts["flagai_altdiff"])
    texts["flagai_altdiff"] = json.dumps({**record, "prompt": "\x1b[2J" * 1000, "seed": float("nan"), "index": 0})
    first.paths[0].unlink()
    images.NumberedFolder(tmp_path / "samples", "%05d.png").save(Image.new("RGB", (64, 64)), texts)
    again = draw(m9, tmp_path, images_per_prompt=2, skip_grid=True, seed_mode="per_image", resume=True)
    assert [(s.prompt, s.seed) for s in again.samples] == [(s.prompt, s.seed) for s in first.samples]


@pytest.mark.fault(154)
def test_an_image_of_another_size_is_not_finished(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=1, skip_grid=True)
    texts = images.read_texts(first.paths[0])
    first.paths[0].unlink()
    images.NumberedFolder(tmp_path / "samples", "%05d.png").save(Image.new("1", (13_000, 13_000)), texts)
    with in_proportion(1_000_000, seconds=5):
        again = draw(m9, tmp_path, images_per_prompt=1, skip_grid=True, resume=True)
    assert [path.name for path in again.paths] == ["00001.png"]


@pytest.mark.fault(155)
def test_samples_that_are_exchanged_while_it_draws_are_not_written_through(m9: LatentDiffusion, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "out"

    def exchange(step: Step) -> None:
        if (out / "samples" / "00000.png").exists() and not (out / "samples").is_symlink():
            (out / "samples").rename(tmp_path / "moved")
            (out / "samples").symlink_to("../elsewhere")

    with pytest.raises(OutputError, match="another folder was put in its place"):
        draw(m9, out, images_per_prompt=1, iterations=2, callback=exchange)
    assert files(tmp_path) == ["moved/00000.png"]


@pytest.mark.fault(154)
def test_a_forged_grid_is_no_grid(m9: LatentDiffusion, tmp_path: Path) -> None:
    first = draw(m9, tmp_path, images_per_prompt=2)
    assert first.grid_path is not None
    texts = images.read_texts(first.grid_path)
    first.grid_path.unlink()
    images.NumberedFolder(tmp_path, "grid-%04d.png").save(Image.new("RGB", (1, 1)), texts)
    again = draw(m9, tmp_path, images_per_prompt=2, resume=True)
    assert again.grid_path == tmp_path / "grid-0001.png" and Image.open(again.grid_path).size == (134, 68)
    assert draw(m9, tmp_path, images_per_prompt=2, resume=True).grid_path == again.grid_path


def counted(looks: list[object], look: Callable[..., Any], *args: object) -> Any:
    looks.append(args)
    return look(*args)


def test_a_folder_is_looked_through_once_for_many_requests(
    m9: LatentDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file of n requests would read n times n images when it goes on."""
    small: dict[str, Any] = {"steps": 1, "height": 64, "width": 64}
    requests = [GenerationRequest(prompts=(f"a cat {n}",), seed=n, **small) for n in range(5)]
    place = OpenFolder(Output(folder=tmp_path))
    for request in requests[:4]:
        draw_to_folder(m9, request, place)
    looks: list[object] = []
    monkeypatch.setattr(runs, "read_record", partial(counted, looks, read_record))
    monkeypatch.setattr(images, "highest_number", partial(counted, looks, highest_number))
    place = OpenFolder(Output(folder=tmp_path, resume=True))
    results = [draw_to_folder(m9, request, place) for request in requests]
    assert [result.paths[0].name for result in results] == [f"{n:05d}.png" for n in range(5)]
    assert [result.grid_path.name for result in results if result.grid_path] == [f"grid-{n:04d}.png" for n in range(5)]
    assert len(looks) <= 4 + 4 + 4 + 2  # images; grids, and once more for their size; the two numberings


def test_a_record_does_not_spell_the_other_prompts(m9: LatentDiffusion) -> None:
    """Else a file of n prompts would be written n times."""
    request, _ = prepare(
        m9, GenerationRequest(prompts=tuple(f"{'a cat ' * 9}{n}" for n in range(5000)), seed=1, steps=1)
    )
    sample = Sample(prompt="a cat 5", index=5, seed=6, safety="unchecked")
    png_texts(sample, request, "m9", "run")
    tracemalloc.start()
    texts = png_texts(sample, request, "m9", "run")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000  # all prompts are 300,000 characters
    assert json.loads(texts["flagai_altdiff"])["prompt_count"] == 5000
