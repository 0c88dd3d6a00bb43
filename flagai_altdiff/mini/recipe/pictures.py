"""The images of shards at hand, with what is known of each."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flagai_altdiff.files import new_file


@dataclass(frozen=True)
class Pictures:
    """Images, all of one size.

    Args:
        pixels: (N, H, W, 3) uint8, mapped.
        facts: Of each, as its shard tells: ``captions`` by language, and the scene.
    """

    pixels: NDArray[np.uint8]
    facts: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.facts)

    def batch(self, indices: list[int]) -> Tensor:
        """Some of them, (B, 3, H, W) in [-1, 1]."""
        chosen = torch.from_numpy(self.pixels[indices])
        return chosen.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def read_pictures(data: Path, work: Path) -> Pictures:
    """Unpack shards once, and map what was unpacked.

    Args:
        data: Folder of shards, from ``things.shards.write_things``.
        work: Where the unpacked pixels lie.
    """
    pixels, facts = work / "pixels.npy", work / "facts.json"
    if not facts.is_file():
        found = list(_unpack(data))
        work.mkdir(parents=True, exist_ok=True)
        with new_file(pixels, replace=True) as unfinished, open(unfinished, "wb") as file:
            np.save(file, np.stack([image for image, _ in found]))
        with new_file(facts, replace=True) as unfinished:
            unfinished.write_text(json.dumps([fact for _, fact in found], ensure_ascii=False), encoding="utf-8")
    return Pictures(np.load(pixels, mmap_mode="r"), json.loads(facts.read_text(encoding="utf-8")))


def _unpack(data: Path) -> Any:
    for shard in sorted(data.glob("*.tar")):
        with tarfile.open(shard) as tar:
            image = None
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".png"):
                    image = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                else:
                    yield image, json.loads(file.read())
