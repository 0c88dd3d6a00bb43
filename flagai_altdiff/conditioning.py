"""Prompts -> text states, and what of a prompt has no effect."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flagai_altdiff.engine import Engine
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.latent_diffusion import MAX_TOKENS
from flagai_altdiff.request import Note

_SHOWN_CHARACTERS = 200


def encode_prompts(model: LatentDiffusion, engine: Engine, prompts: Sequence[str]) -> Tensor:
    """Text states of prompts, each text encoded once and alone, so that none depends on its neighbours.

    Args:
        model: Has the tokenizer.
        engine: Has the text encoder.
        prompts: B texts; equal ones share their states.

    Returns:
        (B, 77, D).
    """
    states = {prompt: engine.encode_text(model.tokenize([prompt])) for prompt in dict.fromkeys(prompts)}
    return torch.cat([states[prompt] for prompt in prompts])


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
