"""The tokenizer of AltDiffusion-mini: a Unigram list made from the captions' words, as a SentencePiece file.

The list is written, not learnt: a learnt one of this size breaks common words into letters and takes whole Chinese
phrases as one piece. Words of the captions are one piece each; every other text is spelled with single letters.
Capitals are read as small letters.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceNormalizer, set_min_log_level
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

from flagai_altdiff.files import new_file
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.vocabulary import LANGUAGES, Language
from flagai_altdiff.mini.world import Scene, all_scenes

WORD_START = "▁"
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
UNSPACED = ("ja", "th", "zh")
PUNCTUATION = ".,،、，。।!?;:'\"()-"
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
LETTER_SCORE, WORD_START_SCORE = -18.0, -14.0


def build_tokenizer(path: Path) -> int:
    """Write ``sentencepiece.bpe.model``.

    Args:
        path: The file, replaced if it exists.

    Returns:
        Number of token ids of an XLM-R tokenizer with this file: the pieces, ``<pad>`` and ``<mask>``.
    """
    kinds = ModelProto.SentencePiece
    special = (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL))
    model = ModelProto(
        pieces=[
            *(kinds(piece=piece, score=0.0, type=kind) for piece, kind in special),
            *(kinds(piece=piece, score=score, type=kinds.NORMAL) for piece, score in in_small_letters(scored_pieces())),
        ]
    )
    model.trainer_spec.model_type = TrainerSpec.UNIGRAM
    model.trainer_spec.vocab_size = len(model.pieces)
    model.normalizer_spec.CopyFrom(case_folding_table())
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=True) as unfinished:
        unfinished.write_bytes(model.SerializeToString(deterministic=True))
    return len(model.pieces) + 2


@functools.cache
def case_folding_table() -> NormalizerSpec:
    """SentencePiece's own table for ``CASE_FOLDING``, and ``CAPITALS``."""
    set_min_log_level(2)  # it reports the sizes of its tables
    rules = dict(SentencePieceNormalizer(rule_name=CASE_FOLDING).decompile())
    table = SentencePieceNormalizer(norm_map=sorted((rules | CAPITALS).items())).serialized_normalizer_spec()
    return NormalizerSpec(name=CASE_FOLDING, precompiled_charsmap=NormalizerSpec.FromString(table).precompiled_charsmap)


def in_small_letters(pieces: list[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    """The pieces as normalised text has them; those that no such text has keep their places under other names."""
    normalise = SentencePieceNormalizer(rule_name=CASE_FOLDING).normalize
    names = [
        WORD_START * (piece[0] == WORD_START) + normalise(piece.removeprefix(WORD_START)).removeprefix(WORD_START)
        for piece, _ in pieces
    ]
    taken = {piece for (piece, _), name in zip(pieces, names, strict=True) if piece == name}
    for i, ((piece, score), name) in enumerate(zip(pieces, names, strict=True)):
        if piece != name and (not name or name in taken or WORD_START in name[1:]):
            name = f"<unused{i}>"
        taken.add(name)
        yield name, score


def scored_pieces() -> list[tuple[str, float]]:
    """Every piece with its log-probability: frequent words first, then the letters that spell all else."""
    counts = count_words()
    total = sum(counts.values())
    words = [(piece, math.log(count / total)) for piece, count in sorted(counts.items(), key=lambda x: (-x[1], x[0]))]
    known = {piece for piece, _ in words}
    letters = {chr(code) for first, last in LETTER_RANGES for code in range(first, last + 1)}
    letters |= {letter for piece in known for letter in piece}
    letters -= known | {WORD_START}
    return [*words, (WORD_START, WORD_START_SCORE), *((letter, LETTER_SCORE) for letter in sorted(letters))]


def count_words() -> Counter[str]:
    """How often each piece occurs in captions of all languages."""
    scenes = random.Random("vocabulary").sample(all_scenes(), 1200)
    counts: Counter[str] = Counter(dict.fromkeys(PUNCTUATION, 100))
    for code, language in LANGUAGES.items():
        if code in UNSPACED:
            for unit in units(language):
                counts.update({unit: 300, WORD_START + unit: 300})
        else:
            for text in spaced_captions(scenes, code):
                counts.update(WORD_START + word for word in text.split())
    return counts


def spaced_captions(scenes: Sequence[Scene], code: str) -> Iterator[str]:
    """Captions without punctuation, as they are and with a capital letter."""
    strip = str.maketrans("", "", PUNCTUATION)
    for scene in scenes:
        for pattern in range(len(LANGUAGES[code].patterns)):
            for with_background in (True, False):
                text = caption(scene, code, pattern=pattern, with_background=with_background).translate(strip)
                yield text
                yield text[0].upper() + text[1:]


def units(language: Language) -> set[str]:
    """Words of a language that is written without spaces: its vocabulary and what stands between the slots."""
    found = {*language.shapes, *language.colours, language.small, language.large, language.left, language.right}
    for pattern in (language.on, language.bare, language.noun_phrase, *language.patterns):
        for part in re.split(r"[\[\]]|\{\w+\}", pattern):
            found.update(word for word in part.split() if word not in PUNCTUATION)
    return found
