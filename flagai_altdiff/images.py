"""Images: tensors to PIL, grids, and PNG files that appear whole, under numbers that are never used twice."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile, PngInfo

from flagai_altdiff.errors import ImageError, shown
from flagai_altdiff.files import new_file, open_regular

if TYPE_CHECKING:
    from torch import Tensor

_PNG = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks that Pillow unpacks when it opens a file, to a mebibyte each."""
_MAX_TEXTS, _MAX_CHUNKS, _SMALL_CHUNK_BYTES = 8, 64, 512
"""An image of ours has two texts, and pixels in chunks of 64 KiB; other programs may add some, or cut it finer."""
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
        ImageError: It is gone, truncated, no PNG, or has another size.
    """
    with _opened(path) as image:
        _check_size(path, image, size)
        return image.convert("RGB")


def read_texts(path: Path, size: tuple[int, int] | None = None) -> dict[str, str]:
    """Texts that a whole PNG carries before its pixels, key -> text; arguments and errors as of :func:`load_image`."""
    with _opened(path) as image:
        _check_size(path, image, size)
        return _texts(image)


def texts_in(file: BinaryIO) -> dict[str, str]:
    """As :func:`read_texts`, of a file that is open."""
    with _reading("the image"):
        _check_chunks(file)
        with PngImageFile(file) as image:
            return _texts(image)


def _texts(image: ImageFile) -> dict[str, str]:
    return {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}


def _check_size(path: Path, image: Image.Image, size: tuple[int, int] | None) -> None:
    if size not in (None, image.size):
        raise ImageError(f"{path} is an image of {image.width}x{image.height} px, not of {size}.")


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """An open PNG file; whatever else is in it, and whatever Pillow makes of that, is ImageError."""
    with _reading(path), open_regular(path) as file:
        _check_chunks(file)
        with PngImageFile(file) as image:  # unlike Image.open, it does not take a large grid for a bomb
            yield image


@contextmanager
def _reading(place: object) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # Pillow has many kinds
        reason = getattr(error, "strerror", None) or shown(str(error) or type(error).__name__)
        raise ImageError(f"{place} cannot be read as a PNG image: {reason}.") from error


def _check_chunks(file: BinaryIO) -> None:
    """ValueError unless a file has the chunks of a whole PNG, few of them packed texts; nothing is unpacked."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_PNG)) != _PNG:
        raise ValueError("it does not begin like one")
    kind, count, texts = b"", 0, 0
    while kind != b"IEND":
        length, kind = _CHUNK.unpack(file.read(_CHUNK.size))
        end = file.seek(length + _CHECKSUM_BYTES, os.SEEK_CUR)
        count, texts = count + 1, texts + (kind in _TEXT_CHUNKS)
        if end > size:
            raise ValueError("it is truncated")
        if texts > _MAX_TEXTS or count > _MAX_CHUNKS + size // _SMALL_CHUNK_BYTES:
            raise ValueError("it has too many chunks for an image")
    file.seek(0)


def grid_size(count: int, columns: int, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a grid of so many images of one size; a single image is its own grid."""
    if count == 1:
        return size
    columns = min(columns, count)
    width, height = (side + _GRID_PADDING for side in size)
    return columns * width + _GRID_PADDING, -(-count // columns) * height + _GRID_PADDING


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
    grid: Image.Image | None = None
    width = height = 0
    for i, image in enumerate(images):
        if count == 1:
            return image.copy()
        if grid is None:
            width, height = (side + _GRID_PADDING for side in image.size)
            size = grid_size(count, columns, image.size)
            if size[0] * size[1] > _MAX_GRID_PIXELS:
                raise ValueError(
                    f"{count} images of {image.width}x{image.height} make a grid of {size[0]}x{size[1]} px"
                )
            grid = Image.new("RGB", size)
        grid.paste(image, ((i % columns) * width + _GRID_PADDING, (i // columns) * height + _GRID_PADDING))
    assert grid is not None
    return grid


def save_png(image: Image.Image, texts: Mapping[str, str], path: Path | BinaryIO) -> None:
    """Write an image with texts that stay in the file, key -> text (iTXt: any script survives)."""
    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text, zip=len(text) > 1000)
    image.save(path, "PNG", pnginfo=info)


class NumberedFolder:
    """PNG files of one folder under running numbers, from the one after the highest on; a number is never used again.

    Args:
        folder: It may be a link of this user or of the administrator, as to a larger disk; one that somebody else
            planted is refused, and so is a folder that is exchanged for another after the first look.
        pattern: File name with one ``%0Nd``, for example ``"grid-%04d.png"``.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder, self._pattern = folder, pattern
        self._identity: tuple[int, int] | None = None
        self._next: int | None = None

    def prepare(self) -> None:
        """Make the folder, and a file in it that is gone at once.

        Raises:
            OSError: The folder cannot be made or written to, or is somebody else's link.
        """
        with suppress(FileNotFoundError):
            found = os.lstat(self._folder)
            if stat.S_ISLNK(found.st_mode) and found.st_uid not in (getattr(os, "geteuid", lambda: 0)(), 0):
                raise PermissionError(errno.EPERM, "it is a link that another user made", str(self._folder))
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self._folder):
            self._identity = self._look()

    def save(self, image: Image.Image, texts: Mapping[str, str]) -> Path:
        """Save an image; never over another file, whichever process wrote it.

        Args:
            image: The image.
            texts: Key -> text to keep in the file.

        Returns:
            The file's path.

        Raises:
            OSError: The disk refuses, or the folder is not the one that it was.
        """
        if self._identity is None:
            self.prepare()
        if self._next is None:
            self._next = 1 + highest_number(self._folder, self._pattern)
        while True:
            if self._look() != self._identity:
                raise FileExistsError(errno.EEXIST, "another folder was put in its place", str(self._folder))
            target = self._folder / (self._pattern % self._next)
            self._next += 1
            if not os.path.lexists(target):
                with suppress(FileExistsError), new_file(target) as unfinished:
                    save_png(image, texts, unfinished)
                    return target

    def _look(self) -> tuple[int, int]:
        found = os.stat(self._folder)
        return found.st_dev, found.st_ino


def highest_number(folder: Path, pattern: str) -> int:
    """The highest number among the files of a pattern; -1 if there are none."""
    head, tail = re.split(r"%0\d+d", pattern)
    number = re.compile(re.escape(head) + r"([0-9]{1,12})" + re.escape(tail))
    return max((int(m[1]) for name in os.listdir(folder) if (m := number.fullmatch(name))), default=-1)
