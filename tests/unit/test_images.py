"""Pixels, grids, and files that appear whole under numbers that are never used twice."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flagai_altdiff.images import NumberedFolder, load_image, make_grid, read_texts, to_pil


def plain(color: int, size: tuple[int, int] = (4, 3)) -> Image.Image:
    return Image.new("RGB", size, (color, color, color))


def save_numbered(image: Image.Image, folder: Path, pattern: str, texts: Mapping[str, str] | None = None) -> Path:
    return NumberedFolder(folder, pattern).save(image, texts or {})


def test_values_are_cut_off_not_rounded() -> None:
    levels = torch.tensor([-2.0, -1.0, -1 + 2 * 0.999 / 255, -1 + 2 * 7.6 / 255, 0.0, 0.9999, 1.0, 5.0])
    image = to_pil(levels.expand(1, 3, 1, -1))[0]
    assert image.mode == "RGB" and image.size == (8, 1)
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 7, 127, 254, 255, 255]


def test_channels_and_sides_stay_where_they_are() -> None:
    images = torch.full((2, 3, 2, 5), -1.0)
    images[1, 0, 1, 4] = 1.0
    first, second = to_pil(images.to(torch.float16))
    assert second.size == (5, 2)
    assert second.getpixel((4, 1)) == (255, 0, 0)
    assert np.asarray(first).sum() == 0
    assert np.asarray(second).sum() == 255


def test_a_single_image_is_its_own_grid() -> None:
    image = plain(9)
    grid = make_grid([image], 1, 4)
    assert grid.size == image.size and grid.getpixel((0, 0)) == (9, 9, 9)
    assert grid is not image


def test_a_grid_has_two_black_pixels_around_each_image() -> None:
    grid = np.asarray(make_grid([plain(50), plain(100), plain(200)], 3, 2))[..., 0]
    expected = np.zeros((2 + 2 * (3 + 2), 2 + 2 * (4 + 2)))
    expected[2:5, 2:6], expected[2:5, 8:12], expected[7:10, 2:6] = 50, 100, 200
    assert np.array_equal(grid, expected)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 9), columns=st.integers(1, 12))
def test_every_image_is_in_the_grid_once(n: int, columns: int) -> None:
    grid = np.asarray(make_grid((plain(10 + i) for i in range(n)), n, columns))[..., 0]
    assert [int((grid == 10 + i).sum()) for i in range(n)] == [12] * n
    assert grid.shape[1] == 2 + 6 * min(columns, n)


@pytest.mark.fault(54)
def test_numbers_go_on_behind_the_highest(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    assert save_numbered(plain(1), samples, "%05d.png").name == "00000.png"
    assert save_numbered(plain(1), samples, "%05d.png").name == "00001.png"
    (samples / "00000.png").unlink()
    assert save_numbered(plain(1), samples, "%05d.png").name == "00002.png"
    (samples / "00041.png").touch()
    assert save_numbered(plain(1), samples, "%05d.png").name == "00042.png"
    (samples / "99999.png").touch()
    assert save_numbered(plain(1), samples, "%05d.png").name == "100000.png"
    assert save_numbered(plain(1), samples, "%05d.png").name == "100001.png"


def test_foreign_files_count_for_nothing(tmp_path: Path) -> None:
    for name in ("notes.txt", "00007.jpg", "x00008.png", "00009.png.bak", "grid-0003.png", ".DS_Store", "-0001.png"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "folder").mkdir()
    assert save_numbered(plain(1), tmp_path, "%05d.png").name == "00000.png"
    assert save_numbered(plain(1), tmp_path, "grid-%04d.png").name == "grid-0004.png"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_of_that_name_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "00000.png").mkdir()
    path = save_numbered(plain(1), tmp_path, "%05d.png")
    assert path.is_file() and path.name == "00001.png"


def test_the_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    for umask in (0o022, 0o077, 0o002):
        before = os.umask(umask)
        try:
            path = save_numbered(plain(1), tmp_path, "%05d.png")
            assert os.umask(umask) == umask  # and the process's mask is what it was
        finally:
            os.umask(before)
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_an_unfinished_file_never_stays(tmp_path: Path) -> None:
    class Broken(Image.Image):
        def save(self, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_numbered(Broken(), tmp_path / "samples", "%05d.png")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        save_numbered(plain(1), tmp_path / "file" / "samples", "%05d.png")


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=2000))
def test_texts_survive_in_the_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save_numbered(plain(1), tmp_path_factory.mktemp("texts"), "%05d.png", {"parameters": text})
    with Image.open(path) as image:
        assert image.text["parameters"] == text  # type: ignore[attr-defined]


WRITER = """
import sys
from pathlib import Path
from PIL import Image
from flagai_altdiff.images import NumberedFolder
print("ready", flush=True)
sys.stdin.readline()
color, folder = int(sys.argv[1]), NumberedFolder(Path(sys.argv[2]) / "samples", "%05d.png")
for i in range(20):
    folder.save(Image.new("RGB", (2, 2), (color, i, 0)), {})
"""


NO_LINKS = """
import os
def link(*args, **kwargs):
    raise PermissionError("a file system without hard links")
os.link = link
"""


@pytest.mark.fault(54)
@pytest.mark.parametrize("hard_links", [True, False])
def test_two_processes_lose_no_image(hard_links: bool, tmp_path: Path, script_environment: dict[str, str]) -> None:
    script = WRITER if hard_links else NO_LINKS + WRITER
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(color), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=script_environment,
            text=True,
        )
        for color in (1, 2)
    ]
    for writer in writers:
        assert writer.stdout and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    files = sorted((tmp_path / "samples").iterdir())
    assert [f.name for f in files] == [f"{i:05d}.png" for i in range(40)]
    pixels = {Image.open(f).convert("RGB").getpixel((0, 0)) for f in files}
    assert pixels == {(color, i, 0) for color in (1, 2) for i in range(20)}
    assert [p for p in tmp_path.iterdir() if p.name != "samples"] == []


def test_a_folder_is_looked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[object] = []
    real = os.listdir

    def listdir(path: str) -> list[str]:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    folder = NumberedFolder(tmp_path, "%05d.png")
    names = [folder.save(plain(1), {}).name for _ in range(5)]
    assert names == [f"{i:05d}.png" for i in range(5)]
    assert len(listed) == 1


def test_two_writers_of_one_process_share_a_folder(tmp_path: Path) -> None:
    first, second = NumberedFolder(tmp_path, "%05d.png"), NumberedFolder(tmp_path, "%05d.png")
    names = [folder.save(plain(1), {}).name for folder in (first, second, second, first, second)]
    assert names == [f"{i:05d}.png" for i in range(5)]


def test_a_large_grid_of_ours_is_no_bomb(tmp_path: Path) -> None:
    """Pillow's Image.open refuses 180 million pixels; what we wrote ourselves is read."""
    path = save_numbered(Image.new("L", (20_000, 10_000)), tmp_path, "grid-%04d.png", {"key": "text"})
    assert read_texts(path)["key"] == "text"
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_a_file_of_another_size_is_refused_before_its_pixels_are_read(tmp_path: Path) -> None:
    path = save_numbered(plain(1), tmp_path, "%05d.png")
    assert load_image(path, size=(4, 3)).size == (4, 3)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(ValueError, match="60000x60000"):
        load_image(path, size=(4, 3))


def test_a_grid_that_nothing_can_show_is_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"10000 images of 512x512 make a grid of \d+x\d+ px"):
        make_grid((plain(1, (512, 512)) for _ in range(10_000)), 10_000, 4)
