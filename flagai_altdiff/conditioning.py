"""Prompts -> text states, and what of a prompt has no effect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flagai_altdiff.engine import Engine
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.latent_diffusion import MAX_TOKENS
from flagai_altdiff.prompt_syntax import Part, mean_weight, parse
from flagai_altdiff.request import Note
from flagai_altdiff.tokenizer import Tokenizer
from flagai_altdiff.tokenizer.files import BOS, EOS, PAD

_SHOWN_CHARACTERS = 200
_ROOM = MAX_TOKENS - 2
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
        return [BOS, *self.ids, EOS, *[PAD] * (_ROOM - len(self.ids))]


def encode_prompts(model: LatentDiffusion, engine: Engine, prompts: Sequence[str], syntax: str = "plain") -> Tensor:
    """Text states of prompts, each text encoded once and alone, so that none depends on its neighbours.

    Args:
        model: Has the tokenizer.
        engine: Has the text encoder.
        prompts: B texts; equal ones share their states.
        syntax: One of ``prompt_syntax.SYNTAXES``.

    Returns:
        (B, 77, D); (B, n * 77, D) where a weighted prompt takes n chunks, shorter ones with empty chunks at their end.
    """
    if syntax == "plain":
        states = {prompt: engine.encode_text(model.tokenize([prompt])) for prompt in dict.fromkeys(prompts)}
        return torch.cat([states[prompt] for prompt in prompts])
    assert model.text_tokenizer is not None, "load the model from its folder, which has a tokenizer"
    read = {prompt: chunks(model.text_tokenizer, prompt) for prompt in dict.fromkeys(prompts)}
    longest = max(map(len, read.values()))
    states = {prompt: _weighted(engine, found, longest) for prompt, found in read.items()}
    return torch.cat([states[prompt] for prompt in prompts])


def same_length(states: Tensor, others: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Two sides of guidance with as many chunks each: (B, L, D), (B, L', D) -> both with the larger L.

    Args:
        states: Of one side.
        others: Of the other side.
        empty: (1, 77, D), of no text, with which the shorter one goes on.
    """
    wanted = max(states.shape[1], others.shape[1])

    def longer(side: Tensor) -> Tensor:
        missing = (wanted - side.shape[1]) // empty.shape[1]
        return torch.cat([side, *[empty.expand(len(side), -1, -1)] * missing], dim=1)

    return longer(states), longer(others)


def chunks(tokenizer: Tokenizer, prompt: str) -> list[Chunk]:
    """How a prompt with weights is read: 75 tokens at a time, a new chunk at each ``BREAK``.

    Args:
        tokenizer: The model's.
        prompt: As people write it; see :mod:`flagai_altdiff.prompt_syntax`.
    """
    return [chunk for part in parse(prompt) for chunk in _chunks_of(tokenizer, part)]


def _chunks_of(tokenizer: Tokenizer, part: Part) -> Iterator[Chunk]:
    found = tokenizer.encode(part.text)
    tokens = [
        (part.text[first:end], i, mean_weight(part, first, end))
        for i, (first, end) in zip(found.ids, found.spans, strict=True)
    ]
    while len(tokens) > _ROOM:
        commas = [k for k in range(_ROOM - _SEARCHED, _ROOM) if _COMMAS & set(tokens[k][0])]
        end = commas[-1] + 1 if commas else _ROOM
        yield _chunk(tokens[:end])
        tokens = tokens[end:]
    yield _chunk(tokens)


def _chunk(tokens: Sequence[tuple[str, int, float]]) -> Chunk:
    pieces, ids, weights = zip(*tokens, strict=True) if tokens else ((), (), ())
    return Chunk(pieces, ids, weights)


def _weighted(engine: Engine, read: Sequence[Chunk], count: int) -> Tensor:
    """States of chunks times their weights, brought back to their mean (as A1111 does it); (1, count * 77, D)."""
    empty = [_chunk(())] * (count - len(read))
    device = engine.device
    found = []
    for chunk in (*read, *empty):
        states = engine.encode_text(torch.tensor([chunk.row], device=device))
        if any(weight != 1 for weight in chunk.weights):
            weights = torch.ones(MAX_TOKENS, device=device)
            weights[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device=device)
            stronger = states * weights[None, :, None]
            states = stronger * (states.mean() / stronger.mean())
        found.append(states)
    return torch.cat(found, dim=1)


def cut_prompts(model: LatentDiffusion, prompts: Iterable[str]) -> list[Note]:
    """A note for each prompt that does not fit into 77 tokens, with the text that is lost."""
    notes = []
    for prompt in dict.fromkeys(prompts):
        lost = model.text_tokenizer.lost_text(prompt, MAX_TOKENS) if model.text_tokenizer else ""
        if lost:
            n = _SHOWN_CHARACTERS
            shown = repr(lost) if len(lost) <= 2 * n else f"{lost[:n]!r} … {lost[-n:]!r}"
            text = f"the prompt is cut at {MAX_TOKENS} tokens; its last {len(lost)} characters have no effect: {shown}"
            notes.append(Note("cut prompt", text))
    return notes
