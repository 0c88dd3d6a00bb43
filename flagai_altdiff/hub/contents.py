"""What a model's folder has, and what it lacks to be a whole model."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path, PurePosixPath

from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.hub.selection import INDEX
from flagai_altdiff.registry import ModelSpec

WEIGHT_SUFFIXES = (".ckpt", ".bin", ".safetensors", ".pt", ".pth")
MODEL_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".yaml", ".model", ".txt")
EQUIVALENTS = {
    "model.ckpt": "model.safetensors",
    "pytorch_model.bin": "model.safetensors",
    "sentencepiece.bpe.model": "tokenizer.json",
}
"""File of the FlagAI layout -> the one that does as well."""
WEIGHED_PARTS = ("text_encoder", "unet", "vae")
"""Parts of the diffusers layout without whose weights there is no model."""


def missing_files(spec: ModelSpec, folder: Path, *, config_only: bool = False) -> list[str]:
    """Names of the files that a folder lacks to be a complete model; empty files and wrong sizes count as missing.

    Args:
        spec: The model.
        folder: FlagAI layout, or diffusers layout if it has a ``model_index.json``.
        config_only: Weights are not needed.

    Returns:
        Names relative to ``folder``; in the diffusers layout ``<part>/*.safetensors`` for a part without any weights (all
        else there is the loader's to judge).
    """
    wrong = {file.name for file in spec.files if file.size_bytes not in (None, size_of(folder / file.name))}
    return lacking(spec, present_files(folder) - wrong, config_only=config_only)


def lacking(spec: ModelSpec, names: Set[str], *, config_only: bool = False) -> list[str]:
    """What a folder with files of these names lacks; the rule behind :func:`missing_files`."""
    flagai = [
        file.name
        for file in spec.files
        if not (names & {file.name, EQUIVALENTS.get(file.name)} or (config_only and is_weight(file.name)))
    ]
    if not flagai or INDEX not in names:
        return flagai
    having = {str(PurePosixPath(name).parent) for name in names if is_weight(name)}
    return [f"{part}/*.safetensors" for part in WEIGHED_PARTS if not (config_only or part in having)]


def present_files(folder: Path) -> set[str]:
    """Names of the files in a folder and in its subfolders, one level deep, that are not empty."""
    places = [folder, *(place for place in _entries(folder) if place.is_dir() and not place.name.startswith("."))]
    return {path.relative_to(folder).as_posix() for place in places for path in _entries(place) if size_of(path)}


def model_files(folder: Path) -> list[str]:
    """Names of the present files that are a model's, in order; no pictures, texts for people, or books of downloads."""
    return sorted(n for n in present_files(folder) if n.endswith(MODEL_SUFFIXES) and n != MANIFEST_NAME and n[0] != ".")


def is_weight(name: str) -> bool:
    """Whether a file of that name holds weights."""
    return name.endswith(WEIGHT_SUFFIXES)


def size_of(path: Path) -> int | None:
    """Size of a file in bytes; ``None`` if there is none."""
    return path.stat().st_size if path.is_file() else None


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
