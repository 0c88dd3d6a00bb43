"""A model from any layout on disk to another."""

from __future__ import annotations

import functools
from pathlib import Path

from flagai_altdiff.checkpoint import diffusers_folder, diffusers_keys, layouts, saving
from flagai_altdiff.checkpoint.health import check_weights
from flagai_altdiff.errors import CheckpointError, FlagAIAltDiffError, last_net, shown
from flagai_altdiff.loading import check_variant, load_path
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, find_model, locate
from flagai_altdiff.tokenizer import load_tokenizer, own_tokenizer

TARGET_LAYOUTS = ("flagai", "diffusers", "single")
"""Layouts that can be written."""


def convert(source: str | Path, target: str | Path, layout: str, *, half: bool = False) -> None:
    """Write a model in another layout; it appears whole or not at all, and only if it can be loaded again.

    Args:
        source: Folder or file in any layout, or the name of a model that is there.
        target: Folder to make, or ``.safetensors`` file for ``"single"``; must not exist.
        layout: One of ``TARGET_LAYOUTS``.
        half: Store the weights as float16, half the size.

    Raises:
        CheckpointError: The source cannot be read or holds NaN; the target exists, has a wrong ending, the name of
            another model, or another's config or tokenizer beside it; float16 is too small; the disk refuses.
        ConfigError: The target's format cannot express the model.
    """
    target = Path(target)
    if layout not in TARGET_LAYOUTS:
        raise CheckpointError(f"layout {shown(layout)}: expected one of {', '.join(TARGET_LAYOUTS)}.")
    saving.require_free(target)
    with last_net(source):
        path = locate(source, DEFAULT_MODEL_DIR)[1] if find_model(str(source)) else Path(source)
        model = load_path(path, safety_checker=False, mapped=True)  # nothing is written over the source
        check_variant(find_model(target.name), model.config, target)
        check_weights(model.state_dict(), str(source), thorough=True)  # all of them are read now anyway
        _write(model, target, layout, half)


def _write(model: LatentDiffusion, target: Path, layout: str, half: bool) -> None:
    state = saving.half_precision(model.state_dict()) if half else model.state_dict()
    beside = own_tokenizer(target.parent) if layout == "single" else None
    files = model.text_tokenizer.files if model.text_tokenizer and not beside else ()
    check = functools.partial(_require_same, model, target, beside)
    if layout == "diffusers":
        parts = diffusers_keys.to_diffusers(state, model.config)
        diffusers_folder.write_folder(target, model.config, parts, files, check=check)
    elif layout == "flagai":
        saving.save_folder(target, model.config, state, *files, check=check)
    else:
        saving.save_single(target, model.config, state, *files, check=check)


def _require_same(model: LatentDiffusion, target: Path, beside: Path | None, written: Path) -> None:
    """Refuse what would be another model when it is loaded: by its config, keys, shapes or tokenizer.

    Args:
        model: What was meant.
        target: Where it will be.
        beside: The tokenizer that lies there.
        written: Where it is now.
    """
    try:
        layout = layouts.detect(written)
        config, state = layouts.read(layout)
        for other in layouts.configs_of(target, has_own=True) if layout.weights == written else ():
            layouts.require_agreement(config, other, state, str(target))
        found = layout.tokenizer or beside
        tokenizer = load_tokenizer(found) if found else None
    except FlagAIAltDiffError as error:
        raise CheckpointError(f"{target} is not written, because it could not be loaded again: {error}") from error
    if model.text_tokenizer and not (tokenizer and tokenizer.same_as(model.text_tokenizer)):
        raise CheckpointError(
            f"{target} is not written, because {beside or 'what was copied'} is another tokenizer than the model's "
            "and would be taken for it. Choose another folder."
        )
    differs = [key for key, value in model.named_parameters() if key not in state or state[key].shape != value.shape]
    if differs or config != model.config:
        raise CheckpointError(
            f"{target} is not written: this layout cannot hold the model's {shown(differs) if differs else 'config'}."
        )
