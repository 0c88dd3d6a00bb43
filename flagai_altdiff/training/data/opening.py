"""Data by what lies there: a folder of images, one with metadata, parquet files, shards, or what else has a name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from flagai_altdiff.errors import DataError, printable
from flagai_altdiff.training.data.example import Examples
from flagai_altdiff.training.data.folder import METADATA, Listed, TextsBeside
from flagai_altdiff.training.data.parquet import ParquetFiles
from flagai_altdiff.training.data.shard_names import expand, is_remote
from flagai_altdiff.training.data.shards import Shards
from flagai_altdiff.training.data.source import Reading, Selection, Source
from flagai_altdiff.training.data.texts import ENDINGS, TextLines

Opener = Callable[[str, Reading], Examples]
"""Opens what follows the colon of a name."""

OPENERS: dict[str, Opener] = {}
"""What stands before a colon -> what opens such data. Rooms that have data of their own add to it."""


def open_examples(source: str | Path | Sequence[str | Path], how: Reading | None = None) -> Examples:
    """Open training data.

    Args:
        source: A folder; shards or parquet files, as paths, addresses or patterns, one or several; or a name of
            ``OPENERS`` with a colon. In a folder, shards come before metadata, these before parquet files, these before
            text files. A ``.jsonl`` or ``.tsv`` of another name has texts without images.
        how: How they are read.

    Raises:
        DataError: There are none, or none that can be used.
    """
    how = how or Reading()
    sources = [source] if isinstance(source, str | Path) else list(source)
    if len(sources) == 1 and (found := _by_name(str(sources[0]), how)) is not None:
        return found
    examples = Selection(_source(sources, how), how)
    if not len(examples):
        reasons = "; ".join(examples.left_out.lines())
        expected = "images with a .txt of the same name, metadata.jsonl, .parquet files or .tar shards"
        raise DataError(
            f"{_shown(sources)}: no example. {f'Left out: {reasons}' if reasons else f'Expected: {expected}'}."
        )
    return examples


def _by_name(name: str, how: Reading) -> Examples | None:
    before, colon, rest = name.partition(":")
    return OPENERS[before](rest, how) if colon and before in OPENERS else None


def _source(sources: Sequence[str | Path], how: Reading) -> Source:
    names = expand(sources)
    folders = [name for name in names if not is_remote(name) and os.path.isdir(name)]
    if not names or (folders and len(names) > 1):
        raise DataError(f"{_shown(sources)}: expected one folder, or shards, or parquet files.")
    if folders:
        return _of_folder(Path(folders[0]), how)
    if all(_ending(name) == ".parquet" and not is_remote(name) for name in names):
        return ParquetFiles([Path(name) for name in names])
    if all(_ending(name) == ".tar" for name in names):
        return Shards(names, how)
    if len(names) == 1 and Path(names[0]).name in METADATA:
        return _of_metadata(Path(names[0]), how)
    if len(names) == 1 and _ending(names[0]) in ENDINGS and not is_remote(names[0]):
        return TextLines(Path(names[0]))
    if missing := next((name for name in names if not is_remote(name) and not os.path.exists(name)), None):
        raise DataError(f"{printable(missing, 300)} does not exist.")
    odd = next(name for name in names if _ending(name) != ".tar")
    raise DataError(
        f"{printable(odd, 300)}: expected a folder, .tar shards (unpack compressed ones with gunzip first),"
        f" .parquet files on this disk, {' or '.join(METADATA)}, or texts as .jsonl or .tsv."
    )


def _of_folder(folder: Path, how: Reading) -> Source:
    if shards := _files(folder, ".tar"):
        return Shards(shards, how)
    for name in METADATA:
        if (folder / name).is_file():
            return _of_metadata(folder / name, how)
    if files := _files(folder, ".parquet"):
        return ParquetFiles([Path(file) for file in files])
    if deeper := next((path for name in METADATA for path in sorted(folder.glob(f"*/{name}"))), None):
        raise DataError(f"{folder}: {deeper} is further down; open {deeper.parent}.")
    return TextsBeside(folder, need_texts=how.caption is None)


def _of_metadata(path: Path, how: Reading) -> Source:
    return Listed(path.parent, path, need_texts=how.caption is None)


def _files(folder: Path, ending: str) -> list[str]:
    """Files in a folder and below it, none of them hidden."""
    found = (path for path in folder.rglob(f"*{ending}") if path.is_file())
    return sorted(
        str(path) for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _ending(name: str) -> str:
    return os.path.splitext(name.split("?")[0] if is_remote(name) else name)[1].lower()


def _shown(sources: Sequence[str | Path]) -> str:
    return printable(", ".join(map(str, sources)) or "no source", 300)
