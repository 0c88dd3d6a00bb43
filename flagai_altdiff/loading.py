"""load_model: a path or a registered name -> a model that is ready to draw."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flagai_altdiff import checkpoint, hub
from flagai_altdiff.checkpoint import layouts
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.engine.plan import Size, choose_mode, working_dtype
from flagai_altdiff.errors import CheckpointError, DiskError, HubError, InvalidRequestError, last_net, printable
from flagai_altdiff.machine import MEMORY_MODES
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.placement import keep
from flagai_altdiff.quantizing import check_kind, leave_files, quantize_model
from flagai_altdiff.registry import (
    DEFAULT_MODEL_DIR,
    DRAWING,
    MODELS,
    SAFETY_CHECKER,
    UNREGISTERED,
    ModelSpec,
    find_model,
    locate,
)
from flagai_altdiff.safety import SafetyChecker, load_safety_checker
from flagai_altdiff.tokenizer import load_tokenizer, neighbour_tokenizers, own_tokenizer

logger = logging.getLogger(__name__)

_TABLE_STEPS = (1, 8, 64, 128)
"""A word table is as long as its vocabulary, or rounded up to one of these; some trainers do that."""


def load_model(
    name_or_path: str | Path,
    model_dir: str | Path = DEFAULT_MODEL_DIR,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    safety_checker: bool | str = "auto",
    mapped: bool = False,
    quantize: str | None = None,
    memory: str = "auto",
) -> LatentDiffusion:
    """Load a model from its files, fetching them first if a registered model lacks them.

    Args:
        name_or_path: A registered name, in any case, or the path of a folder or file in any layout.
        model_dir: Folder of the model folders.
        device: Where it draws, for example ``"cuda"``; the CPU if left out.
        dtype: ``"float16"`` or ``"bfloat16"`` to draw in half precision on a GPU (elsewhere each result has a note that
            it has no effect); the weights stay float32.
        safety_checker: ``"auto"`` uses the checker that lies with the model, ``True`` requires one, ``False`` is none.
        mapped: Leave the weights of large files mapped: quicker, and programs share the memory. But whoever overwrites
            such a file meanwhile, this program too, ends it. Without it, a model may be saved over its own files.
        quantize: ``"int8"`` or ``"int4"`` keeps the weights of UNet and text encoder in so many bits: less memory, and
            another picture; see ``quantize_model``. Unless ``memory`` is given, it is ``"normal"`` then.
        memory: How much may be taken for drawing: ``"normal"``; ``"low"`` has one part of the model at a time where it
            works, in half precision on a GPU, the decoder in strips and large files mapped; ``"lowest"`` one layer at a
            time; ``"auto"`` takes the first of these that fits into what is free.

    Returns:
        The model in evaluation mode, float32. Its ``tokenizer``, ``spec`` and ``safety_checker`` are plain attributes
        outside the state dict.

    Raises:
        UnknownModelError: Neither registered nor a path.
        InvalidRequestError: ``safety_checker``, ``device``, ``dtype``, ``quantize`` or ``memory`` is something else, or
            cannot be used here.
        CheckpointError: The files are not such a model.
        ConfigError: The config cannot be built, or contradicts the weights.
        HubError: Files are missing and could not be fetched.
    """
    _check_safety_argument(safety_checker)
    check_memory_mode(memory)
    if quantize is not None:
        check_kind(quantize)
    place, asked = find_device(device), _dtype(dtype)
    spec, path = _found(name_or_path, model_dir, safety_checker)
    how = _How(
        safety_checker=safety_checker,
        mapped=mapped or place.type != "cpu",  # another device has copies in any case
        quantize=quantize,
        memory="normal" if memory == "auto" and quantize else memory,
        place=place,
        dtype=asked,
    )
    with last_net(path):
        model = _load(path, spec, how).to(place)
    model.autocast_dtype = working_dtype(model.memory, place, asked)
    return model


def describe_model(
    name_or_path: str | Path, model_dir: str | Path = DEFAULT_MODEL_DIR, *, safety_checker: bool | str = "auto"
) -> tuple[ModelSpec, LatentDiffusionConfig]:
    """Defaults and sizes of a model, without its weights; arguments and errors as of :func:`load_model`."""
    spec, path = _found(name_or_path, model_dir, safety_checker)
    with last_net(path):
        layout = layouts.detect(path)
        layout.require()
        config, _ = layouts.read(layout)
    return spec or _unregistered(path, config), config


def _found(
    name_or_path: str | Path, model_dir: str | Path, safety_checker: bool | str
) -> tuple[ModelSpec | None, Path]:
    """Spec and place of a model, fetched if it is registered and not whole."""
    spec, path = locate(name_or_path, Path(model_dir), task=DRAWING)
    if spec and spec.sources:
        with last_net(path):
            whole = _is_whole(layouts.detect(path))
        if not whole:
            fetch_model(spec, path, safety_checker=safety_checker)
    return spec, path


def load_path(
    path: str | Path,
    spec: ModelSpec | None = None,
    *,
    safety_checker: bool | str = "auto",
    mapped: bool = False,
    memory: str = "normal",
) -> LatentDiffusion:
    """Load the model whose files lie at ``path``, on the CPU; never touches the network.

    Args:
        path: Folder or file in any layout.
        spec: Defaults of its images; derived from the config if left out.
        safety_checker: As in :func:`load_model`.
        mapped: As in :func:`load_model`.
        memory: As in :func:`load_model`.

    Raises:
        CheckpointError: The files are not such a model, or cannot be read.
        ConfigError: The config cannot be built, or contradicts the weights.
    """
    _check_safety_argument(safety_checker)
    check_memory_mode(memory)
    path = Path(path)
    with last_net(path):
        return _load(
            path, spec, _How(safety_checker=safety_checker, mapped=mapped, memory=memory, place=torch.device("cpu"))
        )


def fetch_model(
    spec: ModelSpec,
    folder: Path,
    *,
    safety_checker: bool | str = "auto",
    fetch: Callable[[ModelSpec, Path], object] = hub.fetch,
) -> None:
    """Fetch a model, and then the safety checker that it needs, unless the model brought one.

    Args:
        spec: A registered model.
        folder: Where its files go.
        safety_checker: As in :func:`load_model`.
        fetch: What is done with either; another source, for example.

    Raises:
        HubError: The model could not be fetched, or a checker that is required.
    """
    fetch(spec, folder)
    if safety_checker is False or not spec.needs_safety_checker or layouts.checker_folder(folder):
        return
    try:
        fetch(SAFETY_CHECKER, folder.parent / SAFETY_CHECKER.name)
    except HubError as error:
        if safety_checker is True or isinstance(error, DiskError):
            raise
        logger.warning("the safety checker could not be fetched; images would not be checked: %s", error)


@dataclass(frozen=True, kw_only=True)
class _How:
    """What :func:`load_model` is asked for, beside the files."""

    safety_checker: bool | str
    mapped: bool
    memory: str
    place: torch.device
    quantize: str | None = None
    dtype: torch.dtype | None = None


def _load(path: Path, spec: ModelSpec | None, how: _How) -> LatentDiffusion:
    layout = layouts.detect(path)
    layout.require()
    # A broken tokenizer is found before the big files are opened.
    tokenizer = load_tokenizer(layout.tokenizer) if layout.tokenizer else None
    config, state = layouts.read(layout)  # nothing of a mapped file is read yet
    check_variant(spec or find_model(path.name), config, path)
    vocab_size = config.cond_stage.vocab_size
    if tokenizer is None:
        tokenizer = load_tokenizer(find_tokenizer(layout.folder, vocab_size))
    if vocab_size not in (-(-len(tokenizer) // step) * step for step in _TABLE_STEPS):
        raise CheckpointError(
            f"{tokenizer.path} has {len(tokenizer)} tokens, but the text encoder knows {vocab_size}. "
            "They belong to different models; put the tokenizer of this model beside its weights."
        )
    with torch.device("meta"):
        model = build_model(config)
    model.spec = spec or _unregistered(path, config)
    size = Size(height=model.spec.height, width=model.spec.width)
    mode = choose_mode(config, size, how.place, how.dtype, model) if how.memory == "auto" else how.memory
    if mode not in ("normal", how.memory):
        logger.warning("little memory is free on %s: drawing with memory=%r, which is slower", how.place, mode)
    mapped = how.mapped or mode != "normal"
    checkpoint.assign(model, state, str(path), mapped=mapped or how.quantize is not None)
    model.text_tokenizer = tokenizer
    model.safety_checker = _safety_checker(layout, model.spec, how.safety_checker, mapped, spares=mode != "normal")
    if how.quantize is not None:
        quantize_model(model, how.quantize)
        if not mapped:
            leave_files(model)
    if mode != "normal":
        keep(model, mode)
    logger.info("loaded %s (%s), memory=%s", printable(str(path)), layout.name, mode)
    return model.eval()


def check_variant(spec: ModelSpec | None, config: LatentDiffusionConfig, path: Path) -> None:
    """Refuse weights of m9's kind under m18's name, and the reverse.

    Args:
        spec: The model that the name promises; ``None`` if it promises none.
        config: What the weights are. AltDiffusion and AltDiffusion-m9 have one structure; only their hashes differ.
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


def check_memory_mode(value: object) -> None:
    """InvalidRequestError unless it is one of ``machine.MEMORY_MODES``."""
    if value not in MEMORY_MODES:
        raise InvalidRequestError("memory", value, f"expected {', '.join(map(repr, MEMORY_MODES))}")


def find_device(value: str | torch.device | None) -> torch.device:
    """A device that works here; InvalidRequestError if it does not."""
    try:
        device = torch.device("cpu" if value is None else value)
        torch.empty(1, device=device)
    except Exception as error:  # of as many kinds as there are devices
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidRequestError("device", value, f"cannot be used here ({reason}); 'cpu' always works") from error
    if device.type == "meta":
        raise InvalidRequestError("device", value, "expected a device that computes, for example 'cpu' or 'cuda'")
    return device


def _dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """The precision to draw in; ``None`` where none is asked for."""
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype is None and value is None:
        return None
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InvalidRequestError("dtype", value, "expected 'float32', 'float16' or 'bfloat16'")
    return dtype


def _unregistered(path: Path, config: LatentDiffusionConfig) -> ModelSpec:
    side = config.image_size * config.first_stage.downsampling
    return replace(UNREGISTERED, name=path.name, height=side, width=side)


def _is_whole(layout: layouts.Layout) -> bool:
    """Whether what was found can draw without a download."""
    if layout.missing or layout.tokenizer:
        return not layout.missing
    try:
        find_tokenizer(layout.folder, layouts.read(layout)[0].cond_stage.vocab_size)
    except CheckpointError:
        return False
    return True


def _safety_checker(
    layout: layouts.Layout, spec: ModelSpec, wanted: bool | str, mapped: bool, spares: bool
) -> SafetyChecker | None:
    if wanted is False:
        if spec.needs_safety_checker:
            logger.info("safety checker off, as asked")
        return None
    folder = layout.safety_checker
    if folder is not None:
        return load_safety_checker(folder, mapped=mapped, spares=spares)
    if wanted is True:
        raise CheckpointError(
            f"safety_checker=True, but {layout.folder} has no safety_checker/ and no SafetyChecker/ lies beside it. "
            "Download the model again, or pass safety_checker='auto' or False."
        )
    if spec.needs_safety_checker:
        logger.warning(
            "%s has no safety checker beside it: images are NOT checked. "
            "Put FlagAI's SafetyChecker folder beside the model's, or pass safety_checker=False to silence this.",
            printable(str(layout.folder)),
        )
    return None
