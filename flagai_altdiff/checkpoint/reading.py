"""Tensors of one file, whatever its format. Nothing that a file asks for is ever run."""

from __future__ import annotations

import logging
import mmap
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from flagai_altdiff.checkpoint.archive import Member, members
from flagai_altdiff.checkpoint.pickled import Pickled, PickledTensor, interpret
from flagai_altdiff.checkpoint.records import Record, open_tensors
from flagai_altdiff.checkpoint.safetensors_header import read_header
from flagai_altdiff.errors import CheckpointError

logger = logging.getLogger(__name__)

_MAX_PICKLE_BYTES = 64 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "module", "model_state_dict", "model")
"""Under which key trainers file the weights; FlagAI's is the second."""
_MAX_WRAPPERS = 2
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What DataParallel, torch.compile and Lightning put before every key."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a ``.safetensors``, ``.ckpt``, ``.bin`` or ``.pt`` file; large ones are mapped into memory.

    Args:
        path: The file; its content decides how it is read, not its name.

    Returns:
        Key -> tensor on the CPU. Of a training checkpoint, its ``state_dict``.

    Raises:
        CheckpointError: Not a readable file of weights; UnsafeCheckpointError for a pickle that asks for code.
    """
    try:
        with path.open("rb") as file:
            return _read(file, str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(file: BinaryIO, where: str) -> dict[str, Tensor]:
    before = os.fstat(file.fileno())
    head = file.read(16)
    file.seek(0)
    if head[8:9] == b"{":
        records = read_header(file, before.st_size, where)
    elif head[:4] == b"PK\x03\x04":
        records = _zipped(file, where)
    elif head[:1] == b"\x80":
        records = _legacy(file, before.st_size, where)
    else:
        raise _unknown(file, head, where)
    tensors = open_tensors(file, _without_prefix(records), where)
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{where} changed while it was read. Wait until it is written, then load it again.")
    return tensors


def _without_prefix(records: dict[str, Record]) -> dict[str, Record]:
    """The keys without what a wrapper put before all of them."""
    while prefix := next((p for p in _PREFIXES if records and all(key.startswith(p) for key in records)), ""):
        records = {key.removeprefix(prefix): record for key, record in records.items()}
    return records


def _unknown(file: BinaryIO, head: bytes, where: str) -> CheckpointError:
    if head and tarfile.is_tarfile(file):
        return CheckpointError(
            f"{where} has torch's tar format of before 2017, which is not read. "
            "Convert it with an old torch: torch.save(torch.load(path), new_path)."
        )
    first = head.decode("ascii", "backslashreplace").splitlines()[0] if head.strip() else "nothing"
    return CheckpointError(
        f"{where} is neither safetensors nor a torch checkpoint; it begins with {first!r}. "
        "A page or a git-lfs pointer saved in its place? Fetch the file again."
    )


def _zipped(file: BinaryIO, where: str) -> dict[str, Record]:
    """torch's format since 2020: a zip archive of a pickle and one file for each block of numbers."""
    found = members(file, where)
    if "data.pkl" not in found:
        raise CheckpointError(
            f"{where} is a zip file, but a truncated or corrupt torch checkpoint: data.pkl is missing."
        )
    if "constants.pkl" in found:
        raise CheckpointError(f"{where} is a TorchScript program, not weights; get the weights as safetensors.")
    byteorder = found.get("byteorder")
    if byteorder and _content(file, byteorder) != b"little":
        raise CheckpointError(f"{where} was written by a big-endian machine, whose numbers are not read here.")
    if found["data.pkl"].size_bytes > _MAX_PICKLE_BYTES:
        raise CheckpointError(
            f"{where} is refused: its pickle has {found['data.pkl'].size_bytes} bytes without the weights."
        )
    pickled = interpret(_content(file, found["data.pkl"]), where)
    blocks = {name.removeprefix("data/"): member for name, member in found.items() if name.startswith("data/")}
    return _records(pickled, blocks, where)


def _legacy(file: BinaryIO, file_size: int, where: str) -> dict[str, Record]:
    """torch's format before 2020: pickles of a magic number, a version, the machine, the data and the names of the
    blocks of numbers; then the blocks, each behind its length."""
    with mmap.mmap(file.fileno(), min(file_size, _MAX_PICKLE_BYTES), access=mmap.ACCESS_READ) as start:
        if interpret(start, where).data != _LEGACY_MAGIC:
            raise CheckpointError(
                f"{where} is a pickle, but a truncated or corrupt torch checkpoint: torch's mark is missing."
            )
        version, machine, pickled, names = (interpret(start, where) for _ in range(4))
        position = start.tell()
    if (
        version.data != _LEGACY_PROTOCOL
        or not isinstance(machine.data, dict)
        or machine.data.get("little_endian") is not True
    ):
        raise CheckpointError(
            f"{where} is a truncated or corrupt torch checkpoint, or was written by a big-endian machine."
        )
    blocks: dict[str, Member] = {}
    for name in names.data if isinstance(names.data, list) else ():
        file.seek(position)
        length, storage = file.read(8), pickled.storages.get(str(name))
        size = int.from_bytes(length, "little") * (storage.dtype.itemsize if storage else 0)
        if storage is None or len(length) < 8 or position + 8 + size > file_size:
            raise CheckpointError(
                f"{where} is a truncated or corrupt torch checkpoint: it ends before its weights. Fetch the file again."
            )
        blocks[storage.key] = Member(position + 8, size)
        position += 8 + size
    return _records(pickled, blocks, where)


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size_bytes)


def _state_dict(data: object, where: str) -> dict[str, PickledTensor]:
    state = data
    for _ in range(_MAX_WRAPPERS):
        inner = (
            state[name] for name in _WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(name), Mapping)
        )
        state = next(inner, state)
    found = {str(k): v for k, v in state.items() if isinstance(v, PickledTensor)} if isinstance(state, Mapping) else {}
    if not found:
        what = (
            " (it is a textual inversion: one new word)"
            if isinstance(data, Mapping) and "string_to_param" in data
            else ""
        )
        raise CheckpointError(
            f"{where} holds no state dict; expected a dict of tensors, maybe under {' or '.join(_WRAPPERS)}{what}."
        )
    return found


def _records(pickled: Pickled, blocks: Mapping[str, Member], where: str) -> dict[str, Record]:
    if pickled.ignored:
        logger.info("%s: ignored what is beside the weights: %s", where, ", ".join(sorted(pickled.ignored)))
    records = {}
    for key, tensor in _state_dict(pickled.data, where).items():
        block, storage = blocks.get(tensor.storage.key), tensor.storage
        size = storage.count * storage.dtype.itemsize
        if block is None or block.size_bytes != size:
            has = f"has {block.size_bytes} bytes instead of {size}" if block else "is missing"
            raise CheckpointError(
                f"{where} is a truncated or corrupt torch checkpoint: block {storage.key[:40]!r} of {key} {has}. "
                "Fetch the file again."
            )
        records[key] = Record(
            dtype=storage.dtype,
            start=block.start,
            size_bytes=size,
            shape=tensor.shape,
            stride=tensor.stride,
            offset=tensor.offset,
        )
    return records
