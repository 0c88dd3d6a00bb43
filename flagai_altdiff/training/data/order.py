"""In which order an epoch takes the examples: computed for any position, stored nowhere, the same on every machine."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import struct
from dataclasses import dataclass

from flagai_altdiff.training.data.example import Layout

_ROUNDS = 8
_64 = (1 << 64) - 1


class Order:
    """A new order of all examples in each epoch.

    Examples that lie together are taken at about the same time: an epoch deals the parts (shards, groups of rows) out
    to lanes by chance; each lane goes through its parts one after another, in random order within each. Position p
    belongs to lane p modulo the number of lanes, until the first lane is at its end. So a process that takes every n-th
    position reads only its own lanes where n divides their number, and what stands where does not depend on n.

    Args:
        layout: Of the examples, or how many there are if they lie no way in particular.
        seed: The run's.
    """

    def __init__(self, layout: Layout | int, seed: int) -> None:
        self.layout = Layout((layout,)) if isinstance(layout, int) else layout
        self.seed = seed
        self.count = sum(self.layout.parts)
        self._starts = [0, *itertools.accumulate(self.layout.parts)]
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return self.count

    def index(self, epoch: int, position: int) -> int:
        """The number of the example at a position of an epoch."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} of {self.count}")
        if epoch not in self._epochs:
            kept = {known: plan for known, plan in self._epochs.items() if known == epoch - 1}
            self._epochs = {**kept, epoch: self._dealt(epoch)}
        part, place = self._epochs[epoch].find(position)
        return self._starts[part] + _shuffled(place, self.layout.parts[part], _keys(self.seed, epoch, part))

    def _dealt(self, epoch: int) -> _Epoch:
        full = [number for number, size in enumerate(self.layout.parts) if size]
        keys = _keys(self.seed, epoch, -1)
        dealt = [full[_shuffled(i, len(full), keys)] for i in range(len(full))]
        lanes = max(1, min(self.layout.lanes, len(full)))
        return _Epoch(tuple(_Lane.of(dealt[i::lanes], self.layout.parts) for i in range(lanes)))


@dataclass(frozen=True)
class _Lane:
    """Parts one after another, and where each ends."""

    parts: tuple[int, ...]
    ends: tuple[int, ...]

    @classmethod
    def of(cls, parts: list[int], sizes: tuple[int, ...]) -> _Lane:
        return cls(tuple(parts), tuple(itertools.accumulate(sizes[part] for part in parts)))

    def find(self, step: int) -> tuple[int, int]:
        """Part, and place in it."""
        i = bisect.bisect_right(self.ends, step)
        return self.parts[i], step - (self.ends[i - 1] if i else 0)


class _Epoch:
    """Lanes that take turns; one that is at its end has no turn any more."""

    def __init__(self, lanes: tuple[_Lane, ...]) -> None:
        self._lanes = lanes
        lengths = sorted({lane.ends[-1] for lane in lanes if lane.ends})
        self._stretches = [0]
        """The position at which each stretch of equal turns begins, and for each the first step and the lanes in it."""
        self._turns: list[tuple[int, list[_Lane]]] = []
        for first, last in itertools.pairwise([0, *lengths]):
            running = [lane for lane in lanes if lane.ends[-1] > first]
            self._turns.append((first, running))
            self._stretches.append(self._stretches[-1] + (last - first) * len(running))

    def find(self, position: int) -> tuple[int, int]:
        """Part, and place in it."""
        i = bisect.bisect_right(self._stretches, position) - 1
        first, running = self._turns[i]
        turn, lane = divmod(position - self._stretches[i], len(running))
        return running[lane].find(first + turn)


@functools.lru_cache(maxsize=4096)
def _keys(seed: int, epoch: int, part: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr((seed, "order", epoch, part)).encode(), digest_size=8 * _ROUNDS).digest()
    return struct.unpack(f"<{_ROUNDS}Q", digest)


def _shuffled(value: int, count: int, keys: tuple[int, ...]) -> int:
    """Where a permutation of ``range(count)``, chosen by the keys, puts a value.

    A Feistel network permutes the smallest square of a power of two that is large enough; what falls outside of the
    range goes round again until it is inside, which keeps it a permutation.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = value >> half, value & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        value = left << half | right
        if value < count:
            return value


def _mixed(value: int) -> int:
    """Every bit of the result depends on every bit of the value (the finish of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _64
    return value ^ value >> 31
