"""load_model: a path or a registered name -> a model that is ready to draw."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from flagai_altdiff import checkpoint, hub
from flagai_altdiff.checkpoint import layouts
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, HubError, InvalidRequestError
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.registry import DEFAULT_MODEL_DIR, MODELS, SAFETY_CHECKER, UNREGISTERED, ModelSpec, find_model, locate
from flagai_altdiff.safety import SafetyChecker, load_safety_checker
from flagai_altdiff.sampling.schedule import make_betas, schedule_buffers
from flagai_altdiff.tokenizer import load_tokenizer, neighbour_tokenizers, own_tokenizer

logger = logging.getLogger(__name__)

_TABLE_STEPS = (1, 8, 64, 128)
"""A word table is as long as its vocabulary, or rounded up to one of these; some trainers do that."""


def load_model(
    name_or_path: str | Path,
    model_dir: str | Path = DEFAULT_MODEL_DIR,
    *,
    safety_checker: bool | str = "auto",
) -> LatentDiffusion:
    """Load a model from its files, fetching them first if a registered model lacks them.

    Args:
        name_or_path: A registered name, in any case, or the path of a folder or file in any layout.
        model_dir: Folder of the model folders.
        safety_checker: ``"auto"`` uses the checker that lies with the model; ``True`` requires it; ``False`` does without.

    Returns:
        The model in evaluation mode, on the CPU, float32. Its ``tokenizer``, ``spec`` and ``safety_checker`` are plain
        attributes outside the state dict.

    Raises:
        UnknownModelError: Neither registered nor a path.
        InvalidRequestError: ``safety_checker`` is something else.
        CheckpointError: The files are not such a model.
        ConfigError: The config cannot be built, or contradicts the weights.
        HubError: Files are missing and could not be fetched.
    """
    _check_safety_argument(safety_checker)
    spec, path = locate(name_or_path, Path(model_dir))
    if spec and spec.sources and not _complete(spec, path):
        hub.fetch(spec, path)
        if safety_checker is not False and layouts.detect(path).safety_checker is None:
            _fetch_safety_checker(path.parent, required=safety_checker is True)
    return load_path(path, spec, safety_checker=safety_checker)


def load_path(path: Path, spec: ModelSpec | None = None, *, safety_checker: bool | str = "auto") -> LatentDiffusion:
    """Load the model whose files lie at ``path``; never touches the network.

    Args:
        path: Folder or file in any layout.
        spec: Defaults of its pictures; derived from the config if left out.
        safety_checker: As in :func:`load_model`.
    """
    _check_safety_argument(safety_checker)
    try:
        return _load(path, spec, safety_checker)
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def _load(path: Path, spec: ModelSpec | None, safety_checker: bool | str) -> LatentDiffusion:
    layout = layouts.detect(path)
    own = own_tokenizer(layout.folder)
    tokenizer = load_tokenizer(own) if own else None  # a broken one is found before the big files are opened
    config, state = layouts.read(layout)  # maps the weights; nothing of them is read yet
    check_variant(spec or find_model(path.name), config, path)
    vocab_size = config.cond_stage.vocab_size
    if tokenizer is None:
        tokenizer = load_tokenizer(find_tokenizer(layout.folder, vocab_size))
    if vocab_size not in (-(-len(tokenizer) // step) * step for step in _TABLE_STEPS):
        raise CheckpointError(
            f"{own} has {len(tokenizer)} tokens, but the text encoder knows {vocab_size}. "
            "They belong to different models; put the tokenizer of this model beside its weights."
        )
    if layout.weights is None:  # diffusers keeps the schedule as numbers in a config
        betas = make_betas(config.beta_schedule, config.timesteps, config.linear_start, config.linear_end, config.cosine_s)
        state = {**schedule_buffers(betas), **state}
    with torch.device("meta"):
        model = build_model(config)
    checkpoint.assign(model, state, str(path))
    model.tokenizer = tokenizer
    model.spec = spec or _unregistered(path, config)
    model.safety_checker = _safety_checker(layout, model.spec, safety_checker)
    logger.info("loaded %s (%s)", path, layout.name)
    return model.to("cpu").eval()  # Lightning remembers the device it was built on


def check_variant(spec: ModelSpec | None, config: LatentDiffusionConfig, path: Path) -> None:
    """Refuse weights of m9's kind under m18's name, and the reverse.

    Args:
        spec: The model that the name promises; ``None`` if it promises none.
        config: What the weights are. AltDiffusion and AltDiffusion-m9 have the same structure; only their hashes differ.
        path: The files, for errors.

    Raises:
        CheckpointError: They differ.
    """
    has_pre = config.cond_stage.has_pre_transformation
    if spec is None or spec.has_pre_transformation in (None, has_pre):
        return
    found = " or ".join(name for name, other in MODELS.items() if other.has_pre_transformation is has_pre)
    raise CheckpointError(
        f"{path} is called {spec.name}, but holds {found} "
        f"({'with' if has_pre else 'without'} transformation_pre in the text encoder). "
        f"Rename it, or remove it to have {spec.name} fetched again."
    )


def find_tokenizer(folder: Path, vocab_size: int) -> Path:
    """The tokenizer file of a model: its own, or a neighbour's of exactly its vocabulary.

    Args:
        folder: The model's folder.
        vocab_size: Tokens that the text encoder knows.

    Raises:
        CheckpointError: There is none.
    """
    own = own_tokenizer(folder)
    if own is not None:
        return own
    for path in neighbour_tokenizers(folder):
        with suppress(CheckpointError):  # a broken neighbour is no concern of ours
            if len(load_tokenizer(path)) == vocab_size:
                return path
    raise CheckpointError(
        f"{folder} has no tokenizer. Put the model's sentencepiece.bpe.model (or tokenizer.json) beside the weights."
    )


def _check_safety_argument(value: object) -> None:
    if value is not True and value is not False and value != "auto":
        raise InvalidRequestError("safety_checker", value, "expected True, False or 'auto'")


def _unregistered(path: Path, config: LatentDiffusionConfig) -> ModelSpec:
    side = config.image_size * config.first_stage.downsampling
    return replace(UNREGISTERED, name=path.name, height=side, width=side)


def _complete(spec: ModelSpec, path: Path) -> bool:
    """Whether the files at ``path`` can draw without a download."""
    try:
        layout = layouts.detect(path)
        if layout.weights is None and hub.missing_files(spec, path):
            return False
        if own_tokenizer(layout.folder) is None:
            find_tokenizer(layout.folder, layouts.read(layout)[0].cond_stage.vocab_size)
    except CheckpointError:
        return False
    return True


def _fetch_safety_checker(model_dir: Path, required: bool) -> None:
    try:
        hub.fetch(SAFETY_CHECKER, model_dir / SAFETY_CHECKER.name)
    except HubError as error:
        if required:
            raise
        logger.warning("the safety checker could not be fetched: %s", error)


def _safety_checker(layout: layouts.Layout, spec: ModelSpec, wanted: bool | str) -> SafetyChecker | None:
    if wanted is False:
        if spec.needs_safety_checker:
            logger.info("safety checker off, as asked")
        return None
    folder = layout.safety_checker
    if folder is not None:
        return load_safety_checker(folder)
    if wanted is True:
        raise CheckpointError(
            f"safety_checker=True, but {layout.folder} has no safety_checker/ and no SafetyChecker/ lies beside it. "
            "Download the model again, or pass safety_checker='auto' or False."
        )
    if spec.needs_safety_checker:
        logger.warning(
            "%s has no safety checker beside it: pictures are NOT checked. "
            "Put FlagAI's SafetyChecker folder beside the model's, or pass safety_checker=False to silence this.",
            layout.folder,
        )
    return None
