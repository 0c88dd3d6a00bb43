"""A few images of one thing, beside images of what the model knew before.

**Source**: Ruiz et al. 2023 (arXiv 2208.12242) for the preservation of a prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flagai_altdiff.training.data.example import Example, Examples, Layout, Tally

PREFIX = "prior/"
"""What the keys of such examples begin with."""


class WithPrior:
    """Both in equal parts; of the fewer ones, some come several times in an epoch.

    Args:
        thing: What is to be learnt.
        prior: What is to be kept.
    """

    def __init__(self, thing: Examples, prior: Examples) -> None:
        self._thing, self._prior = thing, prior

    @property
    def layout(self) -> Layout:
        """They lie no way in particular."""
        return Layout((len(self),))

    @property
    def keys(self) -> Sequence[str]:
        """The name of each."""
        return [self._key(i) for i in range(len(self))]

    @property
    def left_out(self) -> Tally:
        """Of both."""
        tally = Tally()
        tally.update([self._thing.left_out, self._prior.left_out])
        return tally

    def __len__(self) -> int:
        return 2 * max(len(self._thing), len(self._prior))

    def __getitem__(self, index: int) -> Example:
        """One of either."""
        if index % 2:
            return replace(self._prior[index // 2 % len(self._prior)], key=self._key(index))
        return replace(self._thing[index // 2 % len(self._thing)], key=self._key(index))

    def _key(self, index: int) -> str:
        if index % 2:
            return f"{PREFIX}{self._prior.keys[index // 2 % len(self._prior)]}#{index}"
        return f"{self._thing.keys[index // 2 % len(self._thing)]}#{index}"
