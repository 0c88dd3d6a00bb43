"""Models to disk with LDM names: a FlagAI folder or a single file. They appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from flagai_altdiff.config import LatentDiffusionConfig, dump_config
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.files import grant_usual_mode


def save_folder(folder: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor], tokenizer: Path) -> None:
    """Write ``config.yaml``, ``model.safetensors`` and the tokenizer.

    Args:
        folder: The folder to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: File to copy.

    Raises:
        CheckpointError: ``folder`` exists.
    """
    _check_absent(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as staging:
        made = Path(staging) / folder.name
        made.mkdir()
        _save(made / "model.safetensors", made / "config.yaml", config, state)
        shutil.copyfile(tokenizer, made / tokenizer.name)
        os.rename(made, folder)


def save_single(file: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor], tokenizer: Path) -> None:
    """Write a ``.safetensors`` file, a yaml of the same stem beside it, and the tokenizer unless one lies there.

    Args:
        file: The file to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: File to copy.

    Raises:
        CheckpointError: ``file`` or its yaml exists, or ``file`` has another ending.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: a single file is written as .safetensors; give its name that ending.")
    yaml = file.with_suffix(".yaml")
    _check_absent(file)
    _check_absent(yaml)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".saving-") as staging:
        made = Path(staging)
        _save(made / file.name, made / yaml.name, config, state)
        if not (file.parent / tokenizer.name).exists():
            shutil.copyfile(tokenizer, made / tokenizer.name)
            os.rename(made / tokenizer.name, file.parent / tokenizer.name)
        os.rename(made / yaml.name, yaml)
        os.rename(made / file.name, file)


def half_precision(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights in float16; its buffers, the noise schedule, stay as they are, because they would be spoilt."""
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor if name in buffers else tensor.half() for name, tensor in model.state_dict().items()}


def _check_absent(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another name.")
    target.parent.mkdir(parents=True, exist_ok=True)


def _save(weights: Path, yaml: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor]) -> None:
    yaml.write_text(dump_config(config), encoding="utf-8")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, weights, metadata={"format": "pt"})
    grant_usual_mode(weights)
