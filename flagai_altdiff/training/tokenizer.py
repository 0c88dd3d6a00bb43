"""The tokenizer of AltDiffusion-mini: a Unigram list made from the captions' words, as a SentencePiece file.

The list is written, not learnt: a learnt one of this size breaks common words into letters and takes whole Chinese phrases
as one piece. Words of the captions are one piece each; every other text is spelled with single letters.
"""

from __future__ import annotations

import math
import os
import random
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flagai_altdiff.scenes.captions import caption
from flagai_altdiff.scenes.vocabulary import LANGUAGES, Language
from flagai_altdiff.scenes.world import Scene, all_scenes

WORD_START = "▁"
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
# Numbers of SentencePiece's file format (sentencepiece_model.proto).
UNIGRAM = 1
NORMAL, UNKNOWN, CONTROL = 1, 2, 3

LETTER_SCORE, WORD_START_SCORE = -18.0, -14.0


def build_tokenizer(path: Path) -> int:
    """Write ``sentencepiece.bpe.model``.

    Args:
        path: The file, replaced if it exists.

    Returns:
        Number of token ids of an XLM-R tokenizer with this file: the pieces, ``<pad>`` and ``<mask>``.
    """
    special = (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL))
    pieces = [encode_piece(piece, 0.0, kind) for piece, kind in special]
    pieces += [encode_piece(piece, score, NORMAL) for piece, score in scored_pieces()]
    trainer_spec = encode_number(3, UNIGRAM) + encode_number(4, len(pieces))
    normalizer_spec = encode_bytes(1, b"identity")
    data = b"".join((*pieces, encode_bytes(2, trainer_spec), encode_bytes(3, normalizer_spec)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(data)
    os.replace(temporary, path)
    return len(pieces) + 2


def encode_piece(piece: str, score: float, kind: int) -> bytes:
    """One entry of the list: text, log-probability and kind."""
    body = encode_bytes(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + encode_number(3, kind)
    return encode_bytes(1, body)


def encode_bytes(field: int, data: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return bytes([field << 3 | 2]) + encode_varint(len(data)) + data


def encode_number(field: int, value: int) -> bytes:
    """An integer field of a protocol buffer."""
    return bytes([field << 3]) + encode_varint(value)


def encode_varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have their top bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


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


def spaced_captions(scenes: list[Scene], code: str) -> Iterator[str]:
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
