"""Models to disk with LDM names: a FlagAI folder or a single file. They appear whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.files import new_file, new_folder
from flagai_altdiff.model_files import FLAGAI_CONFIG, FLAGAI_WEIGHTS


def save_folder(folder: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor], *tokenizer: Path) -> None:
    """Write ``config.yaml``, ``model.safetensors`` and the tokenizer.

    Args:
        folder: The folder to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: Files to copy.

    Raises:
        CheckpointError: ``folder`` exists.
    """
    try:
        with new_folder(folder) as made:
            (made / FLAGAI_CONFIG).write_text(dump_config(config), encoding="utf-8")
            with new_file(made / FLAGAI_WEIGHTS[0]) as weights:
                write_safetensors(weights, state)
            for file in tokenizer:
                shutil.copyfile(file, made / file.name)
    except FileExistsError as error:
        raise taken(folder) from error


def save_single(file: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor], *tokenizer: Path) -> None:
    """Write a ``.safetensors`` file, a yaml of the same stem, and the tokenizer's files that do not lie there.

    Args:
        file: The file to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: Files to copy.

    Raises:
        CheckpointError: ``file`` or its yaml exists, or ``file`` has another ending.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: a single file is written as .safetensors; give its name that ending.")
    yaml = file.with_suffix(".yaml")
    for target in (file, yaml):
        if target.exists():
            raise taken(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with new_file(file) as weights, new_file(yaml) as text:  # the weights get their name last
            write_safetensors(weights, state)
            text.write_text(dump_config(config), encoding="utf-8")
            for source in (path for path in tokenizer if not (file.parent / path.name).exists()):
                with new_file(file.parent / source.name) as copy:
                    shutil.copyfile(source, copy)
    except FileExistsError as error:
        raise CheckpointError(f"{error}. Another program writes there; choose another name.") from error


def half_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights in float16; the noise schedule stays as it is, because it would be spoilt."""
    return {key: value.half() if "." in key and value.is_floating_point() else value for key, value in state.items()}


def write_safetensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Fill a file with weights."""
    save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, file, metadata={"format": "pt"})


def taken(target: Path) -> CheckpointError:
    """What to raise where the target of a conversion exists."""
    return CheckpointError(f"{target} exists already; remove it or choose another name.")
