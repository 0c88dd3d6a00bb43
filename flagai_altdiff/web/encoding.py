"""Pictures on their way in and out: bytes and base64 of unknown merit → pictures; saved PNG files → other formats."""

from __future__ import annotations

import base64
import binascii
import io
import re
from pathlib import Path

from PIL import Image

from flagai_altdiff.decoding import read_image
from flagai_altdiff.errors import BrokenExampleError, ImageError, InvalidRequestError
from flagai_altdiff.images import texts_in
from flagai_altdiff.pictures import Picture
from flagai_altdiff.web.messages import Drawn

FORMATS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
"""Format → media type."""
_DATA = re.compile(r"data:image/[\w.+-]+;base64,")
_USER_COMMENT, _EXIF = 0x9286, 0x8769
_MOST_EXIF = 65533
"""Bytes of it in a JPEG."""
_QUALITY = 90


def picture_from_bytes(content: bytes, field: str, max_pixels: int) -> Picture:
    """A picture that a client sent.

    Args:
        content: A file of any usual format.
        field: For the error.
        max_pixels: More are refused before they are unpacked.

    Raises:
        InvalidRequestError: It cannot be read.
    """
    try:
        return Picture(read_image(io.BytesIO(content), "the picture", max_pixels=max_pixels, keep_alpha=True))
    except BrokenExampleError as error:
        expected = f"a picture (PNG, JPEG, WebP …) of at most {max_pixels:,} pixels; this one: {error.words}"
        raise InvalidRequestError(field, f"{len(content)} bytes", expected) from error


def picture_from_base64(text: object, field: str, max_pixels: int) -> Picture:
    """A picture from base64, with or without ``data:image/…;base64,`` before it; arguments and errors as above."""
    return picture_from_bytes(_decoded(text, field), field, max_pixels)


def _decoded(text: object, field: str) -> bytes:
    if not isinstance(text, str):
        raise InvalidRequestError(field, text, "expected a picture as base64")
    plain = text[found.end() :] if (found := _DATA.match(text)) else text
    try:
        return base64.b64decode(plain, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(field, text, f"expected a picture as base64 ({error})") from error


def png_of(image: Drawn) -> bytes:
    """The file of an image that was drawn.

    Raises:
        OSError: It was saved, and is gone.
    """
    if image.png is not None:
        return image.png
    assert image.path is not None
    return Path(image.path).read_bytes()


def texts_of(value: object, field: str) -> dict[str, str]:
    """The texts that a PNG carries: its bytes, or base64. InvalidRequestError where it is none."""
    content = value if isinstance(value, bytes) else _decoded(value, field)
    try:
        return texts_in(io.BytesIO(content))
    except ImageError as error:
        raise InvalidRequestError(field, f"{len(content)} bytes", f"expected a PNG ({error})") from error


def converted(png: bytes, kind: str, quality: int | None = None) -> bytes:
    """A PNG as another format, with what it says of its making where A1111 looks for it, if there is room.

    Args:
        png: The file.
        kind: One of ``FORMATS``.
        quality: 1 to 100.
    """
    if kind == "png":
        return png
    with Image.open(io.BytesIO(png)) as image:
        exif = image.getexif()
        if text := image.info.get("parameters"):
            exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + str(text).encode("utf-16-be", "replace")
        said, written = exif.tobytes(), io.BytesIO()
        if kind == "jpeg" and len(said) > _MOST_EXIF:  # half of it would say nothing: the settings come last
            said = b""
        image.convert("RGB").save(written, kind.upper(), quality=quality or _QUALITY, exif=said)
        return written.getvalue()


def as_text(content: bytes) -> str:
    """Base64."""
    return base64.b64encode(content).decode()
