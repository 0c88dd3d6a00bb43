"""Images that people bring: found, opened whatever they are, and named where they are broken."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from flagai_altdiff.decoding import SUFFIXES, open_image
from flagai_altdiff.errors import BrokenExampleError, InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How a reference image becomes one of the size that the model draws: the middle of it, resized bilinearly.

    Args:
        width: In px.
        height: In px.
    """

    width: int
    height: int

    def __call__(self, image: Image.Image) -> Image.Image:
        """The image as it is compared."""
        return ImageOps.fit(image, (self.width, self.height), Image.Resampling.BILINEAR)


def find_images(folder: Path, field: str = "pictures") -> list[Path]:
    """Every image file in a folder and the folders in it, in the order of their paths; links to folders are left out.

    Raises:
        InvalidRequestError: There is none.
    """
    found = [
        Path(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    ]
    if not found:
        kinds = " ".join(SUFFIXES)
        problem = "there is no image in it" if folder.is_dir() else "it is no folder"
        raise InvalidRequestError(field, str(folder), f"{problem}; expected a folder of images ({kinds})")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def find_classes(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Images that lie in a folder for each class.

    Args:
        folder: Has the folders of the classes.

    Returns:
        Names of the classes in their order, the images, and the number of each image's class.

    Raises:
        InvalidRequestError: There are no such folders, or one has no image.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if len(names) < 2:
        expected = f"expected a folder with a folder of images for each class; it has {len(names)}"
        raise InvalidRequestError("zero_shot", str(folder), expected)
    files = [find_images(folder / name, "zero_shot") for name in names]
    labels = [number for number, found in enumerate(files) for _ in found]
    return names, [path for found in files for path in found], labels


def open_images(paths: Sequence[Path]) -> tuple[list[int], list[Image.Image], dict[str, str]]:
    """Those images that can be read, by their places in ``paths``; and file -> what is wrong with it."""
    places, images, broken = [], [], {}
    for place, path in enumerate(paths):
        try:
            images.append(open_image(path))
            places.append(place)
        except BrokenExampleError as error:
            broken[str(path)] = str(error)
    return places, images, broken
