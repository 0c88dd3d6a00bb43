"""Pixels, grids, and files that appear whole under numbers that are never used twice."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import NumberedFolder, load_image, make_grid, read_texts, to_pil
from tests.cost import in_proportion


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
    with pytest.raises(ImageError, match="60000x60000"):
        load_image(path, size=(4, 3))


def test_a_grid_that_nothing_can_show_is_refused_before_memory_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"10000 images of 512x512 make a grid of \d+x\d+ px"):
        make_grid((plain(1, (512, 512)) for _ in range(10_000)), 10_000, 4)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(*between: bytes, width: int = 4, height: int = 3, behind: bytes = b"", bits: int = 8, color: int = 2) -> bytes:
    """A PNG with further chunks before and behind its pixels."""
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([bits, color, 0, 0, 0])
    rows = zlib.compress((b"\0" + b"\x07" * 12) * 3)
    body = [chunk(b"IHDR", head), *between, chunk(b"IDAT", rows), behind, chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


PACKED = chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress("\U0001f600".encode() * 250_000))
HOSTILE = {
    "empty": b"",
    "another format": b"GIF89a" + bytes(100),
    "truncated": png()[:-30],
    "a length of 4 GiB": png(b"\xff\xff\xff\xfftEXt"),
    "texts that unpack to gigabytes": png(*[PACKED] * 1000),
    "such texts behind the pixels": png(behind=PACKED * 1000),
    "a profile in every chunk": png(*[chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 100),
    "a million empty chunks": png(*[chunk(b"tIME")] * 80_000),
    "pixels in empty chunks": png(behind=chunk(b"IDAT") * 80_000),
    "pixels for 17 GB": png(width=1 << 31 - 1, height=1),
    "no pixels for so large an image": png(width=65_000, height=65_000),
    "of no width": png(width=0),
    "an odd number of bits": png(bits=77),
    "no header": b"\x89PNG\r\n\x1a\n" + chunk(b"IEND"),
}


@pytest.mark.fault(45)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_images_are_refused_at_once(what: str, tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(HOSTILE[what])
    with in_proportion(len(HOSTILE[what])), pytest.raises(ImageError, match=r"00000\.png"):
        load_image(path, size=(4, 3))
    if "pixels for" not in what:  # nobody reads the pixels for the texts
        with in_proportion(len(HOSTILE[what])), pytest.raises(ImageError, match=r"00000\.png"):
            read_texts(path)


def test_what_other_programs_add_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "00000.png"
    path.write_bytes(png(*[chunk(b"tEXt", b"key\0text")] * 4, chunk(b"tIME", bytes(7)), chunk(b"pHYs", bytes(9))))
    assert load_image(path, size=(4, 3)).getpixel((0, 0)) == (7, 7, 7) and read_texts(path)["key"] == "text"


@pytest.mark.fault(45)
@settings(max_examples=int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60")), deadline=None)
@given(data=st.data())
def test_a_damaged_image_loads_or_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = st.sampled_from(
        [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"gAMA", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT"]
    )
    texts = st.sampled_from([b"key\0", b"key\0\0", b"key\0\1\0\0\0", b"\0", b""])
    packed = st.one_of(st.binary(max_size=40), st.binary(max_size=40).map(zlib.compress))
    chunks = st.builds(lambda kind, text, rest: chunk(kind, text + rest), kinds, texts, packed)
    made = png(
        *data.draw(st.lists(chunks, max_size=12)),
        width=data.draw(st.sampled_from([4, 4, 4, 0, 1 << 30])),
        bits=data.draw(st.sampled_from([8, 8, 8, 1, 16, 255])),
        color=data.draw(st.sampled_from([2, 2, 2, 0, 3, 6, 9])),
        behind=b"".join(data.draw(st.lists(chunks, max_size=3))),
    )
    end = data.draw(st.integers(0, len(made)) | st.just(len(made)))
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(made[:end])
    for read in (lambda: load_image(path, size=(4, 3)), lambda: read_texts(path)):
        with suppress(ImageError), in_proportion(end):
            read()


@pytest.mark.fault(154)
def test_only_ordinary_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    for path in [*tmp_path.iterdir(), tmp_path / "gone.png", tmp_path / ("n" * 300)]:
        with pytest.raises(ImageError):
            load_image(path)
        with pytest.raises(ImageError):
            read_texts(path)


@pytest.mark.fault(154)
def test_a_number_of_any_length_blocks_nothing(tmp_path: Path) -> None:
    for name in ("9" * 12, "9" * 13, "9" * 200, "\u0669" * 5):
        (tmp_path / f"{name}.png").touch()
    names = [save_numbered(plain(1), tmp_path, "%05d.png").name for _ in range(3)]
    assert names == ["1000000000000.png", "1000000000001.png", "1000000000002.png"]
    assert [save_numbered(plain(1), tmp_path / "other", "%05d.png").name for _ in range(2)] == [
        "00000.png",
        "00001.png",
    ]


@pytest.mark.fault(155)
def test_a_folder_that_is_exchanged_for_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = NumberedFolder(tmp_path / "samples", "%05d.png")
    first = folder.save(plain(1), {})
    (tmp_path / "samples").rename(tmp_path / "moved")
    (tmp_path / "samples").symlink_to("elsewhere")
    with pytest.raises(FileExistsError, match="another folder was put in its place"):
        folder.save(plain(1), {})
    assert [p.name for p in (tmp_path / "moved").iterdir()] == [first.name]
    assert [*(tmp_path / "elsewhere").iterdir()] == []


@pytest.mark.fault(155)
@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root can make another user's link")
def test_a_link_of_another_user_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "samples").symlink_to("elsewhere")
    os.chown(tmp_path / "samples", 4242, 4242, follow_symlinks=False)
    with pytest.raises(PermissionError, match="a link that another user made"):
        save_numbered(plain(1), tmp_path / "samples", "%05d.png")
    assert [*(tmp_path / "elsewhere").iterdir()] == []


@pytest.mark.fault(155)
def test_links_of_the_next_names_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    for i in range(3):
        (tmp_path / f"{i:05d}.png").symlink_to("victim" if i else "nowhere")
    assert save_numbered(plain(1), tmp_path, "%05d.png").name == "00003.png"
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "nowhere").exists()
