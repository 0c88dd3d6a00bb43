"""Tiny training data for tests: images of any mode, shards with any fault."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def image_bytes(colour: object = "red", size: tuple[int, int] = (20, 16), mode: str = "RGB", **save: Any) -> bytes:
    """An image file, PNG unless ``format`` says otherwise."""
    buffer = io.BytesIO()
    image = Image.new(mode, size, colour)  # type: ignore[arg-type]
    image.save(buffer, **{"format": "PNG", **save})
    return buffer.getvalue()


def noise_bytes(size: tuple[int, int] = (64, 64), format: str = "PNG") -> bytes:
    """An image whose file is not small, so that it can be cut off anywhere."""
    buffer = io.BytesIO()
    noise = random.Random(0).randbytes(3 * size[0] * size[1])
    Image.frombytes("RGB", size, noise).save(buffer, format=format)
    return buffer.getvalue()


def sample(
    number: int, *, json_fields: Mapping[str, object] | None = None, text: str | None = None
) -> dict[str, bytes]:
    """The files of one example of a shard, by ending."""
    files = {"png": image_bytes((number % 256, 0, 0))}
    if text is not None:
        files["txt"] = text.encode()
    if json_fields is not None:
        files["json"] = json.dumps(dict(json_fields)).encode()
    return files


def tar_bytes(files: Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of files by name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def shard_bytes(samples: Sequence[Mapping[str, bytes]], first: int = 0) -> bytes:
    """A shard as img2dataset writes it: names of nine digits."""
    return tar_bytes(
        [(f"{first + i:09}.{ending}", content) for i, files in enumerate(samples) for ending, content in files.items()]
    )


def plain_shard(count: int, first: int = 0) -> bytes:
    """A shard of images that tell their number by their colour."""
    return shard_bytes([sample(first + i, text=f"number {first + i}") for i in range(count)], first)


def write_folder(folder: Path, count: int) -> Path:
    """A folder of images with texts."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(image_bytes((i % 256, 0, 0)))
        (folder / f"{i:03}.txt").write_text(f"number {i}")
    return folder
