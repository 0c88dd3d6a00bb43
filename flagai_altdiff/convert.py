"""A model from any layout on disk to another."""

from __future__ import annotations

from pathlib import Path

from flagai_altdiff.checkpoint import diffusers_folder, diffusers_keys, saving
from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import load_path
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, find_model, locate

TARGET_LAYOUTS = ("flagai", "diffusers", "single")
"""Layouts that can be written."""


def convert(source: str | Path, target: str | Path, layout: str, *, half: bool = False) -> None:
    """Write a model in another layout; it appears whole or not at all.

    Args:
        source: Folder or file in any layout, or the name of a model that is there.
        target: Folder to make, or ``.safetensors`` file for ``"single"``; must not exist.
        layout: One of ``TARGET_LAYOUTS``.
        half: Store the weights as float16, half the size.

    Raises:
        CheckpointError: The source cannot be read or holds NaN, the target exists, or has a wrong ending.
        ConfigError: The target's format cannot express the model.
    """
    target = Path(target)
    if layout not in TARGET_LAYOUTS:
        raise CheckpointError(f"layout {layout!r}: expected one of {', '.join(TARGET_LAYOUTS)}.")
    if target.exists():
        raise saving.taken(target)
    path = locate(source, DEFAULT_MODEL_DIR)[1] if find_model(str(source)) else Path(source)
    model = load_path(path, safety_checker=False, mapped=True)  # nothing is written over the source
    state = model.state_dict()
    check_weights(state, str(source), thorough=True)  # all of them are read now anyway
    if half:
        state = saving.half_precision(state)
    tokenizer = model.text_tokenizer.files if model.text_tokenizer else ()
    if layout == "diffusers":
        parts = diffusers_keys.to_diffusers(state, model.config)
        diffusers_folder.write_folder(target, model.config, parts, tokenizer)
    elif layout == "flagai":
        saving.save_folder(target, model.config, state, *tokenizer)
    else:
        saving.save_single(target, model.config, state, *tokenizer)
