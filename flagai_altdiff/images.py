"""Pictures: tensors to PIL, grids, and PNG files that appear whole, under numbers that are never used twice."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flagai_altdiff.files import grant_usual_mode

_GRID_PADDING = 2


def to_pil(images: Tensor) -> list[Image.Image]:
    """Decoded pictures as PIL images; values are cut off like the original's, not rounded.

    Args:
        images: (B, 3, H, W), about [-1, 1].
    """
    pixels = ((images.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).mul(255).cpu().numpy().astype(np.uint8)
    return [Image.fromarray(p) for p in pixels]


def make_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side with black gaps of 2 px; a single picture is its own grid.

    Args:
        images: All of one size.
        columns: Pictures per row.
    """
    if len(images) == 1:
        return images[0].copy()
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = (side + _GRID_PADDING for side in images[0].size)
    grid = Image.new("RGB", (columns * width + _GRID_PADDING, rows * height + _GRID_PADDING))
    for i, image in enumerate(images):
        grid.paste(image, ((i % columns) * width + _GRID_PADDING, (i // columns) * height + _GRID_PADDING))
    return grid


def save_numbered(
    image: Image.Image, folder: Path, pattern: str, texts: Mapping[str, str] | None = None, scratch: Path | None = None
) -> Path:
    """Save a PNG under the number after the highest in the folder; never over another file.

    Args:
        image: The picture.
        folder: Where it goes; made if need be.
        pattern: File name with one ``%0Nd``, for example ``"grid-%04d.png"``.
        texts: Key -> text to keep in the file (iTXt: any script survives).
        scratch: Folder of the same file system for the unfinished file; ``folder`` if left out.

    Returns:
        The file's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, text in (texts or {}).items():
        info.add_itxt(key, text, zip=len(text) > 1000)
    handle, name = tempfile.mkstemp(dir=scratch or folder, prefix=".unfinished-", suffix=".tmp")
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, "PNG", pnginfo=info)
        grant_usual_mode(unfinished)
        number = _next_number(folder, pattern)
        while not _claim(unfinished, folder / (pattern % number)):
            number += 1
        return folder / (pattern % number)
    finally:
        unfinished.unlink(missing_ok=True)


def _next_number(folder: Path, pattern: str) -> int:
    head, tail = re.split(r"%0\d+d", pattern)
    number = re.compile(re.escape(head) + r"(\d+)" + re.escape(tail))
    return 1 + max((int(m[1]) for name in os.listdir(folder) if (m := number.fullmatch(name))), default=-1)


def _claim(unfinished: Path, target: Path) -> bool:
    """Give a finished file its name, unless another process was faster."""
    try:
        os.link(unfinished, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: reserve the name, then move over the reservation
        try:
            target.touch(exist_ok=False)
        except FileExistsError:
            return False
        os.replace(unfinished, target)
    return True
