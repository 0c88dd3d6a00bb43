"""Texts as token ids, before there is a model; in training split in other ways too, so that all pieces are learnt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from flagai_altdiff.tokenizer import MAX_TOKENS, load_tokenizer
from flagai_altdiff.tokenizer.files import BOS, EOS, PAD, UNK

_OTHERWISE, _WAYS = 0.3, 12
"""Share of the texts that are split in another way than the likeliest, and how many ways there are."""


class CaptionTokenizer:
    """The tokenizer of the models to be.

    Args:
        path: ``sentencepiece.bpe.model``.
    """

    def __init__(self, path: Path) -> None:
        self.tokenizer = load_tokenizer(path)
        self._pieces = SentencePieceProcessor(model_file=str(path))

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids of texts, (B, 77) int64."""
        return torch.tensor(self.tokenizer.ids(texts))

    def varied(self, texts: Sequence[str], rng: random.Random) -> Tensor:
        """The same, but some of the texts are split less usually."""
        rows = self.tokenizer.ids(texts)
        for number, text in enumerate(texts):
            if text and rng.random() < _OTHERWISE:
                way = rng.choice(self._pieces.nbest_encode(text, nbest_size=_WAYS))
                ids = [BOS, *(piece + 1 if piece else UNK for piece in way[: MAX_TOKENS - 2]), EOS]
                rows[number] = ids + [PAD] * (MAX_TOKENS - len(ids))
        return torch.tensor(rows)
