"""Runs: which saved images belong to one call, so that a call that was interrupted can go on."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import load_image
from flagai_altdiff.metadata import read_record
from flagai_altdiff.pipeline import VERDICTS, Sample
from flagai_altdiff.request import ResolvedRequest


@dataclass(kw_only=True)
class Run:
    """One call's images.

    Args:
        id: What its request is known by, a hyphen, and a random part of its own.
        finished: Index -> image, of those that lie in the folder.
    """

    id: str
    finished: dict[int, Sample] = field(default_factory=dict)


def new_run(request: ResolvedRequest, model_name: str) -> Run:
    """A run without images.

    Args:
        request: As it will be carried out.
        model_name: Name of the model.
    """
    return Run(id=f"{_digest(request, model_name)}-{secrets.token_hex(4)}")


def find_run(outdir: Path, request: ResolvedRequest, model_name: str) -> Run:
    """The latest run of the same request in a folder; a new one if there is none.

    Args:
        outdir: Folder of the images.
        request: As it will be carried out.
        model_name: Name of the model.
    """
    run = new_run(request, model_name)
    same_request = re.compile(re.escape(_digest(request, model_name)) + "-[0-9a-f]{8}")
    prompts = [prompt for batch in request.batches() for prompt in batch.prompts]
    for path in sorted(_files(outdir / "samples", "*.png"), key=_number, reverse=True):
        record = read_record(path)
        name, index, safety = record.get("run"), record.get("index"), record.get("safety")
        if not isinstance(name, str) or not same_request.fullmatch(name) or safety not in VERDICTS:
            continue
        if type(index) is not int or not 0 <= index < len(prompts):
            continue
        if not run.finished:
            run.id = name
        if name == run.id and _is_whole(path, request):
            seed, file = request.seed_of(index), path.absolute()
            run.finished[index] = Sample(
                prompt=prompts[index], index=index, seed=seed, safety=safety, path=path, _file=file
            )
    return run


def find_grid(outdir: Path, run: Run, size: tuple[int, int]) -> Path | None:
    """The grid of all images of a run, if it was made.

    Args:
        outdir: Folder of the images.
        run: Whose grid.
        size: Width and height that it has.
    """
    grids = ((path, read_record(path, size)) for path in _files(outdir, "grid-*.png"))
    return next((path for path, record in grids if record.get("run") == run.id and record.get("grid")), None)


def _digest(request: ResolvedRequest, model_name: str) -> str:
    settings = json.dumps({"model": model_name, **request.as_json()}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _files(folder: Path, pattern: str) -> Iterator[Path]:
    """Ordinary files only: a pipe of such a name would be waited for."""
    return (path for path in folder.glob(pattern) if path.is_file())


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() and path.stem.isascii() else -1


def _is_whole(path: Path, request: ResolvedRequest) -> bool:
    try:
        load_image(path, size=(request.width, request.height))
    except ImageError:
        return False
    return True
