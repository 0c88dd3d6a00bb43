"""What some work asks of the machine, counted call by call: the same on every machine, however busy."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

_POINTWISE = torch.ops.mkldnn._convolution_pointwise
_ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_LINEAR = torch.ops.mkldnn._linear_pointwise
LINEAR = ("mm", "addmm", "_linear_pointwise")
_ATTENTION = "_scaled_dot_product"


class Counting(TorchDispatchMode):
    """Counts the operations in a block.

    Attributes:
        calls: By name.
        moved_bytes: Of all that operations that compute read and write, were nothing of it kept near the processor.
        made: Pieces of memory that were asked for.
        text_products: Linear maps of as many rows as a text has tokens, to keys and values for example.
    """

    def __init__(self, tokens: int = 77) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.moved_bytes = self.made = self.text_products = 0
        self._tokens = tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        given, made = tensors((args, kwargs)), tensors(found)
        old = {_memory(tensor) for tensor in given}
        new = [tensor for tensor in made if _memory(tensor) not in old]
        if new or name.endswith("_"):
            self.moved_bytes += sum(map(size_bytes, (*given, *made)))
        self.made += len(new)
        if name in LINEAR and any(map(self._of_text, given[:1] if func.overloadpacket is _LINEAR else given)):
            self.text_products += 1
        return found

    @property
    def attentions(self) -> int:
        """Fused ones."""
        return sum(count for name, count in self.calls.items() if name.startswith(_ATTENTION))

    def _of_text(self, tensor: Tensor) -> bool:
        rows = tensor.shape[:-1]
        return len(rows) > 0 and rows[-1] % self._tokens == 0 and (len(rows) == 1 or rows[-1] == self._tokens)


def tensors(tree: object) -> list[Tensor]:
    """All tensors in arguments or results."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size_bytes(tensor: Tensor) -> int:
    """Of its numbers, wherever they are."""
    return tensor.numel() * tensor.element_size()


def counted(work: Callable[[], object]) -> Counting:
    """What some work asks for."""
    with torch.no_grad(), Counting() as counting:
        work()
    return counting


def flop(work: Callable[[], object]) -> int:
    """Floating-point operations of some work; on the meta device nothing is computed."""
    own = {_POINTWISE: _pointwise_flop, _LINEAR: _linear_flop, _ATTENTION_ON_CPU: _attention_flop}  # torch counts none
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        work()
    return int(counter.get_total_flops())


def kept_bytes(work: Callable[[], object]) -> int:
    """Memory that some work has asked for and that is still in use after it, its result thrown away."""
    kept: list[weakref.ref[Any]] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            old = {_memory(tensor) for tensor in tensors((args, kwargs))}
            kept.extend(_holder(tensor) for tensor in tensors(found) if _memory(tensor) not in old)
            return found

    with torch.no_grad(), Noting():
        work()
    return sum(size_bytes(holder) if isinstance(holder, Tensor) else holder.nbytes() for holder in _living(kept))


def _living(kept: list[weakref.ref[Any]]) -> Iterator[Any]:
    for reference in kept:
        holder = reference()
        if holder is not None:
            yield holder


def _memory(tensor: Tensor) -> int:
    """Where its numbers are; what has no address is itself."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata


def _holder(tensor: Tensor) -> weakref.ref[Any]:
    return weakref.ref(tensor if tensor.is_mkldnn else tensor.untyped_storage())


# The counter gives shapes in place of tensors.


def _pointwise_flop(x: Any, weight: Any, *others: Any, out_shape: Any, **more: Any) -> int:
    if list(weight) == list(out_shape):  # what is added to the output comes before the weights
        weight = others[0]
    return int(conv_flop_count(list(x), list(weight), list(out_shape), transposed=False))


def _linear_flop(x: Any, weight: Any, *others: Any, out_shape: Any, **more: Any) -> int:
    return 2 * math.prod(out_shape) * int(x[-1])


def _attention_flop(query: Any, key: Any, value: Any, *others: Any, **more: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
