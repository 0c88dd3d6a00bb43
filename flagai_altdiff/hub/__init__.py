"""Where model files come from: the disk first, then the sources of a model in their order."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Set
from pathlib import Path, PurePosixPath

from flagai_altdiff.errors import HubError, HubUnavailableError, ModelNotFoundError, OfflineError
from flagai_altdiff.hub import baai, huggingface
from flagai_altdiff.hub.names import STAGING_PREFIX, safe_name, safe_names
from flagai_altdiff.hub.remote import Hub, Location, RemoteFile
from flagai_altdiff.hub.transfer import check_space, download
from flagai_altdiff.registry import ModelSpec

__all__ = ["HUBS", "Hub", "Location", "RemoteFile", "download", "fetch", "missing_files", "offline_switch", "safe_name"]

logger = logging.getLogger(__name__)

HUBS: dict[str, Hub] = {"baai": baai, "huggingface": huggingface}
"""Every hub by the name that ``ModelSpec.sources`` uses."""

OFFLINE_VARIABLES = ("FLAGAI_ALTDIFF_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
WEIGHT_SUFFIXES = (".ckpt", ".bin", ".safetensors", ".pt", ".pth")
EQUIVALENTS = {
    "model.ckpt": "model.safetensors",
    "pytorch_model.bin": "model.safetensors",
    "sentencepiece.bpe.model": "tokenizer.json",
}
"""File of the FlagAI layout -> the one that does as well."""
DIFFUSERS_INDEX = "model_index.json"
DIFFUSERS_WEIGHTS = ("text_encoder", "unet", "vae")
"""Parts of the diffusers layout without whose weights there is no model."""
MARKERS = (DIFFUSERS_INDEX, "config.yaml")
"""Files that say which layout a folder has; moved into place last."""


def fetch(spec: ModelSpec, folder: Path, *, config_only: bool = False) -> Path:
    """Make the files of a model present in a folder.

    A folder that has them all is left alone and nothing is asked. Otherwise the sources are tried in order; the files of
    one source arrive in ``folder/.incoming-<hub>``, where an interrupted download goes on next time, and are moved into
    place when they are complete.

    Args:
        spec: The model.
        folder: Its folder; made if needed.
        config_only: Leave the weights out.

    Returns:
        ``folder``.

    Raises:
        OfflineError: Files are missing and the offline switch is on.
        ModelNotFoundError: Every source answered that it does not have the model.
        HubUnavailableError: No source could give the files.
        HubError: The local disk failed (``errno`` is set).
    """
    missing = missing_files(spec, folder, config_only=config_only)
    if not missing:
        return folder
    if switch := offline_switch():
        raise OfflineError(
            f"{spec.name}: {', '.join(missing)} not found in {folder}, and {switch} forbids downloads. "
            f"Unset it and try again, or put the files there."
        )
    attempts: dict[str, HubError] = {}
    for hub, name in spec.sources.items():
        try:
            _fetch_from(hub, name, spec, folder, config_only)
        except HubError as error:
            if error.errno is not None:
                raise
            logger.warning("%s cannot be had from %s: %s", spec.name, hub, error)
            attempts[hub] = error
        else:
            return folder
    raise _all_failed(spec, folder, missing, attempts)


def missing_files(spec: ModelSpec, folder: Path, *, config_only: bool = False) -> list[str]:
    """Names of the files that a folder lacks to be a complete model; empty files and wrong sizes count as missing.

    Args:
        spec: The model.
        folder: FlagAI layout, or diffusers layout if it has a ``model_index.json``.
        config_only: Weights are not needed.

    Returns:
        Names relative to ``folder``; in the diffusers layout ``<part>/*.safetensors`` for a part without any weights (all
        else there is the loader's to judge).
    """
    wrong = {file.name for file in spec.files if file.size_bytes not in (None, _size(folder / file.name))}
    return _missing(spec, _present(folder) - wrong, config_only)


def offline_switch() -> str | None:
    """The environment variable that forbids downloads now, as ``NAME=value``; ``None`` if they are allowed."""
    for name in OFFLINE_VARIABLES:
        value = os.environ.get(name, "")
        if value.upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name}={value}"
    return None


def _fetch_from(hub: str, name: str, spec: ModelSpec, folder: Path, config_only: bool) -> None:
    listed = HUBS[hub].list_files(name)
    safe_names(file.name for file in listed)
    wanted = sorted((file for file in listed if _wanted(spec, file, config_only)), key=lambda file: _is_weight(file.name))
    available = _present(folder) | {file.name for file in wanted}
    if lacking := _missing(spec, available, config_only):
        raise ModelNotFoundError(f"{hub} lists {name}, but without {', '.join(lacking)}.")
    staging = folder / f"{STAGING_PREFIX}{hub}"
    if staging.is_symlink():
        raise HubError(f"{staging} is a symbolic link; refused. Remove it.")
    to_come = sum(file.size_bytes or 0 for file in wanted if _size(folder / file.name) != file.size_bytes)
    check_space(folder, to_come - sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()))
    logger.info("%s: fetching %d files from %s into %s", spec.name, len(wanted), hub, folder)
    staged = []
    for file in wanted:
        try:
            if _stage(spec, file, folder, staging):
                staged.append(file.name)
        except ModelNotFoundError as error:
            available -= {file.name}
            if _missing(spec, available | _present(folder), config_only):
                raise
            logger.warning("%s: goes on without %s: %s", spec.name, file.name, error)
    _move(staged, staging, folder)
    for leftover in HUBS:
        shutil.rmtree(folder / f"{STAGING_PREFIX}{leftover}", ignore_errors=True)


def _stage(spec: ModelSpec, file: RemoteFile, folder: Path, staging: Path) -> bool:
    """Download one file into the staging folder; False if the model's folder has it already."""
    location = file.locate()
    known = next((known for known in spec.files if known.name == file.name), None)
    size = (known.size_bytes if known else None) or file.size_bytes or location.size_bytes or None
    if _present_with_size(folder / file.name, size):
        return False
    target = _inside(staging, file.name)
    if not _present_with_size(target, size):
        sha256 = (known.sha256 if known else None) or file.sha256
        download(location.url, target, size_bytes=size, sha256=sha256, headers=location.headers)
    return True


def _move(names: Iterable[str], staging: Path, folder: Path) -> None:
    for name in sorted(names, key=lambda name: name in MARKERS):
        target = _inside(folder, name)
        if target.exists():
            logger.warning("%s is replaced: its size differs from the announced one", target)
        try:
            os.replace(staging / name, target)
        except OSError as error:
            raise HubError(error.errno, f"{target}: {error.strerror}.") from error


def _inside(root: Path, name: str) -> Path:
    """``root/name`` with its folder made; HubError if a symbolic link leads that folder out of ``root``."""
    path = root / safe_name(name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not path.parent.resolve().is_relative_to(root.resolve()):
            raise HubError(f"{path.parent} leads out of {root} through a symbolic link; refused. Remove the link.")
        path.parent.mkdir(parents=True, exist_ok=True)
    except HubError:
        raise
    except OSError as error:
        raise HubError(error.errno, f"{path.parent}: {error.strerror}. Choose a folder that can be written to.") from error
    return path


def _is_weight(name: str) -> bool:
    return name.endswith(WEIGHT_SUFFIXES)


def _wanted(spec: ModelSpec, file: RemoteFile, config_only: bool) -> bool:
    """All but weights that are not asked for: with ``config_only`` any, else files beside the model's own."""
    if not _is_weight(file.name):
        return True
    return not config_only and ("/" in file.name or file.name in {known.name for known in spec.files})


def _missing(spec: ModelSpec, names: Set[str], config_only: bool) -> list[str]:
    """What a folder with files of these names lacks; the rule behind :func:`missing_files`."""
    flagai = [
        file.name
        for file in spec.files
        if not (names & {file.name, EQUIVALENTS.get(file.name)} or (config_only and _is_weight(file.name)))
    ]
    if not flagai or DIFFUSERS_INDEX not in names:
        return flagai
    having = {str(PurePosixPath(name).parent) for name in names if _is_weight(name)}
    return [f"{part}/*.safetensors" for part in DIFFUSERS_WEIGHTS if not (config_only or part in having)]


def _present(folder: Path) -> set[str]:
    """Names of the files in a folder and in its subfolders, one level deep, that are not empty."""
    places = [folder, *(place for place in _entries(folder) if place.is_dir() and not place.name.startswith("."))]
    return {path.relative_to(folder).as_posix() for place in places for path in _entries(place) if _size(path)}


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _present_with_size(path: Path, size: int | None) -> bool:
    return _size(path) is not None and size in (None, _size(path))


def _all_failed(spec: ModelSpec, folder: Path, missing: list[str], attempts: dict[str, HubError]) -> HubError:
    if not attempts:
        return ModelNotFoundError(f"{spec.name}: {', '.join(missing)} not found in {folder}, and no hub has this model.")
    lines = [f"{spec.name} could not be downloaded."]
    lines += [f"  {hub} ({spec.sources[hub]}): {error}" for hub, error in attempts.items()]
    lines += [
        f"Missing: {', '.join(missing)}. Next steps:",
        "  - try again: what has arrived is kept;",
        f"  - set {baai.ENDPOINT_VARIABLE} or HF_ENDPOINT to a mirror that you can reach;",
        f"  - or get the files another way and put them into {folder.absolute()}, in the FlagAI or the diffusers layout.",
    ]
    text = "\n".join(lines)
    if all(isinstance(error, ModelNotFoundError) for error in attempts.values()):
        return ModelNotFoundError(text)
    return HubUnavailableError(text)
