"""Texts that say the same in several languages, for a student that learns from an English teacher."""

from __future__ import annotations

from collections.abc import Sequence

from flagai_altdiff.errors import BrokenExampleError
from flagai_altdiff.training.data.example import Example, Examples, Layout, Tally

ENGLISH = "en"
NO_ENGLISH = "no English text, which the teacher reads"


class WithEnglish:
    """Examples of which each must have an English text.

    Args:
        examples: With texts in several languages each; images are not looked at.
    """

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    @property
    def layout(self) -> Layout:
        """As of the examples; likewise ``keys`` and ``left_out``."""
        return self._examples.layout

    @property
    def keys(self) -> Sequence[str]:
        """See ``layout``."""
        return self._examples.keys

    @property
    def left_out(self) -> Tally:
        """See ``layout``."""
        return self._examples.left_out

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        """One of them; broken without an English text."""
        example = self._examples[index]
        if english([(caption.text, caption.language) for caption in example.captions]) is None:
            raise BrokenExampleError(example.key, NO_ENGLISH)
        return example


def english(captions: Sequence[tuple[str, str | None]]) -> str | None:
    """The first English text among pairs of text and language."""
    return next((text for text, language in captions if (language or "").split("-")[0] == ENGLISH), None)
