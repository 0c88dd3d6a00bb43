"""What lies at a path: a FlagAI folder, a diffusers folder, a Hugging Face cache entry or a single file. Found by content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from flagai_altdiff.checkpoint import diffusers_folder, diffusers_keys
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.checkpoint.structure import complete_text_encoder, infer_config, refuse_other_models
from flagai_altdiff.config import LatentDiffusionConfig, load_config
from flagai_altdiff.errors import CheckpointError

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_WEIGHT_NAMES = ("model.safetensors", "model.ckpt", "dreambooth_model.ckpt")
_MAX_REF_BYTES = 200
_SAFETY_FOLDERS = ("safety_checker", "SafetyChecker", "../SafetyChecker")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the parts of a model are.

    Args:
        folder: The folder that its tokenizer and safety checker are searched in.
        weights: The one file of weights; ``None`` for a diffusers folder.
        config: Its config.yaml; ``None`` for a diffusers folder and for a lone file.
    """

    folder: Path
    weights: Path | None = None
    config: Path | None = None

    @property
    def name(self) -> str:
        """Which layout this is, in words."""
        if self.weights is None:
            return "diffusers folder"
        return "FlagAI folder" if self.config and self.config.name == "config.yaml" else "single file"

    @property
    def safety_checker(self) -> Path | None:
        """Folder of the safety checker that lies with the model."""
        places = ((self.folder / name).resolve() for name in _SAFETY_FOLDERS)
        return next((p for p in places if (p / "config.json").is_file()), None)


def detect(path: Path) -> Layout:
    """Find out what lies at ``path``.

    Raises:
        CheckpointError: Nothing that can be loaded; the message says what was found and what was expected.
    """
    if path.is_file():
        beside = [path.with_suffix(".yaml"), path.with_suffix(".yml")]
        return Layout(folder=path.parent, weights=path, config=next((c for c in beside if c.is_file()), None))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    if diffusers_folder.is_diffusers_folder(path):
        return Layout(folder=path)
    config = path / "config.yaml"
    weights = [path / name for name in _WEIGHT_NAMES if (path / name).is_file()]
    if not weights:
        weights = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in WEIGHT_SUFFIXES)
    if config.is_file() and weights:
        return Layout(folder=path, weights=weights[0], config=config)
    if (path / "snapshots").is_dir():
        return detect(_snapshot(path))
    if len(weights) == 1:
        return detect(weights[0])
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{path} holds no model that is known here. Expected config.yaml with model.ckpt or model.safetensors (FlagAI), "
        f"model_index.json with unet/, vae/, text_encoder/ and tokenizer/ (diffusers), snapshots/ (Hugging Face cache) "
        f"or one file of weights. Found: {found}."
    )


def read(layout: Layout) -> tuple[LatentDiffusionConfig, dict[str, Tensor]]:
    """Config and weights of a model.

    Args:
        layout: From :func:`detect`.

    Returns:
        The config, complete; and LDM key -> tensor, as the files have them.

    Raises:
        CheckpointError: Unreadable or of another kind.
        ConfigError: The config cannot be built, or contradicts the weights.
    """
    if layout.weights is None:
        return _read_diffusers(layout.folder)
    state = read_tensors(layout.weights)
    where = str(layout.weights)
    refuse_other_models(state, where)
    if layout.config is None:
        return infer_config(state, where), state
    config = load_config(layout.config)
    return replace(config, cond_stage=complete_text_encoder(config.cond_stage, state, where), use_ema=False), state


def _read_diffusers(folder: Path) -> tuple[LatentDiffusionConfig, dict[str, Tensor]]:
    config = diffusers_folder.read_config(folder)
    parts: dict[str, Mapping[str, Tensor]] = {}
    for part in ("unet", "vae", "text_encoder"):
        tensors: dict[str, Tensor] = {}
        for file in diffusers_folder.weight_files(folder, part):
            tensors.update(read_tensors(file))
        parts[part] = tensors
    state = diffusers_keys.to_ldm(parts, config)
    return replace(config, cond_stage=complete_text_encoder(config.cond_stage, state, str(folder))), state


def _snapshot(folder: Path) -> Path:
    snapshots = [p for p in (folder / "snapshots").iterdir() if p.is_dir()]
    main = folder / "refs" / "main"
    if main.is_file():
        with main.open("rb") as file:
            chosen = folder / "snapshots" / file.read(_MAX_REF_BYTES).decode("utf-8", "replace").strip()
        if chosen in snapshots:
            return chosen
    if len(snapshots) == 1:
        return snapshots[0]
    names = ", ".join(sorted(p.name for p in snapshots)) or "none"
    raise CheckpointError(f"{folder} has {len(snapshots)} snapshots ({names}); give the path of one of them.")
