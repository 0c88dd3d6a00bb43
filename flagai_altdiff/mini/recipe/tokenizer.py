"""The tokenizer of AltDiffusion-mini: a Unigram model that SentencePiece's trainer makes from phrases in 18 languages.

Frequent names are one piece each; other words are put together from pieces that names share. Capitals are read as small
letters.
"""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceNormalizer, SentencePieceTrainer, set_min_log_level
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec

from flagai_altdiff.files import new_file
from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.composing import random_scene
from flagai_altdiff.mini.things.phrases import random_phrase
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import draw_scenes, training_scenes

CASE_FOLDING = "nmt_nfkc_cf"
"""SentencePiece's name for NFKC with small letters."""
CAPITALS = {
    "İ": "i",
    "I\u0307": "i",
    "i\u0307": "i",  # what Python's lower() makes of İ
    "KIRMIZI": "kırmızı",
    "SARI": "sarı",
    "YILDIZ": "yıldız",
    "GROSS": "groß",
    "WEISS": "weiß",
}
"""Capitals whose small letters depend on the language (Turkish) or on the word (German), for the captions' words."""
LETTER_RANGES = (
    (0x21, 0x7E),  # ASCII
    (0xA1, 0x17F),  # Latin-1, Latin Extended-A
    (0x1A0, 0x1B4),  # Vietnamese o and u with horn
    (0x300, 0x323),  # combining accents
    (0x400, 0x45F),  # Cyrillic
    (0x490, 0x491),  # Ukrainian ghe
    (0x61F, 0x652),  # Arabic
    (0x900, 0x96F),  # Devanagari
    (0xE01, 0xE59),  # Thai
    (0x1EA0, 0x1EF9),  # Vietnamese
    (0x3001, 0x3002),  # ideographic comma and full stop
    (0x3041, 0x3096),  # hiragana
    (0x30A1, 0x30FC),  # katakana
)
_PIECES = 16_000
_LONGEST_PIECE = 16
_TIMES_NAMED, _SHAPES = 4, 300
"""How often each name, and how many captions of drawn shapes, the trainer reads in each language."""


def build_tokenizer(path: Path, things: Sequence[Thing]) -> int:
    """Write ``sentencepiece.bpe.model``.

    Args:
        path: The file, replaced if it exists.
        things: Whose names it should know.

    Returns:
        Number of token ids of an XLM-R tokenizer with this file: the pieces, ``<pad>`` and ``<mask>``.
    """
    set_min_log_level(2)  # it reports the sizes of its tables
    normalise = SentencePieceNormalizer(norm_map=_small_letters()).normalize
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(normalise(text) for text in _texts(things)),
        model_writer=trained,
        vocab_size=_PIECES,
        hard_vocab_limit=False,
        max_sentencepiece_length=_LONGEST_PIECE,
        character_coverage=1.0,
        required_chars="".join(chr(code) for first, last in LETTER_RANGES for code in range(first, last + 1)),
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    model = ModelProto.FromString(trained.getvalue())
    model.normalizer_spec.CopyFrom(case_folding_table())
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=True) as unfinished:
        unfinished.write_bytes(model.SerializeToString(deterministic=True))
    return len(model.pieces) + 2


def _texts(things: Sequence[Thing]) -> Iterator[str]:
    """Names, words and phrases in all languages."""
    rng = random.Random("vocabulary")
    shapes = draw_scenes(training_scenes(), _SHAPES, rng)
    for language in LANGUAGES:
        for thing in things:
            yield from (thing.names[language],) * _TIMES_NAMED
            yield from thing.words[language]
            yield random_phrase(random_scene(thing.code, rng), thing, language, rng)
        yield from (random_caption(scene, language, rng) for scene in shapes)


@functools.cache
def case_folding_table() -> NormalizerSpec:
    """SentencePiece's own table for ``CASE_FOLDING``, and ``CAPITALS``."""
    table = SentencePieceNormalizer(norm_map=_small_letters()).serialized_normalizer_spec()
    return NormalizerSpec(name=CASE_FOLDING, precompiled_charsmap=NormalizerSpec.FromString(table).precompiled_charsmap)


def _small_letters() -> list[tuple[str, str]]:
    rules = dict(SentencePieceNormalizer(rule_name=CASE_FOLDING).decompile())
    return sorted((rules | CAPITALS).items())
