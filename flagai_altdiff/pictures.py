"""Pictures that a drawing begins with, and masks of what of them is drawn anew. No torch; Pillow once there is one."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from flagai_altdiff.errors import BrokenExampleError, DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

FITS = ("crop", "pad", "stretch")
"""How a picture gets the size of a drawing."""
ALPHA = "alpha"
"""The mask that redraws what is transparent in the picture."""
SIDES = ("left", "top", "right", "bottom")
_BOX = re.compile(r"\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*")
_NUMBERS = re.compile(r"[\d\s.,-]*,[\d\s.,-]*")
_LONGEST_BOX = 64
"""Characters."""
_WHITE = 255
_DIGITS = 4
"""Of a margin."""


class Picture:
    """A picture that was read whole: upright, RGB or RGBA. Two are equal where their pixels are.

    Args:
        image: Its pixels.
        name: Its absolute path; empty where it came from a program.
    """

    def __init__(self, image: Image.Image, name: str = "") -> None:
        self.image, self.name = image, name
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
        self.sha256 = digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Picture) and other.sha256 == self.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"Picture({self.name!r}, {self.image.width}x{self.image.height})"

    def as_json(self) -> dict[str, str]:
        """What a record says of it."""
        return {"name": self.name.encode("utf-8", "backslashreplace").decode(), "sha256": self.sha256}


def as_picture(value: object) -> Picture | None:
    """A picture from its path, from an image of Pillow or numpy, or from what a record says of it.

    Raises:
        ValueError: It cannot be read, or is not the one that the record means.
    """
    if value is None or isinstance(value, Picture):
        return value
    import numpy as np
    from PIL import Image

    from flagai_altdiff.decoding import open_image, upright

    if isinstance(value, Mapping):
        if not value.get("name"):
            raise ValueError("the picture that was recorded came from a program, not from a file; give it again")
        found = as_picture(value["name"])
        if found is None or found.sha256 != value.get("sha256"):
            raise ValueError(f"{value['name']} is not the picture that was recorded: its pixels differ")
        return found
    try:
        if isinstance(value, np.ndarray):
            value = Image.fromarray(_whole_levels(value))
        if isinstance(value, Image.Image):
            return Picture(upright(value, "the image"))
        if isinstance(value, str | os.PathLike) and os.fspath(value):
            return Picture(open_image(Path(value), keep_alpha=True), os.path.abspath(os.fspath(value)))
    except (BrokenExampleError, DataError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error
    raise ValueError("expected the path of a picture, or an image")


def _whole_levels(pixels: NDArray[Any]) -> NDArray[Any]:
    """Pixels of numpy, (H, W) or (H, W, channels): numbers from 0 to 1 become those from 0 to 255."""
    import numpy as np

    if pixels.dtype.kind != "f":
        return pixels
    if not pixels.size or not np.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError("expected whole numbers from 0 to 255 in an array, or others from 0 to 1")
    return (pixels * _WHITE).round().astype(np.uint8)


def as_mask(value: object) -> Picture | str | None:
    """A mask: a picture as of :func:`as_picture`, ``"alpha"``, or ``"left,top,right,bottom"`` (px)."""
    if isinstance(value, tuple | list) and len(value) == len(SIDES) and all(type(side) is int for side in value):
        value = ",".join(map(str, value))
    if isinstance(value, str) and (value == ALPHA or _BOX.fullmatch(value)):
        return value
    if isinstance(value, str) and _NUMBERS.fullmatch(value):
        raise ValueError("expected a box of four numbers, left,top,right,bottom in px, as in 24,24,104,104")
    return as_picture(value)


def is_mask_in_words(value: object) -> bool:
    """Whether a mask is ``"alpha"`` or, right or wrong, a box: it names no file then."""
    return value == ALPHA or (isinstance(value, str) and len(value) < _LONGEST_BOX and bool(_NUMBERS.fullmatch(value)))


def as_margins(value: object) -> object:
    """Pixels to add at the sides, as ``"left=128,right=64"``; the same with sides in their order.

    Raises:
        ValueError: It says something else.
    """
    if value in (None, ""):
        return ""
    if isinstance(value, Mapping):
        value = ",".join(f"{side}={number}" for side, number in value.items())
    found = dict.fromkeys(SIDES, 0)
    for part in str(value).split(","):
        side, _, number = (text.strip() for text in part.partition("="))
        if side not in found or not (number.isascii() and number.isdigit() and len(number) <= _DIGITS):
            raise ValueError("expected sides and pixels, as in left=128,right=64")
        found[side] = int(number)
    return ",".join(f"{side}={number}" for side, number in found.items() if number)


def _json(value: object) -> object:
    return value.as_json() if isinstance(value, Picture) else value


_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}
# What is given may be anything that becomes a picture; what is found is one, or None, or a mask's description.
PictureField = Annotated[Any, BeforeValidator(as_picture), PlainSerializer(_json), WithJsonSchema(_SCHEMA)]
MaskField = Annotated[Any, BeforeValidator(as_mask), PlainSerializer(_json), WithJsonSchema(_SCHEMA)]
MarginsField = Annotated[str, BeforeValidator(as_margins)]


def on_ground(picture: Picture, ground: str) -> Image.Image:
    """The picture as RGB, laid over a colour where it is transparent."""
    from PIL import Image

    if picture.image.mode == "RGB":
        return picture.image
    laid = Image.new("RGBA", picture.image.size, ground)
    laid.alpha_composite(picture.image)
    return laid.convert("RGB")


def is_colour(text: str) -> bool:
    """Whether Pillow knows a colour of that name."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


def mask_of(picture: Picture, mask: Picture | str) -> Image.Image:
    """Which pixels are drawn anew: L, white where they are.

    Args:
        picture: What the mask is for.
        mask: See :func:`as_mask`; one of another size than the picture's is refused.

    Raises:
        ValueError: It does not fit, or nothing of it is white.
    """
    from PIL import Image

    size = picture.image.size
    if mask == ALPHA:
        if picture.image.mode != "RGBA":
            raise ValueError("the picture is transparent nowhere; draw a mask, or name a box")
        found = picture.image.getchannel("A").point(lambda alpha: _WHITE - alpha)
    elif isinstance(mask, str):
        box = tuple(int(number) for number in mask.split(","))
        left, top, right, bottom = box
        if not (left < right <= size[0] and top < bottom <= size[1]):
            within = f"{size[0]}x{size[1]} px"
            raise ValueError(f"expected left,top,right,bottom within {within}, left < right and top < bottom")
        found = Image.new("L", size)
        found.paste(_WHITE, (left, top, right, bottom))
    else:
        found = on_ground(mask, "black").convert("L")
        if found.size != size:
            own, wanted = ("x".join(map(str, sides)) for sides in (found.size, size))
            raise ValueError(f"the mask is {own} px, the picture {wanted}; they must be of one size")
    found = found.point(lambda value: _WHITE if value > _WHITE // 2 else 0)
    if found.getbbox() is None:
        raise ValueError("nothing of the mask is white, so nothing would be drawn; white is what is drawn anew")
    return found


def margins_of(text: str) -> tuple[int, int, int, int]:
    """Pixels at left, top, right and bottom of what :func:`as_margins` gave."""
    found = dict.fromkeys(SIDES, 0) | {
        side: int(number) for part in text.split(",") if part for side, _, number in (part.partition("="),)
    }
    left, top, right, bottom = (found[side] for side in SIDES)
    return left, top, right, bottom


def with_margins(size: tuple[int, int], margins: str) -> tuple[int, int]:
    """Width and height of a picture with margins."""
    left, top, right, bottom = margins_of(margins)
    return size[0] + left + right, size[1] + top + bottom


def extended(image: Image.Image, margins: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """A picture with margins that go on with its edges, and the mask of these margins."""
    import numpy as np
    from PIL import Image

    left, top, right, bottom = margins
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    mask = Image.new("L", (pixels.shape[1], pixels.shape[0]), _WHITE)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return Image.fromarray(pixels), mask


def fitted(image: Image.Image, size: tuple[int, int], fit: str, ground: str) -> Image.Image:
    """A picture or mask at the size of a drawing.

    Args:
        image: RGB or L.
        size: Width and height.
        fit: One of ``FITS``: cut what is too long, add ``ground`` where it is too short, or change its proportions.
        ground: The colour that is added; to masks, white.
    """
    from PIL import Image

    if image.size == size:
        return image
    if fit == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    ratios = [wanted / own for wanted, own in zip(size, image.size, strict=True)]
    scale = max(ratios) if fit == "crop" else min(ratios)
    width, height = (max(1, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    whole = Image.new(image.mode, size, ground if image.mode == "RGB" else _WHITE)
    whole.paste(scaled, ((size[0] - width) // 2, (size[1] - height) // 2))
    return whole


def softened(mask: Image.Image, feather: int) -> NDArray[np.float32]:
    """How much of each pixel is drawn anew, (H, W) in [0, 1]: 0 outside the mask, rising to 1 within ``feather`` px."""
    import numpy as np
    from PIL import ImageFilter

    hard = np.asarray(mask, dtype=np.float32) / _WHITE
    if not feather:
        return (hard > 0.5).astype(np.float32)
    blurred = np.asarray(mask.filter(ImageFilter.GaussianBlur(feather / 2)), dtype=np.float32) / _WHITE
    return (np.clip(2 * blurred - 1, 0, 1) * (hard > 0.5)).astype(np.float32)


def area_around(mask: Image.Image, padding: int, ratio: float) -> tuple[int, int, int, int]:
    """The part of a picture around its mask that is drawn larger: left, top, right, bottom.

    Args:
        mask: Of the whole picture.
        padding: Pixels around the mask.
        ratio: Width by height that the part should have; the picture's edges may forbid it.
    """
    box = mask.getbbox()
    assert box is not None
    left, top, right, bottom = box[0] - padding, box[1] - padding, box[2] + padding, box[3] + padding
    wider = max(0.0, (bottom - top) * ratio - (right - left))
    taller = max(0.0, (right - left) / ratio - (bottom - top))
    left, right = _within(left - wider / 2, right + wider / 2, mask.width)
    top, bottom = _within(top - taller / 2, bottom + taller / 2, mask.height)
    return left, top, right, bottom


def _within(low: float, high: float, length: int) -> tuple[int, int]:
    size = min(round(high - low), length)
    first = min(max(round(low), 0), length - size)
    return first, first + size


def composed(given: Image.Image, drawn: Image.Image, share: NDArray[np.float32]) -> Image.Image:
    """Two pictures of one size in one: what ``share`` leaves out is the given one's, bit for bit."""
    import numpy as np
    from PIL import Image

    before, after = np.asarray(given), np.asarray(drawn)
    mixed = before + share[..., None] * (after.astype(np.float32) - before)
    return Image.fromarray(np.where(share[..., None] > 0, mixed.round().astype(np.uint8), before))


def json_of(value: Any) -> Any:
    """What stands for a picture in the identity of a run: its pixels, wherever they came from."""
    return value["sha256"] if isinstance(value, dict) and value.keys() == {"name", "sha256"} else value
