"""A1111's extras: pictures enlarged, with what Pillow has."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.images import save_png
from flagai_altdiff.web.bodies import picture, read_json
from flagai_altdiff.web.encoding import as_text, texts_of
from flagai_altdiff.web.settings import Settings

UPSCALERS = {"None": None, "Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
"""A1111's names of ways to enlarge a picture → Pillow's."""
_INSTEAD = "Lanczos"
"""In place of one that is not here."""
_READ = (
    "resize_mode upscaling_resize upscaling_resize_w upscaling_resize_h upscaling_crop upscaler_1 upscaler_2 "
    "extras_upscaler_2_visibility image imageList"
).split()
_NO_MATTER = ("show_extras_results", "upscale_first", "codeformer_weight")
"""Fields that matter only beside others, which are named."""
_MOST_SIDE = 1 << 14
_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Enlargement:
    """How pictures are enlarged.

    Args:
        factor: So many times; without a meaning where there is a box.
        box: Width and height in px that a picture is made to cover; ``None`` goes by the factor.
        crops: Whether what stands out over the box is cut off, as much on each side.
        first: One of ``UPSCALERS``.
        second: Another one, mixed in.
        share: How much of it, 0 to 1.
        ignored: Fields that have no meaning here, as they were given.
    """

    factor: float
    box: tuple[int, int] | None
    crops: bool
    first: str
    second: str
    share: float
    ignored: Mapping[str, Any]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """What a picture of this size becomes, before it is cropped."""
        if UPSCALERS[self.first] is None and not self.share:
            return width, height
        factor = max(self.box[0] / width, self.box[1] / height) if self.box else self.factor
        return max(1, round(width * factor)), max(1, round(height * factor))

    @property
    def text(self) -> str:
        """What the files say of it, as A1111 says it."""
        by = (
            f"Postprocess upscale to: {self.box[0]}x{self.box[1]}"
            if self.box
            else f"Postprocess upscale by: {self.factor:g}"
        )
        second = f", Postprocess upscaler 2: {self.second}" if self.share else ""
        return f"{by}, Postprocess upscaler: {self.first}{second}"


def add_extras(api: APIRouter, settings: Settings) -> None:
    """The routes ``extra-single-image`` and ``extra-batch-images``; their work is done beside the event loop.

    Args:
        api: Where they are added.
        settings: Of the server; a request may ask for as many pixels as one picture may have.
    """
    turns = asyncio.Semaphore(_AT_ONCE)

    async def enlarge(pictures: list[object], how: Enlargement, field: str) -> list[str]:
        found, left = list[str](), settings.limits.picture_pixels
        for value in pictures:
            image = (await picture(value, field, settings)).image
            width, height = how.size(*image.size)
            left -= width * height
            if left < 0 or max(width, height) > _MOST_SIDE:
                most = f"at most {settings.limits.picture_pixels:,} pixels in all, and {_MOST_SIDE:,} on a side"
                raise InvalidRequestError("upscaling_resize", f"{width}x{height}", most)
            async with turns:
                found.append(as_text(await asyncio.to_thread(_png, image, _texts(value), how)))
        return found

    @api.post("/extra-single-image", summary="A picture enlarged")
    async def single(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        how = read_enlargement(body)
        (image,) = await enlarge([body.get("image")], how, "image")
        return {"html_info": _html(how), "image": image, "ignored": how.ignored}

    @api.post("/extra-batch-images", summary="Pictures enlarged")
    async def several(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        how, files = read_enlargement(body), body.get("imageList")
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise InvalidRequestError("imageList", files, 'expected a list as in [{"data": "base64", "name": "a.png"}]')
        images = await enlarge([file.get("data") for file in files], how, "imageList")
        return {"html_info": _html(how), "images": images, "ignored": how.ignored}


def read_enlargement(body: Mapping[str, Any]) -> Enlargement:
    """What a body asks for; an upscaler that is not here gives way to Lanczos, and is named.

    Raises:
        InvalidRequestError: A number is none, or out of its range.
    """
    given = {name: value for name, value in body.items() if value is not None}
    ignored = {name: value for name, value in given.items() if name not in (*_READ, *_NO_MATTER) and value}
    names = {}
    for field in ("upscaler_1", "upscaler_2"):
        name = given.get(field, "None")
        names[field] = next((known for known in UPSCALERS if known.casefold() == str(name).casefold()), _INSTEAD)
        if names[field].casefold() != str(name).casefold():
            ignored[field] = name
    mode = given.get("resize_mode", 0)
    if mode not in (0, 1):
        raise InvalidRequestError("resize_mode", mode, "expected 0, by a factor, or 1, to a size")
    sides = [_number(given, f"upscaling_resize_{side}", 512, 1, _MOST_SIDE) for side in "wh"]
    return Enlargement(
        factor=_number(given, "upscaling_resize", 2, 1 / _MOST_SIDE, _MOST_SIDE),
        box=(round(sides[0]), round(sides[1])) if mode == 1 else None,
        crops=bool(given.get("upscaling_crop", True)),
        first=names["upscaler_1"],
        second=names["upscaler_2"],
        share=_number(given, "extras_upscaler_2_visibility", 0, 0, 1) if names["upscaler_2"] != "None" else 0.0,
        ignored=ignored,
    )


def enlarged(image: Image.Image, how: Enlargement) -> Image.Image:
    """A picture, RGB or RGBA, enlarged; as it is without an upscaler."""
    found = _resized(image, how, how.first)
    if how.share:
        second = _resized(image, how, how.second)
        if found.size == second.size:
            found = Image.blend(found, second, how.share)
    return found


def _resized(image: Image.Image, how: Enlargement, name: str) -> Image.Image:
    way = UPSCALERS[name]
    if way is None:
        return image
    large = image.resize(how.size(*image.size), way)
    if how.box is None or not how.crops:
        return large
    left, top = (large.width - how.box[0]) // 2, (large.height - how.box[1]) // 2
    return large.crop((left, top, left + how.box[0], top + how.box[1]))


def _png(image: Image.Image, texts: Mapping[str, str], how: Enlargement) -> bytes:
    written = io.BytesIO()
    kept = {"parameters": texts["parameters"]} if "parameters" in texts else {}
    save_png(enlarged(image, how), {**kept, "extras": how.text}, written)
    return written.getvalue()


def _texts(value: object) -> dict[str, str]:
    """What a picture says of its making, if it is a PNG that does."""
    with suppress(InvalidRequestError):
        return texts_of(value, "image")
    return {}


def _html(how: Enlargement) -> str:
    names = escape(", ".join(how.ignored)[:200])
    return f"<p>{how.text}</p>" + (f"<p>ignored: {names}</p>" if names else "")


def _number(given: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidRequestError(name, value, f"expected a number from {least:g} to {most:g}")
    return float(value)
