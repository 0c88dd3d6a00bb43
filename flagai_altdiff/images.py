"""Images: tensors to PIL, grids, and PNG files that appear whole, under numbers that are never used twice."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from flagai_altdiff.files import new_file

if TYPE_CHECKING:
    from torch import Tensor

_GRID_PADDING = 2
_MAX_GRID_PIXELS = 1 << 29
"""1.5 GiB of memory; viewers fail earlier."""


def to_pil(images: Tensor) -> list[Image.Image]:
    """Decoded images as PIL images; values are cut off like the original's, not rounded.

    Args:
        images: (B, 3, H, W), about [-1, 1].
    """
    pixels = ((images.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).mul(255).byte().cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def load_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """The pixels of a PNG file of ours, be it as large as a grid of thousands.

    Args:
        path: The file.
        size: Width and height that it must have, told before any pixel is read.

    Raises:
        OSError: It is gone, truncated or no PNG. Pillow may say that as ValueError or SyntaxError too.
        ValueError: It has another size.
    """
    with PngImageFile(path) as image:  # unlike Image.open, it does not take a large grid for a bomb
        if size not in (None, image.size):
            raise ValueError(f"{path} is an image of {image.width}x{image.height} px, not of {size}")
        return image.convert("RGB")


def read_texts(path: Path) -> dict[str, str]:
    """Texts that a PNG carries before its pixels, key -> text; errors as of :func:`load_image`."""
    with PngImageFile(path) as image:
        return {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}


def make_grid(images: Iterable[Image.Image], count: int, columns: int) -> Image.Image:
    """Images side by side with black gaps of 2 px; a single image is its own grid.

    Args:
        images: All of one size; they are asked for one by one.
        count: How many there are.
        columns: Images per row.

    Raises:
        ValueError: The grid would have more pixels than anything can show.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    grid: Image.Image | None = None
    width = height = 0
    for i, image in enumerate(images):
        if count == 1:
            return image.copy()
        if grid is None:
            width, height = (side + _GRID_PADDING for side in image.size)
            size = (columns * width + _GRID_PADDING, rows * height + _GRID_PADDING)
            if size[0] * size[1] > _MAX_GRID_PIXELS:
                raise ValueError(
                    f"{count} images of {image.width}x{image.height} make a grid of {size[0]}x{size[1]} px"
                )
            grid = Image.new("RGB", size)
        grid.paste(image, ((i % columns) * width + _GRID_PADDING, (i // columns) * height + _GRID_PADDING))
    assert grid is not None
    return grid


class NumberedFolder:
    """PNG files of one folder under running numbers, from the one after the highest on; a number is never used again.

    Args:
        folder: Made with the first file. It is looked through once.
        pattern: File name with one ``%0Nd``, for example ``"grid-%04d.png"``.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder, self._pattern = folder, pattern
        self._next: int | None = None

    def save(self, image: Image.Image, texts: Mapping[str, str]) -> Path:
        """Save an image; never over another file, whichever process wrote it.

        Args:
            image: The image.
            texts: Key -> text to keep in the file (iTXt: any script survives).

        Returns:
            The file's path.
        """
        info = PngInfo()
        for key, text in texts.items():
            info.add_itxt(key, text, zip=len(text) > 1000)
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._next is None:
            self._next = 1 + highest_number(self._folder, self._pattern)
        while True:
            target = self._folder / (self._pattern % self._next)
            self._next += 1
            if not os.path.lexists(target):
                with suppress(FileExistsError), new_file(target) as unfinished:
                    image.save(unfinished, "PNG", pnginfo=info)
                    return target


def highest_number(folder: Path, pattern: str) -> int:
    """The highest number among the files of a pattern; -1 if there are none."""
    head, tail = re.split(r"%0\d+d", pattern)
    number = re.compile(re.escape(head) + r"([0-9]{1,12})" + re.escape(tail))
    return max((int(m[1]) for name in os.listdir(folder) if (m := number.fullmatch(name))), default=-1)
