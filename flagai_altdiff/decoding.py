"""A file of unknown merit -> an upright RGB image, or the reason why there is none."""

from __future__ import annotations

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from flagai_altdiff.errors import BrokenExampleError, DataError, printable
from flagai_altdiff.files import open_regular

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
OTHER_IMAGES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".dng", ".cr2", ".nef")
"""What people have in their folders as well; it is counted, not read."""
MAX_PIXELS = 1 << 26
"""67 million pixels: 8192 x 8192. Pillow itself refuses what has more than 179 million."""
PILLOWS_MAX_PIXELS = 178_956_970
NOT_AN_IMAGE, DAMAGED, TOO_LARGE = "not an image", "truncated or damaged image", "more pixels than allowed"
NO_RANGE, UNREADABLE = "pixels of an unknown range", "file cannot be opened"
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Only these: other readers of Pillow start programs, or are hardly ever tested."""
_BEGINNINGS = (b"\x89PNG", b"\xff\xd8", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM")
_OF_THE_FILE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EINVAL,
    errno.ENOTSUP,  # no ordinary file
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""What the system says of one file; anything else is about the disk, and so about all of them."""


def open_image(path: Path, *, keep_alpha: bool = False) -> Image.Image:
    """Decode the image in a file; errors as of :func:`read_image`."""
    with reading(str(path)), open_regular(path) as file:
        return read_image(file, str(path), keep_alpha=keep_alpha)


def check_image(path: Path) -> None:
    """Look at no more than the header of an image in a file; errors as of :func:`read_image`."""
    with reading(str(path)), open_regular(path) as file:
        read_size(file, str(path))


def read_image(
    file: BinaryIO, key: str, *, max_pixels: int = MAX_PIXELS, at_least: int | None = None, keep_alpha: bool = False
) -> Image.Image:
    """Decode an image: its first frame, turned as its EXIF says, alpha laid over white, 16 bits and CMYK as RGB.

    Args:
        file: Open at its beginning.
        key: For the error.
        max_pixels: More are refused before they are unpacked.
        at_least: A JPEG may be decoded at a half, quarter or eighth of its size while its sides are at least this.
        keep_alpha: Keep what is transparent as it is: RGBA where there is any.

    Raises:
        BrokenExampleError: It cannot be decoded to the last pixel.
        DataError: The disk does not answer.
    """
    with _told(key), _opened(file, key) as image:
        _check_size(image, key, max_pixels)
        if at_least is not None:
            image.draft(image.mode, (at_least, at_least))
        image.load()
        return as_rgb(_upright(image), key, keep_alpha=keep_alpha)


def upright(image: Image.Image, key: str) -> Image.Image:
    """An image that a program has, as :func:`read_image` would give it with its alpha; errors as there."""
    with _told(key):
        _check_size(image, key, MAX_PIXELS)
        image.load()
        return as_rgb(_upright(image), key, keep_alpha=True)


def read_size(file: BinaryIO, key: str, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The sides of an image, from its header alone; arguments and errors as of :func:`read_image`."""
    with _told(key), _opened(file, key) as image:
        _check_size(image, key, max_pixels)
        return image.size


@contextmanager
def reading(key: str) -> Iterator[None]:
    """Turn what the system says of a file that is opened or read into BrokenExampleError, or DataError of the disk."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        if error.errno in _OF_THE_FILE:
            raise BrokenExampleError(key, UNREADABLE, error.strerror or "") from error
        raise DataError(f"{printable(key, 300)} cannot be read: {error.strerror or error}. Try again.") from error


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Pillow raises nearly every kind of error."""
    try:
        yield
    except DataError:
        raise
    except (MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BrokenExampleError(key, TOO_LARGE, printable(str(error), 120)) from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            with reading(key):
                raise
        raise BrokenExampleError(key, DAMAGED, printable(str(error) or type(error).__name__, 120)) from error


def _opened(file: BinaryIO, key: str) -> Image.Image:
    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        file.seek(0)
        first = file.read(16)
        detail = "" if first else "it is empty"
        raise BrokenExampleError(key, DAMAGED if first.startswith(_BEGINNINGS) else NOT_AN_IMAGE, detail) from error


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_size(image: Image.Image, key: str, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise BrokenExampleError(key, TOO_LARGE, f"{image.width}x{image.height}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the pixels are good
        return image


def as_rgb(image: Image.Image, key: str, *, keep_alpha: bool = False) -> Image.Image:
    """An image of any mode as RGB, alpha over white unless it is kept; BrokenExampleError where none can be made."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BrokenExampleError(key, NO_RANGE, f"mode {image.mode}")
    if image.has_transparency_data and keep_alpha:
        return image.convert("RGBA")
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")
