"""How a prompt with weights is read: 75 tokens at a time. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flagai_altdiff.prompt_syntax import Part, mean_weight, parse
from flagai_altdiff.tokenizer import MAX_TOKENS, Tokenizer
from flagai_altdiff.tokenizer.files import BOS, EOS, PAD

ROOM = MAX_TOKENS - 2
"""Tokens that a chunk has for a prompt."""
_COMMAS, _SEARCHED = frozenset(",，、،"), 20
"""A chunk that is full ends at a comma, if one is among its last tokens."""


@dataclass(frozen=True)
class Chunk:
    """What the text encoder reads at once of a prompt with weights.

    Args:
        pieces: The text of each token.
        ids: Their ids, without ``<s>`` and ``</s>``; at most 75.
        weights: Their weights.
    """

    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def row(self) -> list[int]:
        """The ids as the text encoder takes them, 77 of them."""
        return [BOS, *self.ids, EOS, *[PAD] * (ROOM - len(self.ids))]


def chunks(tokenizer: Tokenizer, prompt: str) -> list[Chunk]:
    """How a prompt with weights is read: 75 tokens at a time, a new chunk at each ``BREAK``.

    Args:
        tokenizer: The model's.
        prompt: As people write it; see :mod:`flagai_altdiff.prompt_syntax`.
    """
    parts = parse(prompt)
    said = [part for part in parts if part.text.strip()] or parts[:1]
    return [chunk for part in said for chunk in _chunks_of(tokenizer, part)]


def _chunks_of(tokenizer: Tokenizer, part: Part) -> Iterator[Chunk]:
    found = tokenizer.encode(part.text)
    tokens = [
        (part.text[first:end], i, mean_weight(part, first, end))
        for i, (first, end) in zip(found.ids, found.spans, strict=True)
    ]
    first = 0
    while len(tokens) - first > ROOM:
        commas = [k for k in range(first + ROOM - _SEARCHED, first + ROOM) if _COMMAS & set(tokens[k][0])]
        end = commas[-1] + 1 if commas else first + ROOM
        yield _chunk(tokens[first:end])
        first = end
    yield _chunk(tokens[first:])


def _chunk(tokens: Sequence[tuple[str, int, float]]) -> Chunk:
    pieces, ids, weights = zip(*tokens, strict=True) if tokens else ((), (), ())
    return Chunk(pieces, ids, weights)
