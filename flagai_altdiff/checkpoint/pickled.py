"""Pickles of weights, interpreted without a way to run anything.

A pickle is a program for a stack machine. This machine has whole numbers, texts, lists, tuples and dicts; what else a
program makes, names or calls is a thing that does nothing. Two functions of torch that describe a tensor become a
description. Any name outside a short list makes the whole file refused.

Whatever a program does, it costs no more than its length: each step costs about the same, what takes longer is charged
as so many steps, and nothing that it makes is ever compared, hashed or spelled but for short texts.

**Source**: the opcodes are those of Python's ``pickletools``.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest

import torch

from flagai_altdiff.checkpoint.records import MAX_DIMENSIONS, MAX_KEY_LENGTH
from flagai_altdiff.errors import CheckpointError, UnsafeCheckpointError, printable, shown

_MAX_STEPS = 600_000
"""A training checkpoint of this family, with averages and the optimizer's state, takes some 300 thousand."""
_CONTAINER_STEPS = 2
"""For a container beside the step itself: it takes memory, and Python looks through all of them for garbage."""
_MAX_NAMES = 1000
_MAX_NAME_LENGTH = 200
_MAX_LINE_BYTES = 1000
_MAX_INTEGER_BYTES = 255

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
_UNDERSTOOD = frozenset({*_STORAGES, *_TENSORS, *_PARAMETERS, *_DICTS})
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
_OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers (of the meta device)",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_tensor_v3": "a tensor of another type of numbers (float8 or unsigned, for example)",
    "torch.storage.UntypedStorage": "a tensor of another type of numbers (float8 or unsigned, for example)",
    **{f"torch.per_{name}_affine": "quantized numbers" for name in ("tensor", "channel")},
    **{f"torch.Complex{name}Storage": "complex numbers" for name in ("Float", "Double")},
    **{f"torch.{name}Storage": "quantized numbers" for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
}
"""What torch writes and no model of this family has."""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that a pickle names."""

    name: str


class _Nothing:
    """What a call gives, and every value without a meaning here."""


_NOTHING = _Nothing()
_NEVER_KEPT = _Nothing()


@dataclass(frozen=True)
class Pickled:
    """What a pickle describes.

    Args:
        data: Plain data with ``PickledTensor`` in it. Only texts are keys of its dicts. It may nest to any depth:
            compare, hash or print nothing in it but numbers and texts.
        storages: Every block of numbers, by its key.
        ignored: Names that were passed over.
        end: Where the pickle ends.
    """

    data: object
    storages: Mapping[str, Storage]
    ignored: frozenset[str]
    end: int


def interpret(file: bytes, where: str, start: int = 0) -> Pickled:
    """Read a pickle without running it.

    Args:
        file: The pickle, and maybe more before and behind it.
        where: The file, for errors.
        start: Where the pickle begins.

    Raises:
        UnsafeCheckpointError: It names something outside the list.
        CheckpointError: It is no such pickle.
    """
    machine = _Machine(file, start)
    data, trouble = None, None
    try:
        data = machine.run()
    except (CheckpointError, ValueError, IndexError) as error:
        trouble = error
    if machine.refused:
        raise _refusal(machine.refused, where)
    if isinstance(trouble, CheckpointError):
        raise CheckpointError(f"{where} is refused: {trouble}") from trouble
    if trouble:
        raise CheckpointError(
            f"{where} is a truncated or corrupt torch checkpoint ({shown(str(trouble))}). Fetch the file again."
        ) from trouble
    return Pickled(data, machine.storages, frozenset(machine.ignored), machine.at)


def _refusal(names: list[str], where: str) -> UnsafeCheckpointError:
    first = ", ".join(printable(name, 80) for name in nsmallest(5, names))
    listed = first + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    if all(name in _OTHER_TENSORS for name in names):
        return UnsafeCheckpointError(
            f"{where} holds {_OTHER_TENSORS[names[0]]} ({listed}), which no model of this family has and nothing here "
            "reads. Save plain tensors of floating-point numbers instead, for example as safetensors."
        )
    return UnsafeCheckpointError(
        f"{where} is refused: it is a pickle that asks for {listed}. "
        "Nothing in it was run. Only tensors and plain containers are read; get the weights as safetensors."
    )


class _Machine:
    """The state of a program: where it is, and what it has made.

    Args:
        data: Holds the program.
        at: Its next byte.
    """

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.stack: list[object] = []  # since the last mark
        self.outer: list[list[object]] = []  # the stacks below the marks
        self.memo: list[object] = []
        self.steps = 0
        self.names: dict[str, _Name] = {}
        self.refused: list[str] = []
        self.ignored: list[str] = []
        self.storages: dict[str, Storage] = {}

    def run(self) -> object:
        while True:
            self.charge(1)
            code = self.byte()
            if code == _STOP:
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise CheckpointError(f"its pickle has the step {_NAMES.get(code, code)}, which torch does not write.")
            step(self)

    def charge(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MAX_STEPS:
            raise CheckpointError(f"its pickle takes more than {_MAX_STEPS} steps.")

    # What the program's text holds

    def byte(self) -> int:
        at = self.at
        if at >= len(self.data):
            raise ValueError("its pickle has no end")
        self.at = at + 1
        return self.data[at]

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError("its pickle has no end")
        return self.data[start : self.at]

    def count(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def skip(self, count: int) -> None:
        self.at += count  # beyond the end there is no next step

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.at, self.at + _MAX_LINE_BYTES + 1)
        if end < 0:
            raise ValueError(f"a line of its pickle has no end, or over {_MAX_LINE_BYTES} bytes")
        line, self.at = self.data[self.at : end], end + 1
        return line

    def integer(self, width: int) -> int:
        length = self.count(width)
        if length > _MAX_INTEGER_BYTES:
            raise CheckpointError(f"its pickle holds a whole number of {length} bytes.")
        return int.from_bytes(self.take(length), "little", signed=True)

    # What the stack holds

    def push(self, value: object) -> None:
        self.stack.append(value)

    def group(self) -> list[object]:
        """Take the values above the last mark from the stack, and the mark."""
        if not self.outer:
            raise ValueError("a group in its pickle has no beginning")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def last(self, count: int) -> list[object]:
        """Take so many values from the stack."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes what is not there")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    # What its steps do

    def mark(self) -> None:
        self.charge(_CONTAINER_STEPS)
        self.outer.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.group()

    def new(self, kind: Callable[..., object], *values: object) -> None:
        """Make a container."""
        self.charge(_CONTAINER_STEPS)
        self.push(kind(*values))

    def keep(self, index: int) -> None:
        value, gap = self.stack[-1], index - len(self.memo)
        if index < 0:
            raise ValueError("its pickle keeps a value under a negative number")
        if gap >= 0:  # 0, unless a program means to waste memory
            self.charge(gap)
            self.memo.extend([_NEVER_KEPT] * (gap + 1))
        self.memo[index] = value

    def recall(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else _NEVER_KEPT
        if value is _NEVER_KEPT:
            raise ValueError("its pickle recalls what it never kept")
        self.push(value)

    def append(self, values: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, (_Nothing, _Name)):
            raise ValueError("its pickle adds a value to what is no list")

    def put(self, values: Sequence[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            _put(target, values)
        elif not isinstance(target, (_Nothing, _Name)):
            raise ValueError("its pickle puts a value into what is no dict")

    def build(self) -> None:
        """Attributes of the last value but one are set; nothing here has any."""
        self.push(self.last(2)[0])

    def name(self, module: object, name: object) -> None:
        """A class or function is named; what it is decides nothing but whether the file is refused."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise CheckpointError("its pickle names a class or function by what is no text.")
        if max(len(module), len(name)) > _MAX_NAME_LENGTH:
            raise CheckpointError(f"its pickle names a class or function by over {_MAX_NAME_LENGTH} letters.")
        full = f"{module}.{name}"
        if full.startswith("__builtin__."):
            full = "builtins." + full.removeprefix("__builtin__.")
        if full not in self.names:
            if len(self.names) == _MAX_NAMES:
                raise CheckpointError(f"its pickle names over {_MAX_NAMES} classes and functions.")
            self.names[full] = _Name(full)
            if full in _INERT or full.startswith(_INERT_MODULES):
                self.ignored.append(full)
            elif full not in _UNDERSTOOD:
                self.refused.append(full)
        self.push(self.names[full])

    def call(self) -> None:
        """What a call amounts to; nothing is called."""
        self.charge(_CONTAINER_STEPS)
        function, arguments = self.last(2)
        name = function.name if isinstance(function, _Name) else ""
        values = arguments if isinstance(arguments, tuple) else ()
        if name in _TENSORS:
            self.push(_described(values))
        elif name in _PARAMETERS and values:
            self.push(values[0])
        elif name in _DICTS:
            self.push(self.dictionary(values[0] if values else None))
        else:
            self.push(_NOTHING)

    def dictionary(self, pairs: object) -> dict[object, object]:
        """What collections.OrderedDict makes of a list of keys and values, as old Pythons write it."""
        made: dict[object, object] = {}
        if isinstance(pairs, list):
            self.charge(2 * len(pairs))
            for pair in pairs:
                if isinstance(pair, (list, tuple)) and len(pair) == 2:
                    _put(made, pair)
        return made

    def storage(self) -> None:
        storage = _storage(self.stack.pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise CheckpointError(f"it gives two types or lengths to the block of numbers {shown(storage.key)}.")
        self.push(storage)


def _described(values: Sequence[object]) -> PickledTensor:
    match values[:4]:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride)):
            if max(len(shape), len(stride)) > MAX_DIMENSIONS:
                raise CheckpointError(f"it describes a tensor of {max(len(shape), len(stride))} dimensions.")
            if _are_counts((offset, *shape, *stride)):
                return PickledTensor(storage, offset, shape, stride)
    raise CheckpointError("it describes a tensor by something else than a storage, an offset, a shape and strides.")


def _storage(identity: object) -> Storage:
    match identity if isinstance(identity, tuple) and len(identity) <= 6 else ():
        case ("storage", _Name(name), str(key) | int(key), str(), int(count), *view) if name in _STORAGES:
            if _are_counts((count,)) and all(part is None for part in view):
                return Storage(str(key), _STORAGES[name], count)
    raise CheckpointError("it names a block of numbers in a way that torch does not; save it again with torch.save.")


def _are_counts(values: Iterable[object]) -> bool:
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in values)


def _put(target: dict[object, object], values: Sequence[object]) -> None:
    """Keys and values in turn. Only texts count as keys: others could be made to take for ever, and name no weights."""
    if len(values) % 2:
        raise ValueError("a key in its pickle has no value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not isinstance(key, str):
            continue
        if len(key) <= MAX_KEY_LENGTH:
            if key in target and (isinstance(value, PickledTensor) or isinstance(target[key], PickledTensor)):
                raise CheckpointError(f"it gives {shown(key)} twice.")
            target[key] = value
        elif isinstance(value, PickledTensor):
            raise CheckpointError(f"a tensor in it has a name of {len(key)} letters ({shown(key)}).")


def _number(line: bytes) -> int:
    """A whole number; in protocol 1, two of them are false and true."""
    return line == b"01" if line in (b"00", b"01") else int(line)


def _text(line: bytes) -> str:
    return line.decode("latin-1").strip("'\"")


_Step = Callable[[_Machine], object]


def _constant(value: object) -> _Step:
    return lambda m: m.push(value)


def _utf8(width: int) -> _Step:
    return lambda m: m.push(m.take(m.count(width)).decode("utf-8", "surrogatepass"))


def _latin(width: int) -> _Step:
    return lambda m: m.push(m.take(m.count(width)).decode("latin-1"))


def _unread(width: int) -> _Step:
    """A value that has no meaning here, behind its length."""

    def step(m: _Machine) -> None:
        m.skip(m.count(width))
        m.push(_NOTHING)

    return step


def _unread_line(m: _Machine) -> None:
    m.line()
    m.push(_NOTHING)


def _unread_number(m: _Machine) -> None:
    m.skip(8)
    m.push(_NOTHING)


def _dict_of_group(m: _Machine) -> None:
    values = m.group()
    m.new(dict)
    m.put(values)


def _named_in_lines(m: _Machine) -> None:
    module = m.line().decode("utf-8")
    m.name(module, m.line().decode("utf-8"))


def _nothing_of_group(m: _Machine) -> None:
    m.group()
    m.push(_NOTHING)


def _nothing_of_three(m: _Machine) -> None:
    m.last(3)
    m.push(_NOTHING)


_STEPS_BY_NAME: dict[str, _Step] = {
    "PROTO": lambda m: m.skip(1),
    "FRAME": lambda m: m.skip(8),
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    "INT": lambda m: m.push(_number(m.line())),
    "LONG": lambda m: m.push(int(m.line().rstrip(b"L"))),
    "BININT": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    "BININT1": lambda m: m.push(m.byte()),
    "BININT2": lambda m: m.push(m.count(2)),
    "LONG1": lambda m: m.push(m.integer(1)),
    "LONG4": lambda m: m.push(m.integer(4)),
    "FLOAT": _unread_line,
    "BINFLOAT": _unread_number,
    "STRING": lambda m: m.push(_text(m.line())),
    "UNICODE": lambda m: m.push(_text(m.line())),
    "SHORT_BINUNICODE": _utf8(1),
    "BINUNICODE": _utf8(4),
    "BINUNICODE8": _utf8(8),
    "SHORT_BINSTRING": _latin(1),
    "BINSTRING": _latin(4),
    "SHORT_BINBYTES": _unread(1),
    "BINBYTES": _unread(4),
    "BINBYTES8": _unread(8),
    "BYTEARRAY8": _unread(8),
    "EMPTY_TUPLE": _constant(()),
    "EMPTY_LIST": lambda m: m.new(list),
    "EMPTY_DICT": lambda m: m.new(dict),
    "EMPTY_SET": _constant(_NOTHING),
    "MARK": _Machine.mark,
    "TUPLE1": lambda m: m.new(tuple, m.last(1)),
    "TUPLE2": lambda m: m.new(tuple, m.last(2)),
    "TUPLE3": lambda m: m.new(tuple, m.last(3)),
    "TUPLE": lambda m: m.new(tuple, m.group()),
    "LIST": lambda m: m.new(list, m.group()),
    "DICT": _dict_of_group,
    "FROZENSET": _nothing_of_group,
    "APPEND": lambda m: m.append(m.last(1)),
    "APPENDS": lambda m: m.append(m.group()),
    "ADDITEMS": lambda m: m.append(m.group()),
    "SETITEM": lambda m: m.put(m.last(2)),
    "SETITEMS": lambda m: m.put(m.group()),
    "POP": _Machine.pop,
    "POP_MARK": _Machine.group,
    "DUP": lambda m: m.push(m.stack[-1]),
    "PUT": lambda m: m.keep(int(m.line())),
    "BINPUT": lambda m: m.keep(m.byte()),
    "LONG_BINPUT": lambda m: m.keep(m.count(4)),
    "MEMOIZE": lambda m: m.keep(len(m.memo)),
    "GET": lambda m: m.recall(int(m.line())),
    "BINGET": lambda m: m.recall(m.byte()),
    "LONG_BINGET": lambda m: m.recall(m.count(4)),
    "GLOBAL": _named_in_lines,
    "STACK_GLOBAL": lambda m: m.name(*m.last(2)),
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _nothing_of_three,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
_STEPS = {code: _STEPS_BY_NAME[name] for code, name in _NAMES.items() if name in _STEPS_BY_NAME}
_STOP = ord(pickle.STOP)
