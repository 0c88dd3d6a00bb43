"""Images that people bring: found, opened whatever they are, and named where they are broken."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from flagai_altdiff.decoding import SUFFIXES, open_image, read_image, reading
from flagai_altdiff.errors import BrokenExampleError, InvalidRequestError
from flagai_altdiff.files import open_regular
from flagai_altdiff.tar import BrokenTarError, members

SHARD = ".tar"


@dataclass(frozen=True)
class InShard:
    """An image in a shard of webdataset.

    Args:
        shard: The file.
        name: Of the image in it.
        offset: Where its content begins.
        size: Of its content.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def absolute(self) -> InShard:
        """The same, wherever a program is."""
        return replace(self, shard=self.shard.absolute())

    def stat(self) -> os.stat_result:
        """Size and times of its shard."""
        return self.shard.stat()

    def open(self) -> Image.Image:
        """The image; errors as of :func:`flagai_altdiff.decoding.open_image`."""
        with reading(str(self)), open_regular(self.shard) as file:
            file.seek(self.offset)
            return read_image(io.BytesIO(file.read(self.size)), str(self))


ImageFile = Path | InShard


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


def find_images(folder: Path, field: str = "pictures") -> list[ImageFile]:
    """Every image file in a folder and the folders in it, in the order of their paths; links to folders are left out.

    Images in shards of webdataset count as well.

    Raises:
        InvalidRequestError: There is none, or a shard is damaged.
    """
    files = sorted(_files(folder, (*SUFFIXES, SHARD)), key=lambda path: path.relative_to(folder).as_posix())
    found = [image for path in files for image in (_in_shard(path, field) if _is_shard(path) else [path])]
    if not found:
        kinds = " ".join(SUFFIXES)
        problem = "there is no image in it" if folder.is_dir() else "it is no folder"
        raise InvalidRequestError(field, str(folder), f"{problem}; expected a folder of images ({kinds})")
    return found


def _files(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    for place, _, names in os.walk(folder):
        yield from (Path(place, n) for n in names if n.lower().endswith(endings) and not n.startswith("."))


def _is_shard(path: Path) -> bool:
    return path.name.lower().endswith(SHARD)


def _in_shard(path: Path, field: str) -> list[ImageFile]:
    """The images of a shard, in its order."""
    try:
        with open_regular(path) as file:
            inside = members(file, file.seek(0, io.SEEK_END))
            return [InShard(path, m.name, m.offset, m.size) for m in inside if m.name.lower().endswith(SUFFIXES)]
    except (OSError, BrokenTarError) as error:
        raise InvalidRequestError(field, str(path), f"cannot be read as a shard: {error}") from error


def find_classes(folder: Path) -> tuple[list[str], list[ImageFile], list[int]]:
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


def open_images(paths: Sequence[ImageFile]) -> tuple[list[int], list[Image.Image], dict[str, str]]:
    """Those images that can be read, by their places in ``paths``; and file -> what is wrong with it."""
    places, images, broken = [], [], {}
    for place, path in enumerate(paths):
        try:
            images.append(open_image(path) if isinstance(path, Path) else path.open())
            places.append(place)
        except BrokenExampleError as error:
            broken[str(path)] = str(error)
    return places, images, broken
