"""Tensors of one file, whatever its format. Nothing that a file asks for is ever run."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from heapq import nsmallest
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from flagai_altdiff.checkpoint.archive import Member, members
from flagai_altdiff.checkpoint.pickled import Pickled, PickledTensor, interpret
from flagai_altdiff.checkpoint.records import Record, open_tensors
from flagai_altdiff.checkpoint.safetensors_header import read_header
from flagai_altdiff.errors import CheckpointError, last_net, printable, shown
from flagai_altdiff.files import open_regular

logger = logging.getLogger(__name__)

_MAX_PICKLE_BYTES = 64 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_WRAPPERS = ("state_dict", "module", "model_state_dict", "model")
"""Under which key trainers file the weights; FlagAI's is the second."""
_MAX_WRAPPERS = 2
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")
"""What DataParallel, torch.compile and Lightning put before every key."""
_LITTLE = b"little"
_MAX_PREFIXES = 4
_MAX_LISTED = 20
_TAR_MARK_AT = 257
_HEAD_BYTES = 512


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The weights in a ``.safetensors``, ``.ckpt``, ``.bin`` or ``.pt`` file; large ones are mapped into memory.

    Args:
        path: The file; its content decides how it is read, not its name.

    Returns:
        Key -> tensor on the CPU. Of a training checkpoint, its ``state_dict``.

    Raises:
        CheckpointError: Not a readable file of weights; UnsafeCheckpointError for a pickle that asks for code.
        InsufficientMemoryError: It does not fit into memory.
    """
    with last_net(path), _open(path) as file:
        return _read(file, printable(str(path)))


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENOTSUP):
            kind = "a folder" if error.errno == errno.EISDIR else "a pipe, socket or device"
            raise CheckpointError(f"{path} is {kind}; expected a file of weights.") from error
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(file: BinaryIO, where: str) -> dict[str, Tensor]:
    before = os.fstat(file.fileno())
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if head[8:9] == b"{":
        records = read_header(file, before.st_size, where)
    elif head[:4] == b"PK\x03\x04":
        records = _zipped(file, where)
    elif head[:1] == b"\x80":
        records = _legacy(file, before.st_size, where)
    else:
        raise _unknown(head, where)
    tensors = open_tensors(file, _without_prefix(records), where)
    after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{where} changed while it was read. Wait until it is written, then load it again.")
    return tensors


def bare(key: str) -> str:
    """A key without what wrappers put before it."""
    for _ in range(_MAX_PREFIXES):
        key = key.removeprefix(next((prefix for prefix in _PREFIXES if key.startswith(prefix)), ""))
    return key


def _without_prefix(records: dict[str, Record]) -> dict[str, Record]:
    """The records under their keys without what wrappers put before all of them."""
    for _ in range(_MAX_PREFIXES):
        prefix = next((p for p in _PREFIXES if records and all(key.startswith(p) for key in records)), "")
        if prefix:
            records = {key.removeprefix(prefix): record for key, record in records.items()}
    return records


def _unknown(head: bytes, where: str) -> CheckpointError:
    if head[_TAR_MARK_AT:].startswith(b"ustar"):
        return CheckpointError(
            f"{where} has torch's tar format of before 2017, which is not read. "
            "Convert it with an old torch: torch.save(torch.load(path), new_path)."
        )
    first = shown(head[:16].decode("latin-1").partition("\n")[0]) if head.strip() else "nothing"
    return CheckpointError(
        f"{where} is neither safetensors nor a torch checkpoint; it begins with {first}. "
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
    order = found.get("byteorder")
    if order and (order.size_bytes != len(_LITTLE) or _content(file, order) != _LITTLE):
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
    data = file.read(_MAX_PICKLE_BYTES)
    mark = interpret(data, where)
    if not _is(mark.data, _LEGACY_MAGIC):
        raise CheckpointError(
            f"{where} is a pickle, but a truncated or corrupt torch checkpoint: torch's mark is missing."
        )
    version = interpret(data, where, mark.end)
    machine = interpret(data, where, version.end)
    order = machine.data.get("little_endian") if isinstance(machine.data, dict) else None
    if not _is(version.data, _LEGACY_PROTOCOL) or order is not True:
        raise CheckpointError(
            f"{where} is a truncated or corrupt torch checkpoint, or was written by a big-endian machine."
        )
    pickled = interpret(data, where, machine.end)
    names = interpret(data, where, pickled.end)
    return _records(pickled, _legacy_blocks(file, file_size, pickled, names, where), where)


def _legacy_blocks(file: BinaryIO, file_size: int, pickled: Pickled, names: Pickled, where: str) -> dict[str, Member]:
    blocks: dict[str, Member] = {}
    position = names.end
    for name in names.data if isinstance(names.data, list) else ():
        file.seek(position)
        length = file.read(8)
        storage = pickled.storages.get(str(name)) if isinstance(name, str | int) else None
        size = int.from_bytes(length, "little") * (storage.dtype.itemsize if storage else 0)
        if storage is None or storage.key in blocks or len(length) < 8 or position + 8 + size > file_size:
            raise CheckpointError(
                f"{where} is a truncated or corrupt torch checkpoint: it ends before its weights. Fetch the file again."
            )
        blocks[storage.key] = Member(position + 8, size)
        position += 8 + size
    return blocks


def _is(value: object, number: int) -> bool:
    """Whether a value of a pickle is that number; others are not even compared."""
    return isinstance(value, int) and value == number


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size_bytes)


def _state_dict(data: object, where: str) -> dict[str, PickledTensor]:
    state = data
    if isinstance(data, Mapping) and isinstance(words := data.get("string_to_param"), Mapping):
        state = {f"string_to_param.{word}": vectors for word, vectors in words.items()}
    for _ in range(_MAX_WRAPPERS):
        inner = (
            state[name] for name in _WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(name), Mapping)
        )
        state = next(inner, state)
    found = {k: v for k, v in state.items() if isinstance(v, PickledTensor)} if isinstance(state, Mapping) else {}
    if not found:
        raise CheckpointError(
            f"{where} holds no state dict; expected a dict of tensors, maybe under {' or '.join(_WRAPPERS)}."
        )
    return found


def _records(pickled: Pickled, blocks: Mapping[str, Member], where: str) -> dict[str, Record]:
    if pickled.ignored:
        names, rest = nsmallest(_MAX_LISTED, pickled.ignored), len(pickled.ignored) - _MAX_LISTED
        listed = ", ".join(printable(name, 120) for name in names) + (f" and {rest} more" if rest > 0 else "")
        logger.info("%s: ignored what is beside the weights: %s", where, listed)
    records = {}
    for key, tensor in _state_dict(pickled.data, where).items():
        block, storage = blocks.get(tensor.storage.key), tensor.storage
        size = storage.count * storage.dtype.itemsize
        if block is None or block.size_bytes != size:
            has = f"has {block.size_bytes} bytes instead of {size}" if block else "is missing"
            named = f"block {shown(storage.key)} of {printable(key, 120)}"
            raise CheckpointError(
                f"{where} is a truncated or corrupt torch checkpoint: {named} {has}. Fetch the file again."
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
