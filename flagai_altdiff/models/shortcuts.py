"""What may be left out of a UNet's work, for a picture that is not the same: tokens, and inner maps that are known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

Inner = Callable[[int, Callable[[], Tensor]], Tensor]
"""(rows that are needed, what computes them) -> the map that comes out of a UNet's inner blocks, (rows, C, h, w)."""


def afresh(rows: int, compute: Callable[[], Tensor]) -> Tensor:
    """The map, computed."""
    return compute()


@dataclass(frozen=True)
class Shortcuts:
    """How one call of a UNet is made cheaper.

    Args:
        merged_tokens: Share of the tokens of the largest maps that self-attention merges.
        inner: Where the map of the inner blocks comes from.
    """

    merged_tokens: float = 0.0
    inner: Inner = afresh

    @property
    def arguments(self) -> tuple[Shortcuts, ...]:
        """Itself, unless nothing is left out: what scripts put in the place of a UNet knows nothing of shortcuts."""
        return () if self == NONE else (self,)


NONE = Shortcuts()
"""All of the work."""


class InnerMaps:
    """What the inner blocks of a UNet gave, kept for the next steps of one walk at one place.

    Timesteps are counted, not calls: a sampler may ask several times in a step.

    Args:
        interval: In one of so many timesteps the inner blocks are computed; 1 is always.

    **Source**: Ma et al. 2023, "DeepCache" (arXiv 2312.00858), with equal intervals.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._kept: dict[Hashable, tuple[int, tuple[int, ...], Tensor]] = {}
        self._t: float | None = None
        self._count = -1

    def turn_to(self, t: float) -> None:
        """Say which timestep the next calls are for."""
        if t != self._t:
            self._t, self._count = t, self._count + 1

    def of(self, group: Hashable, rows: Sequence[int]) -> Inner:
        """The maps of some rows of a batch.

        Args:
            group: Rows that are always computed together, or some of them.
            rows: Their numbers, in order.
        """
        if self._interval == 1:
            return afresh

        def inner(count: int, compute: Callable[[], Tensor]) -> Tensor:
            known = self._known(group, rows, count // len(rows))
            if known is None:
                known = compute()
                self._kept[group] = (self._count // self._interval, tuple(rows), known)
            return known

        return inner

    def _known(self, group: Hashable, rows: Sequence[int], sides: int) -> Tensor | None:
        """A map of this stretch of timesteps; of both sides of guidance, the second is that of the prompts."""
        stretch, known_rows, known = self._kept.get(group, (-1, (), None))
        if known is None or stretch != self._count // self._interval or not set(rows) <= set(known_rows):
            return None
        by_side = known.view(-1, len(known_rows), *known.shape[1:])
        if len(by_side) < sides:
            return None
        if (len(by_side), known_rows) == (sides, tuple(rows)):
            return known
        return by_side[-sides:, [known_rows.index(row) for row in rows]].flatten(0, 1)
