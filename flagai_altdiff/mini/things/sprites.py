"""The pictures of things, cut out, in three styles."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from flagai_altdiff.errors import DataError, MissingDependencyError
from flagai_altdiff.mini.things.packages import FLAT, NOTO, SOLID, Package, members

STYLES = ("solid", "flat", "cartoon")
"""Modelled, as if by hand and light; flat areas of colour; drawn. What a prompt does not say is solid."""
_DRAWINGS = {"flat": FLAT, "cartoon": NOTO}
_SIDE = 192
"""Of drawings, in px; the modelled ones come with 256."""
_WITH_VARIATION = "-fe0f"


def make_sprites(archives: Mapping[Package, Path], codes: Iterable[str]) -> dict[tuple[str, str], Image.Image]:
    """Render things in every style.

    Args:
        archives: From ``packages.fetch``.
        codes: Of the things.

    Returns:
        (code, style) -> RGBA, cropped to what can be seen.

    Raises:
        DataError: A thing is missing in a style.
        MissingDependencyError: resvg-py, which renders drawings, is not installed.
    """
    codes = tuple(codes)
    made = {(code, "solid"): image for code, image in _solid(archives[SOLID], codes).items()}
    for style, package in _DRAWINGS.items():
        made |= {(code, style): image for code, image in _drawn(archives[package], codes).items()}
    return {key: image.crop(image.getchannel("A").getbbox()) for key, image in made.items()}


def _solid(archive: Path, codes: tuple[str, ...]) -> dict[str, Image.Image]:
    files = members(archive, lambda name: name.endswith(".webp"))
    pictures = {name.removeprefix("assets/").removesuffix(".webp"): data for name, data in files.items()}
    return {code: Image.open(io.BytesIO(pictures[_spelling(code, pictures)])).convert("RGBA") for code in codes}


def _drawn(archive: Path, codes: tuple[str, ...]) -> dict[str, Image.Image]:
    files = members(archive, lambda name: name in ("icons.json", "chars.json"))
    icons, characters = json.loads(files["icons.json"]), json.loads(files["chars.json"])
    return {code: _render(icons, characters[_spelling(code, characters)]) for code in codes}


def _spelling(code: str, known: Iterable[str]) -> str:
    """How a package spells a thing's code points: with or without the mark that asks for a picture."""
    spellings = (code, code + _WITH_VARIATION, code.replace("-200d", _WITH_VARIATION + "-200d"))
    found = next((spelling for spelling in spellings if spelling in known), None)
    if found is None:
        raise DataError(f"there is no picture of {code}.")
    return found


def _render(icons: Mapping[str, Any], name: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise MissingDependencyError("drawings need resvg-py: pip install 'flagai-altdiff[things]'") from error
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=picture, width=_SIDE, height=_SIDE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")
