"""Runs: which saved images belong to one call, so that a call that was interrupted can go on."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import load_image
from flagai_altdiff.metadata import read_record
from flagai_altdiff.pictures import json_of
from flagai_altdiff.pipeline import VERDICTS, Fit, Sample
from flagai_altdiff.request import ResolvedRequest

MANY = "run.json"
"""Lies in a folder that a run of very many pictures has for itself."""
_RUN = re.compile("[0-9a-f]{16}-[0-9a-f]{8}")


@dataclass(kw_only=True)
class Run:
    """One call's images.

    Args:
        id: What its request is known by, a hyphen, and a random part of its own.
        finished: Index -> image, of those that lie in the folder.
    """

    id: str
    finished: dict[int, Sample] = field(default_factory=dict)


def new_run(request: ResolvedRequest, model_name: str, choice: str = "") -> Run:
    """A run without images.

    Args:
        request: As it will be carried out.
        model_name: Name of the model.
        choice: What else tells runs apart: what was added to the model, how the images to keep are chosen.
    """
    return Run(id=f"{_digest(request, model_name, choice)}-{secrets.token_hex(4)}")


@dataclass(frozen=True)
class Saved:
    """What the images and grids of a folder say of their runs; each is read once, for however many requests.

    Args:
        folder: Of the images.
    """

    folder: Path

    @cached_property
    def images(self) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
        """What a request is known by -> its images, the newest first, each with what tells which it is."""
        found: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for path in sorted(_files(self.folder / "samples", "*.png"), key=_number, reverse=True):
            record = read_record(path)
            if isinstance(name := record.get("run"), str) and _RUN.fullmatch(name):
                told = {key: record.get(key) for key in ("run", "index", "safety", "fit")}
                found.setdefault(name.partition("-")[0], []).append((path, told))
        return found

    @cached_property
    def grids(self) -> dict[str, list[Path]]:
        """Run -> its grids."""
        found: dict[str, list[Path]] = {}
        for path in _files(self.folder, "grid-*.png"):
            if isinstance(name := read_record(path).get("run"), str):
                found.setdefault(name, []).append(path)
        return found


def find_run(saved: Saved, request: ResolvedRequest, model_name: str, choice: str = "") -> Run:
    """The latest run of the same request in a folder; a new one if there is none.

    Args:
        saved: What lies in the folder.
        request: As it will be carried out.
        model_name: Name of the model.
        choice: As for :func:`new_run`.
    """
    run = new_run(request, model_name, choice)
    prompts = [prompt for batch in request.batches() for prompt in batch.prompts]
    for path, record in saved.images.get(run.id.partition("-")[0], ()):
        name, index, safety = record["run"], record["index"], record["safety"]
        if safety not in VERDICTS:
            continue
        if type(index) is not int or not 0 <= index < len(prompts):
            continue
        if not run.finished:
            run.id = name
        if name == run.id and _is_whole(path, request):
            run.finished[index] = Sample(
                prompt=prompts[index],
                index=index,
                seed=request.seed_of(index),
                safety=safety,
                fit=_fit(record["fit"]),
                path=path,
                _file=path.absolute(),
            )
    return run


def find_grid(saved: Saved, run: Run, size: tuple[int, int]) -> Path | None:
    """The grid of all images of a run, if it was made.

    Args:
        saved: What lies in the folder.
        run: Whose grid.
        size: Width and height that it has.
    """
    grids = ((path, read_record(path, size)) for path in saved.grids.get(run.id, ()))
    return next((path for path, record in grids if record.get("run") == run.id and record.get("grid")), None)


def _digest(request: ResolvedRequest, model_name: str, choice: str) -> str:
    chosen = {"choice": choice} if choice else {}
    own = {name: json_of(value) for name, value in request.as_json().items()}
    settings = json.dumps({"model": model_name, **own, **chosen}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _fit(found: object) -> Fit | None:
    match found:
        case {"judge": str(judge), "similarity": float(similarity), "rank": int(rank), "of": int(of)}:
            return Fit(judge=judge, similarity=similarity, rank=rank, of=of)
    return None


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    """Ordinary files only: a pipe of such a name would be waited for."""
    return (path for path in folder.glob(pattern) if path.is_file())


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() and path.stem.isascii() else -1


def _is_whole(path: Path, request: ResolvedRequest) -> bool:
    try:
        load_image(path, size=request.final_size)
    except ImageError:
        return False
    return True
