"""Image files as people have them, and as nobody should: decoded to the last pixel, or refused with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flagai_altdiff.decoding import DAMAGED, NO_RANGE, NOT_AN_IMAGE, TOO_LARGE, read_image, read_size
from flagai_altdiff.errors import BrokenExampleError, InvalidRequestError
from flagai_altdiff.training.data.preparation import Preparation
from flagai_altdiff.training.data.source import Reading
from flagai_altdiff.training.randomness import generator
from tests.cost import in_proportion
from tests.data_files import image_bytes, noise_bytes


def decoded(data: bytes, **options: Any) -> Image.Image:
    return read_image(io.BytesIO(data), "it", **options)


def reason(data: bytes, **options: Any) -> str:
    with pytest.raises(BrokenExampleError) as caught:
        decoded(data, **options)
    assert caught.value.key == "it" and str(caught.value).startswith("it: ")
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (image_bytes((10, 20, 30)), (10, 20, 30)),
        (image_bytes(77, mode="L"), (77, 77, 77)),
        (image_bytes(1, mode="1"), (255, 255, 255)),
        (image_bytes(200 * 257, mode="I;16"), (200, 200, 200)),
        (image_bytes(65535, mode="I;16", format="TIFF"), (255, 255, 255)),
        (image_bytes((0, 0, 0, 0), mode="CMYK", format="JPEG"), (255, 255, 255)),
        (image_bytes((0, 0, 0, 0), mode="CMYK", format="TIFF"), (255, 255, 255)),
        (image_bytes((200, 0, 0, 0), mode="RGBA"), (255, 255, 255)),
        (image_bytes((0, 0, 0, 51), mode="RGBA"), (204, 204, 204)),
        (image_bytes((0, 0), mode="LA"), (255, 255, 255)),
        (image_bytes((1, 2, 3), transparency=(1, 2, 3)), (255, 255, 255)),
        (image_bytes(0, mode="P", transparency=0), (255, 255, 255)),
        (image_bytes(0, mode="P", transparency=0, format="GIF"), (255, 255, 255)),
        (image_bytes((9, 8, 7), format="BMP"), (9, 8, 7)),
        (image_bytes((9, 8, 7), format="WEBP", lossless=True), (9, 8, 7)),
        (image_bytes((9, 8, 7), format="PPM"), (9, 8, 7)),
    ],
)
def test_every_kind_of_pixel(data: bytes, pixel: tuple[int, int, int]) -> None:
    image = decoded(data)
    assert image.mode == "RGB" and image.size == (20, 16) and image.getpixel((5, 5)) == pixel


@pytest.mark.parametrize(("orientation", "red"), [(1, (0, 0)), (3, (7, 3)), (6, (3, 0)), (8, (0, 7))])
def test_turned_as_exif_says(orientation: int, red: tuple[int, int]) -> None:
    image = Image.new("RGB", (8, 4))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    upright = decoded(buffer.getvalue())
    assert upright.getpixel(red) == (255, 0, 0)
    assert upright.size == ((8, 4) if orientation in (1, 3) else (4, 8))


def test_damaged_exif_does_not_matter() -> None:
    assert decoded(image_bytes("red", format="JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).size == (20, 16)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated(format: str, share: float) -> None:
    data = noise_bytes(format=format)
    assert reason(data[: int(len(data) * share)]) in (DAMAGED, NOT_AN_IMAGE)


def png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 100) + b"IDAT" + bytes(100)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", NOT_AN_IMAGE),
        (b"<html>404</html>", NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NOT_AN_IMAGE),
        (b"\x89PNG\r\n\x1a\n", DAMAGED),
        (png_header(20_000, 20_000), TOO_LARGE),
        (png_header(9_000, 9_000), TOO_LARGE),
        (png_header(2**31 - 1, 2**31 - 1), TOO_LARGE),
        (image_bytes(1.5, mode="F", format="TIFF"), NO_RANGE),
        (image_bytes(100_000, mode="I", format="TIFF"), NO_RANGE),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_refused(data: bytes, expected: str) -> None:
    with in_proportion(len(data)):
        assert reason(data) == expected


def test_a_bomb_is_not_unpacked() -> None:
    bomb = image_bytes(0, size=(20_000, 4_000), mode="1")
    with in_proportion(len(bomb)):
        assert reason(bomb) == TOO_LARGE
    assert reason(image_bytes(), max_pixels=319) == TOO_LARGE and decoded(image_bytes(), max_pixels=320)
    with pytest.raises(InvalidRequestError, match="max_pixels"):
        Reading(max_pixels=10**9)


@given(st.binary(max_size=200) | st.tuples(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]), st.data()))
@settings(max_examples=150, deadline=None)
def test_anything_is_an_image_or_a_reason(what: Any) -> None:
    data = what
    if isinstance(what, tuple):
        good = bytearray(noise_bytes((12, 12), what[0]))
        for _ in range(what[1].draw(st.integers(1, 4))):
            good[what[1].draw(st.integers(0, len(good) - 1))] = what[1].draw(st.integers(0, 255))
        data = bytes(good)
    with in_proportion(len(data)), suppress(BrokenExampleError):
        assert decoded(data, max_pixels=10_000).mode == "RGB"  # what a header promises may cost that much


def test_a_large_jpeg_may_be_decoded_smaller() -> None:
    data = image_bytes("red", size=(800, 600), format="JPEG")
    assert decoded(data, at_least=100).size == (200, 150)
    assert decoded(data, at_least=601).size == (800, 600)
    assert read_size(io.BytesIO(data), "it") == (800, 600)


def test_preparation() -> None:
    values = np.zeros((40, 60, 3), np.uint8)
    values[..., 0] = np.arange(60) * 4
    image = Image.fromarray(values)
    centre = Preparation(side=40, crop="centre")(image, generator(0))
    assert centre.shape == (3, 40, 40) and centre.dtype == torch.float32 and centre.is_contiguous()
    assert torch.allclose(centre[0, 0], (torch.arange(10, 50) * 4) / 127.5 - 1) and centre[1:].eq(-1).all()
    lefts = {
        int((prepared[0, 0, 0] + 1) * 127.5 / 4 + 0.5)
        for i in range(300)
        for prepared in [Preparation(side=40)(image, generator(i))]
    }
    assert lefts == set(range(21))
    flips = [Preparation(side=40, crop="centre", flip=True)(image, generator(i)) for i in range(100)]
    assert {tuple(p[0, 0].tolist()) for p in flips} == {
        tuple(centre[0, 0].tolist()),
        tuple(centre[0, 0].flip(0).tolist()),
    }
    assert Preparation(side=16)(image, generator(0)).shape == (3, 16, 16)
    assert -1 <= Preparation(side=90)(image, generator(0)).min() <= Preparation(side=90)(image, generator(0)).max() <= 1
    with pytest.raises(InvalidRequestError, match="side"):
        Preparation(side=0)
