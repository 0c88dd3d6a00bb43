"""Which files make a model, in which layout: names and rules about names. No disk, no network, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Set
from pathlib import PurePosixPath

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
OTHER_SUFFIXES = (".json", ".yaml", ".model", ".txt")
"""Of configs and tokenizers."""
MATCHING_CONFIG = "config.json"
MATCHING_WEIGHTS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
"""How the weights of a matching model, whole or in shards, begin and end; the first that is there is the model."""
_MATCHING_FILE = "pytorch_model.bin"
FLAGAI_CONFIG = "config.yaml"
FLAGAI_WEIGHTS = ("model.safetensors", "model.ckpt", "dreambooth_model.ckpt")
"""Weights of a FlagAI folder; the first that is there is the model."""
DIFFUSERS_INDEX = "model_index.json"
DIFFUSERS_PARTS = ("feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae")
WEIGHED_PARTS = ("text_encoder", "unet", "vae")
"""Parts of the diffusers layout without whose weights there is no model."""
DIFFUSERS_CONFIGS = (*(f"{part}/config.json" for part in WEIGHED_PARTS), "scheduler/scheduler_config.json")
"""Configs without which the loader builds no model of the diffusers layout."""
TOKENIZER_FILES = ("sentencepiece.bpe.model", "tokenizer.json")
CHECKER_FOLDERS = ("safety_checker", "SafetyChecker", "../SafetyChecker")
"""Where a model's image checker may lie, from the model's folder; FlagAI's models share one."""
CHECKER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What belongs to a tokenizer file beside it."""
TOP_FILES = (
    *TOKENIZER_FILES,
    *TOKENIZER_COMPANIONS,
    FLAGAI_CONFIG,
    DIFFUSERS_INDEX,
    "config.json",
    "configuration.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "scheduler_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
"""What a model has in its folder itself, beside weights: other programs may obey another .json or .yaml there."""
MAX_WEIGHT_BYTES, MAX_OTHER_BYTES = 1 << 37, 1 << 28
"""The largest file of weights, and the largest of any other kind, that a model is believed to have."""
EQUIVALENTS = {
    "model.ckpt": "model.safetensors",
    "pytorch_model.bin": "model.safetensors",
    "sentencepiece.bpe.model": "tokenizer.json",
}
"""File of the FlagAI layout -> the one that a hub may have instead."""
FILLERS = {
    "model.ckpt": FLAGAI_WEIGHTS,
    "pytorch_model.bin": CHECKER_WEIGHTS,
    "sentencepiece.bpe.model": tuple(f"{place}{file}" for place in ("", "tokenizer/") for file in TOKENIZER_FILES),
}
"""File of the FlagAI layout -> those that the loader takes for it."""

MAX_SHARDS = 1000
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<of>[0-9]{5})(?P<variant>\.fp16)?(?P<suffix>\.safetensors|\.bin)"
)


def is_hidden(name: str) -> bool:
    """Whether a path has a hidden part, for example macOS's ``._model.ckpt``: never a part of a model."""
    return any((part[0] == "." and part not in (".", "..")) or part == "__MACOSX" for part in PurePosixPath(name).parts)


def is_weight(name: str) -> bool:
    """Whether a file of that name holds weights."""
    return name.endswith(WEIGHT_SUFFIXES) and not is_hidden(name)


def is_part(name: str) -> bool:
    """Whether a file of that name is a model's: weights, config or tokenizer; no image and no text for people."""
    return is_weight(name) or (name.endswith(OTHER_SUFFIXES) and not is_hidden(name))


def is_fetched(name: str) -> bool:
    """Whether a file of that name is taken from a hub: a model's, in a place where models have files."""
    folder, _, file = name.rpartition("/")
    if folder:
        return is_part(name) and folder in DIFFUSERS_PARTS
    return is_weight(file) or file in TOP_FILES or (file.endswith(".index.json") and not is_hidden(file))


def is_tokenizer(name: str) -> bool:
    """Whether a file of that name is a tokenizer, where the loader looks for one, or belongs to one."""
    folder, _, file = name.rpartition("/")
    return folder in ("", "tokenizer") and file in (*TOKENIZER_FILES, *TOKENIZER_COMPANIONS)


def most_bytes(name: str) -> int:
    """The largest size that a file of that name is believed to have."""
    return MAX_WEIGHT_BYTES if is_weight(name) else MAX_OTHER_BYTES


def fillers(name: str) -> set[str]:
    """Names of files that do what a file of the FlagAI layout does; the loader takes any of them."""
    return {name, *FILLERS.get(name, ())}


def decides(name: str, wanted: Iterable[str]) -> bool:
    """Whether a file of that name decides what the model in its folder is, whichever source it came from.

    Args:
        name: Path inside the folder.
        wanted: Files of the model in the FlagAI layout.
    """
    folder, _, _ = name.rpartition("/")
    if folder:
        return folder in (*WEIGHED_PARTS, "scheduler", "tokenizer") and is_part(name)
    return name == DIFFUSERS_INDEX or any(name in fillers(file) for file in wanted)


def diffusers_files(names: Iterable[str]) -> list[str]:
    """Of the paths in a repository, those that make a model in the diffusers layout.

    Left out are other formats, variants such as ``.fp16.``, and pickles of a part that has safetensors.
    """
    kept = [name for name in names if name == DIFFUSERS_INDEX or _belongs(name)]
    safe = {name.partition("/")[0] for name in kept if name.endswith(".safetensors")}
    return [name for name in kept if not (name.endswith(".bin") and name.partition("/")[0] in safe)]


def repository_files(names: Iterable[str]) -> list[str]:
    """Of the paths in a repository, those that make a model; none if it is no model's.

    That is one in the diffusers layout if there is a ``model_index.json``; else, if there is a ``config.json``, a
    matching model in the root, whose pickles are left out where it has safetensors.
    """
    names = list(names)
    if DIFFUSERS_INDEX in names:
        return diffusers_files(names)
    root = [name for name in names if "/" not in name and is_part(name)] if MATCHING_CONFIG in names else []
    weights = [
        [name for name in root if name.startswith(stem) and name.endswith(end)] for stem, end in MATCHING_WEIGHTS
    ]
    chosen = next(filter(None, weights), [])
    return [name for name in root if not is_weight(name) or name in chosen]


def lacking(wanted: Iterable[str], names: Set[str], *, config_only: bool = False) -> list[str]:
    """What a folder with files of these names lacks to be a model.

    Args:
        wanted: Files of the model in the FlagAI layout.
        names: Paths of the files that are there, relative to the folder.
        config_only: Weights are not needed.

    Returns:
        Names of the FlagAI layout, or of shards that are gone where others lie; in a folder that has a
        ``model_index.json``, configs, a tokenizer, shards, and ``<part>/*.safetensors`` for a part without any weights:
        what the loader asks for, and no more.
    """
    flagai = [name for name in wanted if not (names & fillers(name) or (config_only and is_weight(name)))]
    if _MATCHING_FILE in flagai and any(map(_SHARD.fullmatch, names)):
        flagai = [name for name in flagai if name != _MATCHING_FILE] + _lacking_weights("", names)
    if not flagai or DIFFUSERS_INDEX not in names:
        return flagai
    gone = [name for name in DIFFUSERS_CONFIGS if name not in names]
    if not names & fillers(TOKENIZER_FILES[0]):
        gone.append(f"tokenizer/{TOKENIZER_FILES[0]}")
    parts = () if config_only else WEIGHED_PARTS
    return gone + [name for part in parts for name in _lacking_weights(part, names)]


def _lacking_weights(part: str, names: Set[str]) -> list[str]:
    """What a part in the diffusers layout lacks of its weights: all, or some of its shards and their index."""
    there = [name for name in names if is_weight(name) and name.rpartition("/")[0] == part]
    shards = [match for name in there if (match := _SHARD.fullmatch(name))]
    if not there or len(shards) < len(there):
        return [] if there else [f"{part}/*.safetensors"]
    first = min(shards, key=lambda shard: shard.string)
    stem, variant, of, suffix = first["stem"], first["variant"] or "", first["of"], first["suffix"]
    most = min(int(of), MAX_SHARDS)
    wanted = [f"{stem}-{number:05}-of-{of}{variant}{suffix}" for number in range(1, most + 1)]
    indexes = [f"{stem}{variant}{suffix}.index.json", f"{stem}{suffix}.index{variant}.json"]
    return [name for name in wanted if name not in names] + ([] if names & set(indexes) else indexes[:1])


def _belongs(path: str) -> bool:
    part, _, file = path.partition("/")
    if part not in DIFFUSERS_PARTS or "/" in file or ".fp16." in file or not is_part(file):
        return False
    return file.endswith((".json", ".txt", ".model")) or (
        file.endswith((".bin", ".safetensors")) and file.count(".") == 1
    )
