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
from flagai_altdiff.pictures import json_of
from flagai_altdiff.pipeline import VERDICTS, Fit, Sample
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


def new_run(request: ResolvedRequest, model_name: str, choice: str = "") -> Run:
    """A run without images.

    Args:
        request: As it will be carried out.
        model_name: Name of the model.
        choice: What else tells runs apart: what was added to the model, how the images to keep are chosen.
    """
    return Run(id=f"{_digest(request, model_name, choice)}-{secrets.token_hex(4)}")


def find_run(outdir: Path, request: ResolvedRequest, model_name: str, choice: str = "") -> Run:
    """The latest run of the same request in a folder; a new one if there is none.

    Args:
        outdir: Folder of the images.
        request: As it will be carried out.
        model_name: Name of the model.
        choice: As for :func:`new_run`.
    """
    run = new_run(request, model_name, choice)
    same_request = re.compile(run.id.partition("-")[0] + "-[0-9a-f]{8}")
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
            run.finished[index] = Sample(
                prompt=prompts[index],
                index=index,
                seed=request.seed_of(index),
                safety=safety,
                fit=_fit(record.get("fit")),
                path=path,
                _file=path.absolute(),
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
