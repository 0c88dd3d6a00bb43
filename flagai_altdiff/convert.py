"""A model from any layout on disk to another."""

from __future__ import annotations

from pathlib import Path

from flagai_altdiff.checkpoint import diffusers_folder, diffusers_keys, layouts, saving
from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import find_tokenizer, load_path

TARGET_LAYOUTS = ("flagai", "diffusers", "single")
"""Layouts that can be written."""


def convert(source: Path, target: Path, layout: str, *, half: bool = False) -> None:
    """Write a model in another layout; it appears whole or not at all.

    Args:
        source: Folder or file in any layout.
        target: Folder to make, or ``.safetensors`` file for ``"single"``; must not exist.
        layout: One of ``TARGET_LAYOUTS``.
        half: Store the weights as float16, half the size.

    Raises:
        CheckpointError: The source cannot be read or holds NaN, the target exists, or has a wrong ending.
        ConfigError: The target's format cannot express the model.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists already; remove it or choose another name.")
    model = load_path(source, safety_checker=False)
    tokenizer = find_tokenizer(layouts.detect(source).folder, model.config.cond_stage.vocab_size)
    state = model.state_dict()
    check_weights(state, str(source), thorough=True)  # all of them are read now anyway
    if half:
        state = saving.half_precision(model)
    if layout == "diffusers":
        parts = diffusers_keys.to_diffusers(state, model.config)
        diffusers_folder.write_folder(target, model.config, parts, [tokenizer])
    elif layout == "flagai":
        saving.save_folder(target, model.config, state, tokenizer)
    else:
        saving.save_single(target, model.config, state, tokenizer)
