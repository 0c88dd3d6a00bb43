"""The whole recipe, in its order; every part makes what it needs of earlier ones, or reads what a run has of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.mini.recipe import parts, results
from flagai_altdiff.mini.recipe.parts import Place
from flagai_altdiff.training.processes import is_first

logger = logging.getLogger(__name__)

PARTS: dict[str, Callable[[Place], object]] = {
    "data": parts.corpus,
    "tokenizer": parts.tokenizer,
    "judge": parts.judge,
    "autoencoder": parts.autoencoder,
    "teacher": parts.teacher,
    "unet": parts.unet,
    "student": parts.student,
    "alignment": parts.alignment,
    "quality": parts.quality,
    "guidance": parts.guidance,
    "words": parts.words,
    "polish": parts.polish,
    "tables": results.tables,
    "export": results.export,
    "measure": results.measure_all,
}
"""Parts of the recipe, in order."""


def train_mini(
    *,
    out: Path,
    work: Path = Path("runs/mini"),
    data: Path | None = None,
    names: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Train AltDiffusion-mini and AltCLIP-mini and write them as folders. Under torchrun all processes take part.

    Args:
        out: Folder that gets a folder for each model.
        work: Folder for what takes long to make; a run that was stopped goes on from there.
        data: Folder of ``altdiff data things``, which is called if there is none; one in ``work`` unless given.
        names: Keys of ``PARTS``; all of them unless given.
        resume: Go on with the run in ``work``; without it, ``work`` must be new or empty.

    Raises:
        InvalidRequestError: Unknown part, or a run that would be mixed up with another.
        DataError: The pictures or words cannot be had.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
        NotFiniteError: The loss is no number any more.
        DiskError: A state cannot be saved.
    """
    if unknown := sorted(set(names) - set(PARTS)):
        raise InvalidRequestError("stage", ", ".join(unknown), f"expected some of {', '.join(PARTS)}")
    if not resume and work.is_dir() and any(work.iterdir()) and is_first():
        raise InvalidRequestError(
            "work", str(work), "it holds a run; add --resume to go on with it, or name another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    place = Place(data=data or work / "things", work=work, out=out)
    for name in names or PARTS:
        logger.info("part: %s", name)
        PARTS[name](place)
