"""Pictures that a drawing begins with: every kind of file becomes what it should be, or an error that says why not."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import (
    Picture,
    area_around,
    as_margins,
    as_picture,
    composed,
    extended,
    fitted,
    margins_of,
    mask_of,
    on_ground,
    softened,
    with_margins,
)
from flagai_altdiff.request import GenerationRequest


def picture(path: Any) -> Picture:
    found = as_picture(path)
    assert isinstance(found, Picture)
    return found


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red at the left, blue at the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


@pytest.mark.fault(43)
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png"), ("RGB", "webp")],
)
def test_every_mode_becomes_colours(mode: str, suffix: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 40), 40_000, np.uint16))
    else:
        image = halves().convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    found = on_ground(picture(tmp_path / f"a.{suffix}"), "white")
    assert found.mode == "RGB" and found.size == (40, 20)
    if mode in ("P", "RGBA", "CMYK", "RGB"):
        assert np.abs(np.asarray(found).astype(int) - np.asarray(halves()).astype(int)).mean() < 12


@pytest.mark.fault(43)
def test_a_turned_photograph_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = picture(tmp_path / "a.jpg").image
    assert found.size == (20, 40) and found.getpixel((10, 5))[0] > 200  # type: ignore[index]


@pytest.mark.fault(43)
def test_transparency_is_laid_over_a_colour(tmp_path: Path) -> None:
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 20, 20))
    image.save(tmp_path / "a.png")
    one = picture(tmp_path / "a.png")
    assert one.image.mode == "RGBA"
    assert on_ground(one, "white").getpixel((2, 2)) == (255, 255, 255)
    assert on_ground(one, "#ff8800").getpixel((2, 2)) == (255, 136, 0)
    mask = np.asarray(mask_of(one, "alpha"))
    assert (mask[:, :20] == 255).all() and (mask[:, 20:] == 0).all()


@pytest.mark.fault(43)
def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    halves().save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 20), "green")])
    red = on_ground(picture(tmp_path / "a.gif"), "white").getpixel((2, 2))
    assert red == (254, 0, 0) or red == (255, 0, 0)


def bomb(path: Path) -> Path:
    """A PNG of 50,000 x 50,000 px in 100 bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


@pytest.mark.fault(43)
def test_files_that_are_no_pictures_are_refused_with_the_reason(tmp_path: Path) -> None:
    halves(400, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    for path, reason in (
        (tmp_path / "cut.png", "truncated"),
        (tmp_path / "text.png", "not an image"),
        (tmp_path / "empty.png", "empty"),
        (tmp_path / "gone.png", "No such file"),
        (tmp_path, "directory"),
        (bomb(tmp_path / "bomb.png"), "more pixels than allowed"),
    ):
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            GenerationRequest(prompts=("a",), init_image=path)
        assert caught.value.field == "init_image"
    for value in (3, b"bytes", ["a.png"], ""):
        with pytest.raises(InvalidRequestError, match="init_image"):
            GenerationRequest(prompts=("a",), init_image=value)
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    assert picture(tmp_path / "one.png").image.size == (1, 1)


@pytest.mark.fault(44)
def test_masks_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    image = halves()
    white, black = Image.new("L", (40, 20), 255), Image.new("L", (40, 20))
    for mask, reason in (
        (Image.new("L", (20, 20), 255), "mask is 20x20 px, the picture 40x20"),
        (black, "nothing of the mask is white"),
        ("alpha", "transparent nowhere"),
        ("10,10,50,20", "within 40x20 px"),
        ("10,10,10,20", "left < right"),
    ):
        with pytest.raises(InvalidRequestError, match=reason) as caught:
            GenerationRequest(prompts=("a",), init_image=image, mask_image=mask)
        assert caught.value.field == "mask_image"
    assert GenerationRequest(prompts=("a",), init_image=image, mask_image=white).mask_image is not None, "a full one is"
    found = np.asarray(mask_of(Picture(image), "10,5,30,15"))
    assert (found[5:15, 10:30] == 255).all() and found.sum() == 255 * 10 * 20


@pytest.mark.parametrize("name", ["strength", "mask_image", "outpaint", "mask_full_resolution", "full_steps"])
def test_options_of_a_picture_need_one(name: str) -> None:
    value: Any = {"strength": 0.5, "mask_image": "0,0,2,2", "outpaint": "left=8"}.get(name, True)
    with pytest.raises(InvalidRequestError, match=r"it has no effect without (init_image|mask_image)"):
        GenerationRequest(prompts=("a",), **{name: value})


def test_margins_are_read_in_any_order() -> None:
    assert as_margins(" right = 64,left=128") == "left=128,right=64" and as_margins("") == as_margins(None) == ""
    assert margins_of("left=128,right=64") == (128, 0, 64, 0)
    assert with_margins((100, 50), "top=3,bottom=4") == (100, 57)
    for text in ("left", "left=a", "middle=3", "left=-3", "128"):
        with pytest.raises(ValueError, match="left=128,right=64"):
            as_margins(text)
    wider, mask = extended(halves(), (8, 0, 4, 2))
    assert wider.size == mask.size == (52, 22)
    assert wider.crop((8, 0, 48, 20)).tobytes() == halves().tobytes()
    assert wider.getpixel((0, 5)) == (255, 0, 0) and wider.getpixel((51, 21)) == (0, 0, 255)
    assert np.asarray(mask).sum() == 255 * (52 * 22 - 40 * 20)


def test_masks_margins_and_pixels_may_be_of_pythons_own_kinds() -> None:
    image = halves()
    for box in ((10, 5, 30, 15), [10, 5, 30, 15]):
        assert GenerationRequest(prompts=("a",), init_image=image, mask_image=box).mask_image == "10,5,30,15"
    assert as_margins({"left": 8, "top": 0}) == as_margins("left=8") == "left=8"
    levels = np.asarray(image, dtype=np.float32) / 255
    assert np.array_equal(np.asarray(Picture(image).image), np.asarray(picture(levels).image))
    mistakes: dict[str, dict[str, Any]] = {
        "from 0 to 1": {"init_image": levels * 255},
        "four numbers": {"init_image": image, "mask_image": "24,24,104"},
    }
    for message, wrong in mistakes.items():
        with pytest.raises(InvalidRequestError, match=message):
            GenerationRequest(prompts=("a",), **wrong)


def test_three_ways_to_fit() -> None:
    cropped, padded, stretched = (fitted(halves(), (20, 20), fit, "green") for fit in ("crop", "pad", "stretch"))
    assert cropped.getpixel((1, 1)) == (255, 0, 0) and cropped.getpixel((18, 18)) == (0, 0, 255)
    assert padded.getpixel((5, 1)) == (0, 128, 0) and padded.getpixel((2, 10)) == (255, 0, 0)
    assert stretched.getpixel((2, 1)) == (255, 0, 0) and stretched.getpixel((17, 18)) == (0, 0, 255)
    assert fitted(halves(), (40, 20), "pad", "green").tobytes() == halves().tobytes()
    mask = fitted(Image.new("L", (40, 20)), (20, 20), "pad", "white")
    assert mask.getpixel((10, 1)) == 255 and mask.getpixel((10, 10)) == 0, "what is added is drawn"


def test_the_soft_edge_lies_inside() -> None:
    mask = Image.new("L", (60, 60))
    mask.paste(255, (20, 20, 50, 50))
    mask.paste(0, (44, 44, 50, 50))  # a corner that the mask surrounds
    hard, soft = softened(mask, 0), softened(mask, 8)
    assert set(np.unique(hard)) == {0.0, 1.0} and (soft[hard == 0] == 0).all()
    row = soft[35, 20:36]
    assert row[0] < 0.3 and row[-1] == pytest.approx(1, abs=0.02) and (np.diff(row) >= -1e-6).all()


def test_what_is_not_drawn_anew_keeps_its_bits() -> None:
    rng = np.random.default_rng(0)
    given, drawn = (Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(2))
    share = np.zeros((30, 30), np.float32)
    share[10:20, 10:20], share[15, 15] = 1, 0.5
    found = np.asarray(composed(given, drawn, share)).astype(int)
    assert (found[share == 0] == np.asarray(given)[share == 0]).all()
    assert (found[share == 1] == np.asarray(drawn)[share == 1]).all()
    middle = (np.asarray(given)[15, 15].astype(int) + np.asarray(drawn)[15, 15]) / 2
    assert np.abs(found[15, 15] - middle).max() <= 1


def test_the_area_around_a_mask_has_the_right_proportions() -> None:
    mask = Image.new("L", (200, 100))
    mask.paste(255, (150, 40, 190, 50))
    left, top, right, bottom = area_around(mask, 5, 1.0)
    assert right - left == bottom - top == 50 and right <= 200 and left <= 145 and top <= 35
    assert area_around(mask, 1000, 2.0) == (0, 0, 200, 100)
