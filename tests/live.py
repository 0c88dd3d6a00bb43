"""Bytes that live at once while a model computes, counted tensor by tensor: the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class _Counter(TorchDispatchMode):
    """Counts storages from the call that makes them until they are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        laid_out = 0
        for x in torch.utils._pytree.tree_leaves(made):
            storage = x.untyped_storage() if torch.is_tensor(x) else None
            if storage is None or storage._cdata in given or storage._cdata in self._seen:
                continue
            size = storage.nbytes()
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._drop, storage._cdata, size)
            self.now += size
            laid_out += x.nbytes
        if "convolution" in str(func):  # oneDNN's copies of what goes in and comes out
            laid_out += sum(x.nbytes for x in args[:2])
            self.peak = max(self.peak, self.now + laid_out)
        self.peak = max(self.peak, self.now)
        return made


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that lived at once, beside what was there before."""
    counter = _Counter()
    with torch.no_grad(), counter:
        run()
    return counter.peak
