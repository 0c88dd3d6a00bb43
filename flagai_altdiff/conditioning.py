"""Prompts -> text states, and what of a prompt has no effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flagai_altdiff.chunks import Chunk, chunks
from flagai_altdiff.engine import Engine
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.request import Note
from flagai_altdiff.tokenizer import MAX_TOKENS

_SHOWN_CHARACTERS = 200


def encode_prompts(
    model: LatentDiffusion, engine: Engine, prompts: Sequence[str], syntax: str = "plain"
) -> list[Tensor]:
    """Text states of prompts, each text encoded once and alone, so that none depends on its neighbours.

    Args:
        model: Has the tokenizer.
        engine: Has the text encoder.
        prompts: B texts; equal ones share their states.
        syntax: One of ``prompt_syntax.SYNTAXES``.

    Returns:
        For each prompt (77, D); (n * 77, D) where a weighted one takes n chunks.

    Raises:
        InvalidRequestError: Weights need the tokenizer that comes with a model's files, and it has none.
    """
    different = dict.fromkeys(prompts)
    if syntax == "plain":
        states = {prompt: engine.encode_text(model.tokenize([prompt]))[0] for prompt in different}
    elif model.text_tokenizer is None:
        raise InvalidRequestError(
            "prompt_syntax", syntax, "the model has no tokenizer of its own; load it from its folder"
        )
    else:
        states = {prompt: _weighted(engine, chunks(model.text_tokenizer, prompt)) for prompt in different}
    return [states[prompt] for prompt in prompts]


def same_length(states: Tensor, others: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Two sides of guidance with as many chunks each: (L, D), (L', D) -> both with the larger L.

    Args:
        states: Of one side.
        others: Of the other side.
        empty: (77, D), of no text, with which the shorter one goes on.
    """
    wanted = max(len(states), len(others))
    first, second = (torch.cat([side, *[empty] * ((wanted - len(side)) // len(empty))]) for side in (states, others))
    return first, second


def _weighted(engine: Engine, read: Sequence[Chunk]) -> Tensor:
    """States of chunks times their weights, brought back to their mean (as A1111 does it); (n * 77, D)."""
    device = engine.device
    found = []
    for chunk in read:
        states = engine.encode_text(torch.tensor([chunk.row], device=device))
        if any(weight != 1 for weight in chunk.weights):
            weights = torch.ones(MAX_TOKENS, device=device)
            weights[1 : 1 + len(chunk.weights)] = torch.tensor(chunk.weights, device=device)
            stronger = states * weights[None, :, None]
            states = stronger * (states.mean() / stronger.mean())
        found.append(states[0])
    return torch.cat(found)


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
