"""Contact sheets: many small images on one, in rows with a label each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

LABEL_WIDTH, GAP = 22, 2
CAPTION_HEIGHT = 12


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a sheet.

    Args:
        label: A few letters at its left. Pillow's own font has Latin ones only.
        images: Its images, of any size.
        captions: A few letters below each image, if any.
    """

    label: str
    images: Sequence[Image.Image] = field(repr=False)
    captions: Sequence[str] = ()


def make_sheet(rows: Iterable[Row], side: int) -> Image.Image:
    """All rows below each other; images shrunk to fit squares, their sides kept in proportion.

    Args:
        rows: What to show.
        side: Of each square, in px.
    """
    rows = list(rows)
    step = side + GAP
    foot = CAPTION_HEIGHT if any(row.captions for row in rows) else 0
    columns = max((len(row.images) for row in rows), default=0)
    label_width = LABEL_WIDTH if any(row.label for row in rows) else 0
    sheet = Image.new("RGB", (label_width + step * columns, max((step + foot) * len(rows), 1)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        top = i * (step + foot)
        pen.text((5, top + side // 2 - 6), row.label, fill="black")
        for column, image in enumerate(row.images):
            left = label_width + column * step
            small = shrunk(image, side)
            sheet.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
            if column < len(row.captions):
                pen.text((left + 2, top + side), row.captions[column], fill="black")
    return sheet


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """An image fitted into a square, its sides kept in proportion."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
