"""What lies at a path, told by content: a FlagAI or diffusers folder, a Hugging Face cache entry or a single file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from flagai_altdiff.checkpoint import diffusers_folder, diffusers_keys
from flagai_altdiff.checkpoint.ldm_yaml import load_config
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.checkpoint.structure import (
    check_counts,
    complete_config,
    counts,
    fill_unread,
    infer_config,
    refuse_other_models,
)
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, ConfigError, printable
from flagai_altdiff.model_files import (
    CHECKER_FOLDERS,
    DIFFUSERS_INDEX,
    FLAGAI_CONFIG,
    FLAGAI_WEIGHTS,
    WEIGHED_PARTS,
    is_hidden,
    is_weight,
)
from flagai_altdiff.tokenizer import own_tokenizer

logger = logging.getLogger(__name__)

_MAX_REF_BYTES = 200


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one look at a path has found.

    Args:
        name: Which layout this is, in words.
        folder: The folder that its tokenizer and safety checker are searched in.
        weights: The one file of weights; ``None`` for a diffusers folder.
        config: Its config.yaml; ``None`` for a diffusers folder and for a lone file.
        other_configs: What else describes these weights, and must agree.
        tokenizer: The model's own tokenizer file.
        safety_checker: Folder of the safety checker that lies with the model.
        missing: What is missing for a model, in words; empty if there is one, with or without tokenizer and checker.
    """

    name: str
    folder: Path
    weights: Path | None = None
    config: Path | None = None
    other_configs: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    safety_checker: Path | None = None
    missing: str = ""

    def require(self) -> None:
        """Raise CheckpointError, with what was found and what was expected, where no whole model lies."""
        if self.missing:
            raise CheckpointError(self.missing)


def detect(path: Path) -> Layout:
    """Find out, in one look, what lies at ``path`` and what it lacks.

    Raises:
        CheckpointError: Several files may be the weights, and nothing tells which; the message lists them.
    """
    if path.is_file():
        return _layout("single file", path.parent, weights=path, configs=configs_of(path))
    if not path.is_dir():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        return Layout(name="nothing", folder=path, missing=f"{path} {what}.")
    bare = [part for part in WEIGHED_PARTS if not _weights_in(path / part)]
    is_diffusers = diffusers_folder.is_diffusers_folder(path)
    if is_diffusers and not bare:
        return _layout("diffusers folder", path)
    config = path / FLAGAI_CONFIG
    weights = _choose(path)
    if weights and config.is_file():
        others = [other for other in configs_of(weights) if other != config]
        return _layout("FlagAI folder", path, weights=weights, configs=[config, *others])
    if is_diffusers:
        lacking = ", ".join(f"{part}/*.safetensors" for part in bare)
        return _layout("diffusers folder", path, missing=f"{path} lacks {lacking}. Was the download complete?")
    if (path / "snapshots").is_dir() and path.parent.name != "snapshots":
        return detect(_snapshot(path))
    return detect(weights) if weights else Layout(name="nothing", folder=path, missing=_nothing_known(path))


def configs_of(weights: Path, *, has_own: bool = False) -> list[Path]:
    """The configs that describe a file of weights, the one to take first: of its name, and of its folder's model.

    Args:
        weights: The file.
        has_own: Whether one of its name counts as there in any case.
    """
    found = [path for suffix in (".yaml", ".yml") if (path := weights.with_suffix(suffix)).is_file()]
    folders = weights.with_name(FLAGAI_CONFIG)
    if (not (found or has_own) or weights.name in FLAGAI_WEIGHTS) and folders not in found and folders.is_file():
        found.append(folders)
    return found


def checker_folder(folder: Path) -> Path | None:
    """Folder of the safety checker that lies in a model's folder or beside it."""
    for name in CHECKER_FOLDERS:
        with suppress(OSError, RuntimeError):  # a loop of links is either, by the version of Python
            place = (folder / name).resolve()
            if (place / "config.json").is_file():
                return place
    return None


def _layout(
    name: str, folder: Path, *, weights: Path | None = None, configs: Sequence[Path] = (), missing: str = ""
) -> Layout:
    return Layout(
        name=name,
        folder=folder,
        weights=weights,
        config=next(iter(configs), None),
        other_configs=tuple(configs[1:]),
        tokenizer=own_tokenizer(folder),
        safety_checker=checker_folder(folder),
        missing=missing,
    )


def _weights_in(folder: Path) -> list[Path]:
    """Files of weights in a folder; an empty one holds none."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if is_weight(p.name) and p.is_file() and p.stat().st_size)


def _choose(folder: Path) -> Path | None:
    """The file of weights in a folder: the first of the known names, or the only one there is."""
    weights = _weights_in(folder)
    known = [path for name in FLAGAI_WEIGHTS for path in weights if path.name == name]
    if len(weights) > 1 and not known:
        names = ", ".join(path.name for path in weights)
        raise CheckpointError(
            f"{folder} has {len(weights)} files of weights ({names}), and nothing tells which is the model. "
            f"Give the path of one of them, for example {weights[0]}, or rename that to {FLAGAI_WEIGHTS[0]}."
        )
    if len(known) > 1:
        newer = [path for path in known[1:] if path.stat().st_mtime > known[0].stat().st_mtime]
        logger.log(
            logging.WARNING if newer else logging.INFO,
            "%s has %s: taking %s%s. Give the path of another to load that.",
            printable(str(folder)),
            " and ".join(path.name for path in known),
            known[0].name,
            f", although {newer[0].name} is newer" if newer else "",
        )
    return next(iter(known or weights), None)


def _nothing_known(folder: Path) -> str:
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
    return (
        f"{folder} holds no model that is known here. Expected {FLAGAI_CONFIG} with model.ckpt or model.safetensors "
        f"(FlagAI), {DIFFUSERS_INDEX} with unet/, vae/, text_encoder/ and tokenizer/ (diffusers), snapshots/ (Hugging "
        f"Face cache) or one file of weights. Found: {found}."
    )


def read(layout: Layout) -> tuple[LatentDiffusionConfig, dict[str, Tensor]]:
    """Config and weights of a model.

    Args:
        layout: From :func:`detect`.

    Returns:
        The config, complete; and LDM key -> tensor, as the files have them.

    Raises:
        CheckpointError: No whole model, unreadable, or of another kind.
        ConfigError: The config cannot be built, or contradicts the weights.
    """
    layout.require()
    where = printable(str(layout.weights or layout.folder))
    if layout.weights is None:
        config, state = _read_diffusers(layout.folder)
    else:
        state = read_tensors(layout.weights)
        refuse_other_models(state, where)
        config = load_config(layout.config) if layout.config else infer_config(state, where)
        check_counts(config, counts(state), where)
    config = _completed(config, state, where)
    for other in layout.other_configs:
        require_agreement(config, other, state, where)
    return config, fill_unread(config.cond_stage, state)


def require_agreement(config: LatentDiffusionConfig, other: Path, state: Mapping[str, Tensor], where: str) -> None:
    """Refuse two answers to the question what a file of weights is.

    Args:
        config: The first answer, complete.
        other: The file with the second; one that is no config of these weights says nothing.
        state: LDM key -> tensor.
        where: The file of weights, for errors.

    Raises:
        ConfigError: They differ.
    """
    try:
        its = _completed(load_config(other), state, where)
    except ConfigError:
        return
    if its != config:
        raise ConfigError(
            f"{where} has two configs that describe different models, one of them {other}, and nothing tells which is "
            "right. Remove or rename the one that is not its own."
        )


def _completed(config: LatentDiffusionConfig, state: Mapping[str, Tensor], where: str) -> LatentDiffusionConfig:
    return replace(complete_config(config, state, where), use_ema=False)


def _read_diffusers(folder: Path) -> tuple[LatentDiffusionConfig, dict[str, Tensor]]:
    config = diffusers_folder.read_config(folder)
    parts = {part: diffusers_folder.read_weights(folder, part) for part in diffusers_keys.PREFIXES}
    found = {prefix: len(parts[part]) for part, prefix in diffusers_keys.PREFIXES.items()}
    check_counts(config, found, str(folder))
    return config, diffusers_keys.to_ldm(parts, config)


def _snapshot(folder: Path) -> Path:
    snapshots = [p for p in (folder / "snapshots").iterdir() if p.is_dir() and not is_hidden(p.name)]
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
