"""The trained tokenizer: names are short, nothing is unknown, every reader gives the same ids."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor

from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import all_scenes
from flagai_altdiff.models.latent_diffusion import MAX_TOKENS
from flagai_altdiff.models.text_encoder import PAD_ID
from flagai_altdiff.tokenizer import load_tokenizer

UNKNOWN_ID = 3
ODD_TEXTS = ["", "   ", "A photo of a 猫, please!", "star,star", "double  space", "𓀀 ½ ١٢ ſ", "x" * 300]


def captions(count: int) -> dict[str, list[str]]:
    rng = random.Random(0)
    return {code: [random_caption(rng.choice(all_scenes()), code, rng) for _ in range(count)] for code in LANGUAGES}


def sentencepiece_ids(tokenizer_file: Path, texts: list[str]) -> list[list[int]]:
    """XLM-R's ids by the SentencePiece library: its own numbers shifted by one, between <s> and </s>, padded to 77."""
    pieces = SentencePieceProcessor(model_file=str(tokenizer_file))
    rows = [[0, *(p + 1 if p else UNKNOWN_ID for p in pieces.encode(text)[: MAX_TOKENS - 2]), 2] for text in texts]
    return [row + [PAD_ID] * (MAX_TOKENS - len(row)) for row in rows]


def test_captions_have_no_unknown_words_and_are_short(tokenizer_file: Path, things: tuple[Thing, ...]) -> None:
    tokenize = CaptionTokenizer(tokenizer_file)
    for code, texts in captions(30).items():
        ids = tokenize([*texts, *(word for thing in things for word in (thing.names[code], *thing.unseen_words[code]))])
        assert not (ids == UNKNOWN_ID).any(), code
        assert int((ids != PAD_ID).sum(dim=1).max()) <= 40, code


def test_some_texts_are_split_otherwise_in_training(tokenizer_file: Path) -> None:
    """All ways give the text back, and each step's are the same again."""
    tokenize = CaptionTokenizer(tokenizer_file)
    pieces = SentencePieceProcessor(model_file=str(tokenizer_file))
    texts = ["a red star on a blue background", "cat en, small"] * 60
    usual, varied = tokenize(texts).tolist(), tokenize.varied(texts, random.Random(1)).tolist()
    assert varied == tokenize.varied(texts, random.Random(1)).tolist()
    assert 0.1 < sum(a != b for a, b in zip(usual, varied, strict=True)) / len(texts) < 0.4
    for text, row in zip(texts, varied, strict=True):
        assert len(row) == MAX_TOKENS and row[0] == 0
        assert pieces.decode([i - 1 for i in row if i > UNKNOWN_ID]) == text
    assert tokenize.varied([""], random.Random(1)).tolist() == tokenize([""]).tolist()


def test_all_readers_give_the_same_ids(tokenizer_file: Path, tmp_path: Path) -> None:
    load_tokenizer(tokenizer_file).to_transformers().save_pretrained(tmp_path)
    texts = [text for group in captions(10).values() for text in group] + ODD_TEXTS
    expected = sentencepiece_ids(tokenizer_file, texts)
    for path in (tokenizer_file, tmp_path / "tokenizer.json"):
        assert load_tokenizer(path).ids(texts) == expected


def test_the_number_of_ids_is_told(tokenizer_file: Path, things: tuple[Thing, ...], tmp_path: Path) -> None:
    count = build_tokenizer(tmp_path / "again.model", things)
    assert count == CaptionTokenizer(tokenizer_file).vocab_size == len(load_tokenizer(tokenizer_file))
    assert (tmp_path / "again.model").read_bytes() == tokenizer_file.read_bytes()


def test_capitals_are_read_as_small_letters(tokenizer_file: Path) -> None:
    tokenize = CaptionTokenizer(tokenizer_file)
    texts = captions(20)
    for code in ("en", "es", "fr", "it", "pl", "pt", "ru", "uk", "vi"):
        assert torch.equal(
            tokenize([text.upper() for text in texts[code]]), tokenize([text.lower() for text in texts[code]])
        ), code
    assert torch.equal(tokenize(["ein rotes herz"]), tokenize(["Ein rotes Herz"]))
