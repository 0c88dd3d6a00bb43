"""Pickles of weights, interpreted without a way to run anything.

A pickle is a program for a stack machine. This machine has numbers, texts, lists and dicts; where a program names a
class or calls a function, it gets a thing that does nothing. Two functions of torch that describe a tensor become a
description. Any name outside a short list makes the whole file refused.

**Source**: the opcodes are those of Python's ``pickletools``.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap

import torch

from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError

_MAX_STEPS = 1_000_000
"""A training checkpoint of this family takes some 100 thousand."""

_STORAGES = {
    f"torch.{device}{name}Storage": dtype
    for device in ("", "cuda.")
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")
_DICTS = ("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict")
_INERT_MODULES = (
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "argparse.",
    "omegaconf.",
    "pathlib.",
    "datetime.",
)
_INERT = frozenset(
    {
        f"builtins.{name}"
        for name in "bool bytearray bytes complex float frozenset int list long object set str tuple".split()
    }
    | {"copyreg._reconstructor", "copy_reg._reconstructor", "typing.Any"}
    | {
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "_codecs.encode",
    }
    | {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct", "torch.Size", "torch.device"}
    | {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
)
"""What trainers leave in their files beside the weights; nothing is done with it."""


@dataclass(frozen=True)
class Storage:
    """A block of numbers that lies elsewhere in the file.

    Args:
        key: Its name there.
        dtype: Of its numbers.
        count: How many there are.
    """

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class PickledTensor:
    """A tensor as a pickle describes it; sizes are not checked yet.

    Args:
        storage: Where its numbers are.
        offset: Its first number in the storage.
        shape: Of the tensor.
        stride: Steps between neighbours along each dimension, in numbers.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A class or function that a pickle names."""

    name: str


class _Nothing:
    """What a call gives, and what has no meaning here."""


class _Mark:
    """Where a group of values begins on the stack."""


_MARK = _Mark()


@dataclass(frozen=True)
class Pickled:
    """What a pickle describes.

    Args:
        data: Plain data with ``PickledTensor`` in it.
        storages: Every block of numbers, by its key.
        ignored: Names that were passed over.
    """

    data: object
    storages: Mapping[str, Storage]
    ignored: frozenset[str]


def interpret(file: mmap | bytes, where: str) -> Pickled:
    """Read a pickle without running it.

    Args:
        file: The pickle; a mapped file is left behind its end.
        where: The file, for errors.

    Raises:
        UnsafeCheckpointError: It names something outside the list.
        CheckpointError: It is no such pickle.
    """
    machine = _Machine()
    data, trouble = None, None
    try:
        data = machine.run(file)
    except (CheckpointError, ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
        trouble = error
    if machine.refused:
        names = sorted(machine.refused)
        shown = ", ".join(name[:80] for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UnsafeCheckpointError(
            f"{where} is refused: it is a pickle that asks for {shown.encode('ascii', 'backslashreplace').decode()}. "
            "Nothing in it was run. Only tensors and plain containers are read; get the weights as safetensors."
        )
    if isinstance(trouble, CheckpointError):
        raise CheckpointError(f"{where} is refused: {trouble}") from trouble
    if trouble:
        reason = (str(trouble).splitlines() or [type(trouble).__name__])[0][:120]
        raise CheckpointError(
            f"{where} is a truncated or corrupt torch checkpoint ({reason}). Fetch the file again."
        ) from trouble
    return Pickled(data, machine.storages, frozenset(machine.ignored))


class _Machine:
    def __init__(self) -> None:
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.refused: set[str] = set()
        self.ignored: set[str] = set()
        self.storages: dict[str, Storage] = {}

    def run(self, file: mmap | bytes) -> object:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):  # type: ignore[arg-type]
            if step > _MAX_STEPS:
                raise CheckpointError(f"its pickle takes more than {_MAX_STEPS} steps.")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, argument)
        raise ValueError("the pickle has no end")

    def step(self, opcode: str, argument: object) -> None:
        stack = self.stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[int(argument)] = stack[-1]  # type: ignore[call-overload]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[int(argument)])  # type: ignore[call-overload]
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL":
                stack.append(self.named(str(argument).replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self.named(f"{module}.{name}"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "NEWOBJ_EX":
                del stack[-3:]
                stack.append(_Nothing())
            case "BINPERSID":
                storage = _storage(stack.pop())
                if self.storages.setdefault(storage.key, storage) != storage:
                    raise CheckpointError(
                        f"it gives two types or lengths to the block of numbers {storage.key[:40]!r}."
                    )
                stack.append(storage)
            case "BUILD":
                stack.pop()  # attributes; nothing here has any
                _ = stack[-1]
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_SET":
                stack.append(
                    {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": _Nothing}[opcode]()
                )
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode[-1])
                stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
            case "TUPLE":
                stack.append(tuple(self.group()))
            case "LIST":
                stack.append(self.group())
            case "DICT":
                values = self.group()
                stack.append({})
                _put(stack[-1], values)
            case "FROZENSET":
                self.group()
                stack.append(_Nothing())
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS" | "ADDITEMS":
                values = self.group()
                _extend(stack[-1], values)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _put(stack[-1], [key, value])
            case "SETITEMS":
                values = self.group()
                _put(stack[-1], values)
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.group()
            case "DUP":
                stack.append(stack[-1])
            case _ if isinstance(argument, (int, float, str, bytes, bytearray)) and opcode not in _UNUSED:
                stack.append(argument)
            case _:
                raise CheckpointError(f"its pickle has the step {opcode}, which torch does not write.")

    def named(self, name: str) -> _Name:
        if name.startswith("__builtin__."):
            name = "builtins." + name.removeprefix("__builtin__.")
        if name in _INERT or name.startswith(_INERT_MODULES):
            self.ignored.add(name)
        elif name not in _STORAGES and name not in (*_TENSORS, *_PARAMETERS, *_DICTS):
            self.refused.add(name)
        return _Name(name)

    def group(self) -> list[object]:
        """Take the values above the last mark from the stack."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a group without beginning")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values


_UNUSED = frozenset({"PERSID", "INST", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})


def _call(function: object, arguments: object) -> object:
    """What a call amounts to; nothing is called."""
    name = function.name if isinstance(function, _Name) else ""
    values = arguments if isinstance(arguments, tuple) else ()
    if name in _TENSORS:
        return _described(values)
    if name in _PARAMETERS and values:
        return values[0]
    if name in _DICTS:
        made: dict[object, object] = {}
        for pair in values[0] if values and isinstance(values[0], list) else ():
            if isinstance(pair, (list, tuple)):
                _put(made, pair)
        return made
    return _Nothing()


def _described(values: Sequence[object]) -> PickledTensor:
    match values:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_) if _are_counts(
            (offset, *shape, *stride)
        ):
            return PickledTensor(storage, offset, shape, stride)
    raise CheckpointError("it describes a tensor by something else than a storage, an offset, a shape and strides.")


def _storage(identity: object) -> Storage:
    match identity:
        case ("storage", _Name(name), str(key) | int(key), str(), int(count), *view) if name in _STORAGES:
            if _are_counts((count,)) and view in ([], [None]):
                return Storage(str(key), _STORAGES[name], count)
    raise CheckpointError("it names a block of numbers in a way that torch does not; save it again with torch.save.")


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values)


def _extend(target: object, values: list[object]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, (_Nothing, _Name)):
        raise ValueError("a value is added to what is no list")


def _put(target: object, values: Sequence[object]) -> None:
    """Keys and values in turn. Only plain keys count: comparing nested ones could take for ever."""
    if isinstance(target, dict):
        target.update(
            {k: v for k, v in zip(values[::2], values[1::2], strict=True) if isinstance(k, (str, int, float))}
        )
    elif not isinstance(target, (_Nothing, _Name)):
        raise ValueError("a value is put into what is no dict")
