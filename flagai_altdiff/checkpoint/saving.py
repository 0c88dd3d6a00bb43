"""Models to disk with LDM names: a FlagAI folder or a single file. They appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, FlagAIAltDiffError, printable
from flagai_altdiff.files import new_file, new_files, new_folder
from flagai_altdiff.model_files import FLAGAI_CONFIG, FLAGAI_WEIGHTS

Check = Callable[[Path], None]
"""Looks at what was written before it has its name, and raises what is wrong with it."""


def save_folder(
    folder: Path,
    config: LatentDiffusionConfig,
    state: Mapping[str, Tensor],
    *tokenizer: Path,
    check: Check | None = None,
) -> None:
    """Write ``config.yaml``, ``model.safetensors`` and the tokenizer.

    Args:
        folder: The folder to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: Files to copy.
        check: Is given the finished folder.

    Raises:
        CheckpointError: ``folder`` exists, or the disk refuses.
    """
    with unfinished_model(folder, state) as made:
        (made / FLAGAI_CONFIG).write_text(dump_config(config), encoding="utf-8")
        write_safetensors(made / FLAGAI_WEIGHTS[0], state)
        copy_files(tokenizer, made)
        if check:
            check(made)


def save_single(
    file: Path, config: LatentDiffusionConfig, state: Mapping[str, Tensor], *tokenizer: Path, check: Check | None = None
) -> None:
    """Write a ``.safetensors`` file, a yaml of the same stem, and the tokenizer; all of them, or none.

    Args:
        file: The file to make.
        config: The model's config.
        state: LDM key -> tensor.
        tokenizer: Files to copy. Those that lie there already with the same content stay.
        check: Is given the finished file, which has the others beside it.

    Raises:
        CheckpointError: ``file`` exists, a file beside it exists and has another content, ``file`` has another ending,
            or the disk refuses.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file}: a single file is written as .safetensors; give its name that ending.")
    with unfinished_model(file, state, single=True) as made:
        made.joinpath(file.name).with_suffix(".yaml").write_text(dump_config(config), encoding="utf-8")
        write_safetensors(made / file.name, state)
        copy_files(tokenizer, made)
        if check:
            check(made / file.name)


@contextmanager
def unfinished_model(target: Path, state: Mapping[str, Tensor], *, single: bool = False) -> Iterator[Path]:
    """A hidden folder to be filled with a model: if the block ends well, it becomes ``target``.

    Args:
        target: What must not exist yet.
        state: What will be written, to see whether there is space for it.
        single: ``target`` is a file: it and all others in the folder move beside each other.

    Raises:
        CheckpointError: ``target`` exists, be it since a moment ago; or the disk refuses. Nothing of it is left.
    """
    require_free(target)
    try:
        with (new_files if single else new_folder)(target) as made:
            _require_space(made, sum(tensor.nbytes for tensor in state.values()))
            yield made
    except FlagAIAltDiffError:
        raise
    except FileExistsError as error:
        raise taken(Path(error.filename or target)) from error
    except OSError as error:
        raise _refused(
            target, f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        ) from error
    except SafetensorError as error:  # the library's own kind, also for a full disk
        raise _refused(target, printable(str(error), 200)) from error


def require_free(target: Path) -> None:
    """Refuse, before any work, a target that exists or cannot.

    Raises:
        CheckpointError: Something lies there, be it a link that leads nowhere; or no file can have this name.
    """
    try:
        os.lstat(target)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # a part of it is a file, the name is too long, or no text
        raise _refused(target, getattr(error, "strerror", None) or str(error)) from error
    raise taken(target)


def half_precision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights in float16; the noise schedule stays as it is, because it would be spoilt.

    Raises:
        CheckpointError: float16 cannot hold a weight; the message names it.
    """
    return {
        key: _half(key, value) if "." in key and value.is_floating_point() else value for key, value in state.items()
    }


def write_safetensors(file: Path, state: Mapping[str, Tensor]) -> None:
    """Make a file of weights; tensors that share memory are written once each."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    end = 0
    for key in sorted(tensors, key=lambda key: tensors[key].data_ptr()):
        if tensors[key].data_ptr() < end:
            tensors[key] = tensors[key].clone()  # the library refuses what overlaps
        else:
            end = tensors[key].data_ptr() + tensors[key].nbytes
    with new_file(file) as unfinished:
        save_file(tensors, unfinished, metadata={"format": "pt"})


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def taken(target: Path) -> CheckpointError:
    """What to raise where the target of a conversion exists."""
    return CheckpointError(f"{target} exists already; remove it or choose another name.")


def _refused(target: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{printable(str(target), 400)} cannot be written: {reason}. Nothing of it is left there.")


def _require_space(folder: Path, need: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < need:
        raise _refused(folder.parent, f"it takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")


def _half(key: str, value: Tensor) -> Tensor:
    half = value.half()
    largest = max(map(abs, map(float, value.aminmax()))) if value.numel() else 0.0
    if largest and (not half.isfinite().all() or not half.any()):
        raise CheckpointError(
            f"{printable(key, 120)} has numbers up to {largest:.3g}, and float16 only those from 6e-08 to 65,504: "
            "every image would be spoilt. Convert the model without half precision (--half)."
        )
    return half
