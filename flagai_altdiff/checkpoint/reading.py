"""Tensors of one file. The only place that opens pickles, and it never runs what they ask for."""

from __future__ import annotations

import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError

# Globals that trainers leave in their files beside the weights. They are replaced by inert stand-ins.
_HARMLESS_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "argparse.", "omegaconf.", "pathlib.")
_HARMLESS_NAMES = frozenset(
    {"builtins.dict", "builtins.list", "builtins.set", "builtins.int", "builtins.str", "typing.Any"}
    | {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "numpy.ndarray"}
    | {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
    | {"collections.defaultdict", "collections.Counter"}
)


class _Inert:
    """Stands in for a class that a pickle names: takes anything, does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Drop the item."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a ``.safetensors``, ``.ckpt``, ``.bin`` or ``.pt`` file, memory-mapped where the format allows.

    Args:
        path: The file; its content decides how it is read, not its name.

    Returns:
        Key -> tensor on the CPU. Of a training checkpoint, its ``state_dict``.

    Raises:
        CheckpointError: Not a readable file of weights; UnsafeCheckpointError for a pickle that asks for code.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error.strerror or error}.") from error
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return _state_dict(_read_pickle(path, zipped=head[:2] == b"PK"), path)
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            f"{path} has torch's tar format of before 2017, which is not read. "
            "Convert it with an old torch: torch.save(torch.load(path), new_path)."
        )
    first = head.decode("ascii", "backslashreplace").splitlines()[0] if head else "nothing"
    raise CheckpointError(
        f"{path} is neither safetensors nor a torch checkpoint; it begins with {first!r}. "
        "A page or a git-lfs pointer saved in its place? Fetch the file again."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}). Fetch the file again.") from error


def _read_pickle(path: Path, zipped: bool) -> Any:
    stand_ins = _stand_ins(path) if zipped else []
    try:
        with torch.serialization.safe_globals(stand_ins), path.open("rb") as file:
            # By its path, torch.load would judge a file by its name; only that way can it map the file, though.
            mapped = zipped and path.suffix != ".safetensors"
            return torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        said = [line for line in str(error).splitlines() if line]
        reason = said[min(1, len(said) - 1)].rpartition("WeightsUnpickler error: ")[2]  # the first line advises to trust it
        raise UnsafeCheckpointError(
            f"{path} is refused: {reason} Nothing in it was run. "
            "Only tensors and plain containers are read; get the weights as safetensors."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is not a whole torch checkpoint ({reason}). Fetch the file again.") from error


def _stand_ins(path: Path) -> list[Any]:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, KeyError, IndexError, OSError):
        return []  # torch.load says better what is wrong
    harmful = [n for n in names if not (n in _HARMLESS_NAMES or n.startswith(_HARMLESS_MODULES))]
    if harmful:
        raise UnsafeCheckpointError(
            f"{path} is refused: it is a pickle that asks for {', '.join(sorted(harmful))}. Nothing in it was run. "
            "Only tensors and plain containers are read; get the weights as safetensors."
        )
    return [(_plain_dict if name == "collections.defaultdict" else type(name, (_Inert,), {}), name) for name in names]


def _plain_dict(*args: object) -> dict[object, object]:
    return {}


def _state_dict(data: Any, path: Path) -> dict[str, Tensor]:
    state = data.get("state_dict", data) if isinstance(data, Mapping) else data
    if not isinstance(state, Mapping) or not any(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no state dict; expected a dict of tensors, maybe under 'state_dict'.")
    return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}
