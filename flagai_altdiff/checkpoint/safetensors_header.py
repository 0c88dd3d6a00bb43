"""The header of a ``.safetensors`` file, read strictly: a JSON object that says where each tensor lies.

**Source**: the format's description, https://huggingface.co/docs/safetensors/index#format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import BinaryIO, NoReturn

import torch

from flagai_altdiff.checkpoint.records import MAX_DIMENSIONS, MAX_KEY_LENGTH, MAX_TENSORS, Record
from flagai_altdiff.errors import CheckpointError, printable, shown

_MAX_HEADER_BYTES = 16 << 20
"""The format allows 100 MB; the headers of this family have some hundred kB."""

_MAX_BRACKETS = 5 * MAX_TENSORS
"""A tensor has three; the others may stand in metadata."""
_MAX_DIGITS = 40

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def read_header(file: BinaryIO, file_size: int, where: str) -> dict[str, Record]:
    """Places of the tensors.

    Args:
        file: At its beginning.
        file_size: Its length, in bytes.
        where: The file, for errors.

    Returns:
        Key -> place; together they cover the rest of the file without gap or overlap.

    Raises:
        CheckpointError: The header breaks a rule of the format; the message names the rule and the tensor.
    """
    length = int.from_bytes(file.read(8), "little")
    data_start = 8 + length
    if length > _MAX_HEADER_BYTES:
        raise _malformed(where, f"its header claims {length} bytes; at most {_MAX_HEADER_BYTES} are read")
    if data_start > file_size:
        raise _malformed(where, f"its header claims {length} bytes, but the file has {file_size}")
    text = file.read(length)
    if text.count(b"[") + text.count(b"{") > _MAX_BRACKETS:
        raise _malformed(where, f"its header is no JSON object of tensors (over {_MAX_BRACKETS} lists and objects)")
    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_int=_integer,
            parse_float=_no_integer,
            parse_constant=_no_integer,
        )
    except (ValueError, RecursionError) as error:
        raise _malformed(where, f"its header is no JSON object ({printable(str(error), 120)})") from error
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed(where, "__metadata__ is not a mapping of texts")
    if len(header) > MAX_TENSORS:
        raise _malformed(where, f"it lists {len(header)} tensors; at most {MAX_TENSORS} are read")
    records = {key: _record(key, entry, data_start, where) for key, entry in header.items()}
    end, last = data_start, "the header"
    for key, record in sorted(records.items(), key=lambda item: (item[1].start, item[1].size_bytes)):
        if record.start != end:
            kind = "overlaps" if record.start < end else f"leaves a gap of {record.start - end} bytes after"
            raise _malformed(where, f"{printable(key, 120)} {kind} {last}")
        end, last = record.start + record.size_bytes, printable(key, 120)
    if end != file_size:
        raise _malformed(where, f"its tensors end at byte {end}, but the file has {file_size}")
    return records


def _record(key: str, entry: object, data_start: int, where: str) -> Record:
    name = printable(key, 120)
    if len(key) > MAX_KEY_LENGTH:
        raise _malformed(where, f"a tensor has a name of {len(key)} letters ({name})")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(where, f"{name} needs dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        known = ", ".join(_DTYPES)
        raise _malformed(where, f"{name} has the unknown dtype {shown(entry['dtype'], 40)}; known: {known}")
    shape, offsets = _counts(entry["shape"]), _counts(entry["data_offsets"])
    if shape is None or offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(where, f"{name} has a shape or data_offsets that are not counts")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != size:
        raise _malformed(where, f"{name} of shape {list(shape)} and dtype {entry['dtype']} cannot have {size} bytes")
    return Record(dtype=dtype, start=data_start + offsets[0], size_bytes=size, shape=shape)


def _counts(values: object) -> tuple[int, ...] | None:
    if not isinstance(values, list) or len(values) > MAX_DIMENSIONS:
        return None
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values):
        return None
    return tuple(values)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"{shown(twice)} appears twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _no_integer(text: str) -> NoReturn:
    raise ValueError(f"{shown(text)} is no whole number")


def _malformed(where: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where} is a truncated or corrupt safetensors file: {problem}. Fetch the file again.")
