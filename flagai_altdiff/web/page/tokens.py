"""A prompt as the model reads it, as HTML."""

from __future__ import annotations

from html import escape

from flagai_altdiff.chunks import ROOM, chunks
from flagai_altdiff.mini.things.knowing import names_nothing, nearby
from flagai_altdiff.tokenizer import Tokenizer
from flagai_altdiff.web.page.texts import said

_LONGEST = 5000


def tokens_html(tokenizer: Tokenizer | None, prompt: str, syntax: str, language: str) -> str:
    """The pieces of a prompt, one mark for each, with what is cut.

    Args:
        tokenizer: The model's; without one there is nothing to show.
        prompt: As it was typed.
        syntax: One of ``SYNTAXES``.
        language: Of the page.
    """
    if tokenizer is None or not prompt.strip():
        return ""
    prompt = prompt[:_LONGEST]
    if syntax == "weighted":
        return "".join(
            _line([(piece, weight, False) for piece, weight in zip(chunk.pieces, chunk.weights, strict=True)], language)
            for chunk in chunks(tokenizer, prompt)
        )
    found = [prompt[first:end] for first, end in tokenizer.encode(prompt).spans]
    return _line([(piece, 1.0, place >= ROOM) for place, piece in enumerate(found)], language)


def unknown_html(model: str, prompt: str, language: str) -> str:
    """That a prompt names nothing which the embedded model knows, with names near it; else nothing."""
    prompt = prompt[:_LONGEST]
    if not prompt.strip() or not names_nothing(prompt):
        return ""
    near = "; ".join(nearby(prompt))
    more = said("names_near", language, names=near) if near else ""
    return f'<p class="tokens" dir="auto"><small>{escape(said("unknown", language, model=model) + more)}</small></p>'


def _line(pieces: list[tuple[str, float, bool]], language: str) -> str:
    kept = sum(not is_cut for _, _, is_cut in pieces)
    marks = "".join(_mark(*piece, language) for piece in pieces)
    counted = said("chunk", language, count=kept, room=ROOM)
    return f'<p class="tokens" dir="auto">{marks}<small><bdi>{counted}</bdi></small></p>'


def _mark(piece: str, weight: float, is_cut: bool, language: str) -> str:
    text = escape(piece.strip() or "␣")
    if is_cut:
        return f'<del title="{said("cut", language)}">{text}</del>'
    return f'<mark title="{weight:.2f}">{text}</mark>' if weight != 1.0 else f"<span>{text}</span>"
