"""Runs: which saved pictures belong to one call, so that a call that was interrupted can go on."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.metadata import read_record
from flagai_altdiff.pipeline import Picture
from flagai_altdiff.request import GenerationRequest


@dataclass(kw_only=True)
class Run:
    """One call's pictures.

    Args:
        id: What its request is known by, a hyphen, and a random part of its own.
        finished: Index -> picture, of those that lie in the folder.
        grid_path: Its grid, if that was made.
    """

    id: str
    finished: dict[int, Picture] = field(default_factory=dict)
    grid_path: Path | None = None


def new_run(request: GenerationRequest, model_name: str) -> Run:
    """A run without pictures.

    Args:
        request: As it will be carried out.
        model_name: Name of the model.
    """
    return Run(id=f"{_digest(request, model_name)}-{secrets.token_hex(4)}")


def find_run(outpath: Path, request: GenerationRequest, model_name: str) -> Run:
    """The latest run of the same request in a folder; a new one if there is none.

    Args:
        outpath: Folder of the pictures.
        request: As it will be carried out.
        model_name: Name of the model.
    """
    run = new_run(request, model_name)
    known_by = run.id.partition("-")[0]
    for path in sorted((outpath / "samples").glob("*.png"), key=_number, reverse=True):
        record = read_record(path)
        name, index = record.get("run"), record.get("index")
        if not isinstance(name, str) or not isinstance(index, int) or name.partition("-")[0] != known_by:
            continue
        if not run.finished:
            run.id = name
        if name == run.id and (image := _whole(path)) is not None:
            run.finished[index] = Picture(
                image=image,
                prompt=str(record.get("prompt")),
                index=index,
                seed=int(record.get("seed", 0)),
                safety=str(record.get("safety")),
                path=path,
            )
    grids = (path for path in outpath.glob("grid-*.png") if read_record(path).get("run") == run.id)
    run.grid_path = next(grids, None)
    return run


def check_resumable(seed: int | None, skip_save: bool) -> None:
    """InvalidRequestError for a call that leaves nothing to go on with."""
    if skip_save:
        raise InvalidRequestError("skip_save", True, "nothing was saved that resume could go on with; leave one of them out")
    if seed in (None, -1):
        raise InvalidRequestError("seed", seed, "resume needs the seed of the interrupted run: request_seed in its pictures")


def _digest(request: GenerationRequest, model_name: str) -> str:
    settings = json.dumps({"model": model_name, **asdict(request)}, sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _number(path: Path) -> int:
    return int(path.stem) if path.stem.isdecimal() and path.stem.isascii() else -1


def _whole(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None
