"""What this package knows by name: models, tasks and sampler names. Plain data; a new variant is one entry.

Sizes and hashes bind downloads only; one that is not known is ``None`` and recorded at the first download.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flagai_altdiff.errors import OtherTaskError, UnknownModelError, UnknownTaskError
from flagai_altdiff.model_files import WEIGHED_PARTS, is_weight

DEFAULT_MODEL_DIR = Path("./checkpoints")
DRAWING, MATCHING = TASKS = ("text2img", "txt_img_matching")
"""Tasks of ``AutoLoader(task_name=...)``."""
_ALSO_DRAWING = ("img2img", "inpainting", "inpaint", "outpainting")
"""The same models do these."""


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """One file of a model.

    Args:
        name: Path inside the model's folder, with forward slashes.
        size_bytes: Exact size, if known.
        sha256: Hex digest, if known.
    """

    name: str
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that can be asked for by name.

    Args:
        name: Its registered spelling; also its folder under ``model_dir`` and its name on BAAI's hub.
        task: One of ``TASKS``.
        languages: ISO 639-1 codes of the prompts it was trained for.
        licence: SPDX-like name of the weights' licence.
        size_bytes: Size of a download, about.
        files: Files of the FlagAI layout that make the model complete.
        sources: Pairs of a hub and the name there, in the order of preference; none for an embedded model.
        revision: Commit of the Hugging Face repository; ``None`` takes what its main branch is at the first download.
        height: Default height of an image, in pixels.
        width: Default width, in pixels.
        steps: Default number of sampler steps.
        guidance_scale: Default strength of the prompt.
        needs_safety_checker: Whether the released model comes with one.
        has_pre_transformation: Whether its text encoder has m18's read-out, by which a file under a wrong name is told;
            ``None`` if that is not known.
    """

    name: str
    task: str = DRAWING
    languages: tuple[str, ...]
    licence: str = "CreativeML OpenRAIL-M"
    size_bytes: int
    files: tuple[FileSpec, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    revision: str | None = None
    height: int = 512
    width: int = 512
    steps: int = 50
    guidance_scale: float = 7.5
    needs_safety_checker: bool = True
    has_pre_transformation: bool | None = None

    @property
    def embedded(self) -> bool:
        """Whether the weights come with the package."""
        return not self.sources


_M9 = ("en", "zh", "es", "fr", "ru", "ja", "ko", "ar", "it")
_M18 = ("ar", "de", "en", "es", "fr", "hi", "it", "ja", "ko", "nl", "pl", "pt", "ru", "th", "tr", "uk", "vi", "zh")
_MATCHING_FILES = tuple(FileSpec(name=name) for name in ("config.json", "pytorch_model.bin", "sentencepiece.bpe.model"))
_FLAGAI_FILES = tuple(FileSpec(name=name) for name in ("config.yaml", "model.ckpt", "sentencepiece.bpe.model"))


def _released(name: str, languages: tuple[str, ...], revision: str | None = None) -> ModelSpec:
    return ModelSpec(
        name=name,
        languages=languages,
        size_bytes=8_000_000_000,
        files=_FLAGAI_FILES,
        sources=(("baai", name), ("huggingface", f"BAAI/{name}")),
        revision=revision,
        has_pre_transformation=name.endswith("m18"),
    )


def _matching(name: str, repository: str, languages: tuple[str, ...], size_bytes: int) -> ModelSpec:
    return ModelSpec(
        name=name,
        task=MATCHING,
        languages=languages,
        size_bytes=size_bytes,
        files=_MATCHING_FILES,
        sources=(("baai", name), ("huggingface", f"BAAI/{repository}")),
        needs_safety_checker=False,
    )


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _released("AltDiffusion", ("zh", "en")),
        _released("AltDiffusion-m9", _M9),
        _released("AltDiffusion-m18", _M18, "b3c429d6aa48346ab421ea314375d4a10b9b66e9"),
        ModelSpec(
            name="AltDiffusion-mini",
            languages=_M18,
            licence="Apache-2.0",
            size_bytes=16_400_000,
            files=tuple(FileSpec(name=n) for n in ("config.yaml", "model.safetensors", "sentencepiece.bpe.model")),
            height=128,
            width=128,
            steps=20,
            guidance_scale=2.0,
            needs_safety_checker=False,
        ),
        ModelSpec(
            name="AltCLIP-mini",
            task=MATCHING,
            languages=_M18,
            licence="Apache-2.0",
            size_bytes=9_900_000,
            files=tuple(FileSpec(name=n) for n in ("config.json", "model.safetensors", "sentencepiece.bpe.model")),
            needs_safety_checker=False,
        ),
        _matching("AltCLIP-XLMR-L", "AltCLIP", ("zh", "en"), 3_500_000_000),
        _matching("AltCLIP-XLMR-L-m9", "AltCLIP-m9", _M9, 3_500_000_000),
        _matching("AltCLIP-XLMR-L-m18", "AltCLIP-m18", _M18, 4_800_000_000),
    )
}
"""Every model by its registered name."""

SAFETY_CHECKER = ModelSpec(
    name="SafetyChecker",
    task="safety",
    languages=(),
    size_bytes=1_220_000_000,
    files=tuple(FileSpec(name=n) for n in ("config.json", "pytorch_model.bin")),
    sources=(("baai", "SafetyChecker"),),
)
"""The released models' checker as FlagAI's hub has it; Hugging Face repositories carry it as ``safety_checker/``."""

UNREGISTERED = ModelSpec(name="", languages=(), licence="unknown", size_bytes=0)
"""What is assumed of weights that are loaded by path."""


def find_model(name: str) -> ModelSpec | None:
    """The registered model of that name, ignoring case; ``None`` if there is none."""
    return {k.lower(): spec for k, spec in MODELS.items()}.get(name.lower())


def get_model_spec(name: str) -> ModelSpec:
    """Like :func:`find_model`; an unknown name raises UnknownModelError with the known names and the nearest one."""
    spec = find_model(name)
    if spec is None:
        raise UnknownModelError(name, MODELS, "A path to a folder or file with weights works as well.")
    return spec


def locate(
    name_or_path: str | Path, model_dir: str | Path = DEFAULT_MODEL_DIR, *, task: str | None = None
) -> tuple[ModelSpec | None, Path]:
    """Spec (of a registered model) and path of a model; the files need not be there yet.

    Args:
        name_or_path: A registered name, in any case, or the path of a folder or file; the name wins where both fit.
        model_dir: Folder of the model folders; one of the model's name in any case is found. One without any weights
            does not hide the model that comes with the package.
        task: What a registered model must be for; any if left out.

    Raises:
        UnknownModelError: Neither registered nor a path; OtherTaskError if it is registered for another task.
    """
    spec, model_dir = find_model(str(name_or_path)), Path(model_dir)
    known = [name for name, other in MODELS.items() if task in (None, other.task)]
    if spec and task not in (None, spec.task):
        raise OtherTaskError(spec.name, spec.task, str(task), known)
    if spec is None:
        path = Path(name_or_path)
        for candidate in (path, model_dir / path):
            if os.path.exists(candidate):  # unlike Path.exists, it takes any text
                return None, candidate
        raise UnknownModelError(str(name_or_path), known, "There is no file or folder of that name either.")
    folders = list[Path]()
    with suppress(OSError, ValueError):  # a folder that cannot be listed has none of the names
        folders = sorted(model_dir.iterdir())
    named = [folder for folder in folders if folder.name.lower() == spec.name.lower() and os.path.isdir(folder)]
    home = (embedded_dir() if spec.embedded else model_dir) / spec.name
    whole = [folder for folder in named if _has_weights(folder)]
    return spec, (whole or ([] if spec.embedded else named) or [home])[0]


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights where a model has them: what is left of a download, or a lock, is no model.

    One that may not be entered holds none, as far as can be told; whoever loads or fetches it is told why.
    """
    try:
        places = [place for place in (folder, *(folder / part for part in WEIGHED_PARTS)) if os.path.isdir(place)]
        found = (path for place in places for path in place.iterdir() if is_weight(path.name))
        return os.path.isdir(folder / "snapshots") or any(path.is_file() and path.stat().st_size for path in found)
    except OSError:
        return False


def as_task(name: str) -> str:
    """One of ``TASKS``, also from what other libraries call drawing from a picture and into one.

    Raises:
        UnknownTaskError: There is none of that name.
    """
    task = DRAWING if name in _ALSO_DRAWING else name
    if task not in TASKS:
        raise UnknownTaskError(name, TASKS, "This package has FlagAI's text-to-image and matching models only.")
    return task


def embedded_dir() -> Path:
    """Folder whose subfolders are the models that come with the package."""
    installed = Path(__file__).parent / "checkpoints"
    return installed if os.path.isdir(installed) else Path(__file__).parent.parent / "checkpoints"
