"""Files of a tokenizer: where they lie, and what SentencePiece may read of them."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import CheckpointError, shown
from flagai_altdiff.model_files import TOKENIZER_FILES, is_hidden
from flagai_altdiff.plain_data import parse_json, read_capped

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's order, in which the released embeddings have them."""
BOS, PAD, EOS, UNK = range(4)
OWN_SPECIAL = ("<unk>", "<s>", "</s>")
"""SentencePiece's order."""
_XLM_R = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"
"""SHA-256 of the sentencepiece.bpe.model that XLM-R was released with: it needs no look."""
_MAX_MODEL_BYTES, _MAX_JSON_BYTES, _MAX_BESIDE_BYTES = 16 << 20, 48 << 20, 4 << 20
"""XLM-R's have 5 MB, 9 to 22 MB, and some hundred bytes."""
_MAX_PIECES = 300_000
MAX_PIECE = 128
"""Characters of a piece, or of an added token; the longest of XLM-R has 16. The time of a text grows with it."""
_MAX_ADDED = 1_000
_MAX_TABLE_BYTES = 1 << 20
_MAX_TABLE_KEY = _MAX_TABLE_VALUE = 64
"""Bytes that a normaliser takes for one sign, and that it makes of one; in SentencePiece's tables 12 and 33."""
_MAX_STEPS = 16
WIDE_TILDE, PRIVATE = "\uff5e", "\U0010fffd"
_HARMLESS_STEPS = (
    {"type": "NFC"},
    {"type": "NFKC"},
    *({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": blank} for blank in (" ", "\u2581")),
    {"type": "Replace", "pattern": {"String": WIDE_TILDE}, "content": PRIVATE},
    {"type": "Replace", "pattern": {"String": PRIVATE}, "content": WIDE_TILDE},
)
"""Steps of a normaliser that SentencePiece takes anyway, or that our own twin of a tokenizer has."""


def own_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a model's folder or in its ``tokenizer/``; ``None`` if there is none."""
    places = (place / name for place in (folder, folder / "tokenizer") for name in TOKENIZER_FILES)
    return next((path for path in places if path.is_file() and path.stat().st_size), None)


def neighbour_tokenizers(folder: Path) -> Iterator[Path]:
    """Tokenizer files in the folders beside a model's: FlagAI lets models share one."""
    folder = folder.resolve()
    with suppress(OSError):
        for sibling in sorted(folder.parent.iterdir()):
            with suppress(OSError):  # what may not be looked at is no neighbour
                if is_hidden(sibling.name) or not sibling.is_dir() or sibling == folder:
                    continue
                if (path := own_tokenizer(sibling)) is not None:
                    yield path


def files_beside(path: Path) -> tuple[Path, Path]:
    """Where further tokens may be named: ``added_tokens.json`` and ``tokenizer_config.json``."""
    return path.with_name("added_tokens.json"), path.with_name("tokenizer_config.json")


def read_model(path: Path) -> tuple[bytes, dict[str, int]]:
    """What SentencePiece reads, and the added tokens that a ``tokenizer.json`` names."""
    if path.suffix == ".json":
        return _from_json(parse_json(read_capped(path, _MAX_JSON_BYTES)))
    data = read_capped(path, _MAX_MODEL_BYTES)
    return data if hashlib.sha256(data).hexdigest() == _XLM_R else _from_sentencepiece(data), {}


def tokens_beside(path: Path) -> dict[str, int]:
    """Tokens that ``added_tokens.json`` or ``tokenizer_config.json`` name."""
    named: dict[str, int] = {}
    added, settings = files_beside(path)
    with suppress(OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):  # it says little else
        decoder = parse_json(read_capped(settings, _MAX_BESIDE_BYTES))["added_tokens_decoder"]
        named = _checked([(token["content"], int(i)) for i, token in decoder.items()])
    if not added.is_file():
        return named
    try:
        tokens = _checked(list(parse_json(read_capped(added, _MAX_BESIDE_BYTES)).items()))
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{added} is not a list of added tokens: expected {{token: id, ...}}.") from error
    return joined(path, named, tokens)


def joined(path: Path, named: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
    """The added tokens of two files, which must not contradict each other."""
    for token in named.keys() & others.keys():
        if named[token] != others[token]:
            raise CheckpointError(
                f"{path.parent}: the added token {shown(token)} has the id {named[token]} in one file and "
                f"{others[token]} in another. Mend or remove added_tokens.json or tokenizer_config.json."
            )
    return {**named, **others}


def _checked(tokens: Sequence[tuple[Any, Any]]) -> dict[str, int]:
    """Added tokens as they should be.

    Raises:
        ValueError: They are not.
    """
    if len(tokens) > _MAX_ADDED:
        raise ValueError(f"it has more than {_MAX_ADDED:,} added tokens")
    for token, i in tokens:
        if not isinstance(token, str) or not 0 < len(token) <= MAX_PIECE or type(i) is not int or i < 0:
            raise ValueError(f"it has an added token {shown(token)} with the id {shown(i)}")
    named = dict(tokens)
    if len(named) != len(set(tokens)):
        raise ValueError("it has an added token with two ids")
    return named


def _from_sentencepiece(data: bytes) -> bytes:
    """A ``sentencepiece.bpe.model`` with nothing in it but what XLM-R's has."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

    file = ModelProto.FromString(data)
    if file.trainer_spec.model_type != TrainerSpec.UNIGRAM or file.trainer_spec.byte_fallback:
        kind = TrainerSpec.ModelType.Name(file.trainer_spec.model_type)
        raise ValueError(f"it is a {kind} model, expected UNIGRAM without bytes")
    model = ModelProto(pieces=file.pieces)
    for name in ("name", "precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        if file.normalizer_spec.HasField(name):
            setattr(model.normalizer_spec, name, getattr(file.normalizer_spec, name))
    return _serialized(model)


def _from_json(file: Any) -> tuple[bytes, dict[str, int]]:
    """SentencePiece's model of the pieces and the normaliser in a ``tokenizer.json``, and its added tokens."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    part = file.get("model") if isinstance(file, dict) else None
    if not isinstance(part, dict) or not isinstance(vocabulary := part.get("vocab"), list | dict):
        raise ValueError("it has no model with a vocabulary")
    if part.get("type", "Unigram") != "Unigram" or part.get("byte_fallback"):
        raise ValueError(f"it is a {shown(part.get('type'))} model, expected Unigram without bytes")
    if not isinstance(vocabulary, list) or not all(map(_is_piece, vocabulary)):
        raise ValueError("its vocabulary is no list of pieces with scores")
    if tuple(token for token, _ in vocabulary[:4]) != SPECIAL or part.get("unk_id", UNK) != UNK:
        raise ValueError(f"its first tokens are not {', '.join(SPECIAL)}")
    kinds = ModelProto.SentencePiece
    special = zip(OWN_SPECIAL, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True)
    pieces = vocabulary[4:-1] if vocabulary[-1][0] == "<mask>" else vocabulary[4:]
    model = ModelProto(
        pieces=[
            *(kinds(piece=piece, score=0.0, type=kind) for piece, kind in special),
            *(kinds(piece=piece, score=score) for piece, score in pieces),
        ]
    )
    model.normalizer_spec.name = "precompiled"
    model.normalizer_spec.precompiled_charsmap = _charsmap(file.get("normalizer"))
    for step in _steps(file.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") not in ("WhitespaceSplit", "Metaspace") or step.get("replacement", "\u2581") != "\u2581":
            raise ValueError(f"it splits texts by {shown(step.get('type'))}, expected Metaspace")
    added = file.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("its added tokens are no list of mappings")
    return _serialized(model), _checked([(token.get("content"), token.get("id")) for token in added])


def _is_piece(entry: object) -> bool:
    return type(entry) is list and len(entry) == 2 and type(entry[0]) is str and type(entry[1]) in (float, int)


def _serialized(model: Any) -> bytes:
    """A model of SentencePiece's as it reads it.

    Raises:
        ValueError: Texts would take it a time or memory out of proportion, or it would read past its own tables.
    """
    if len(model.pieces) > _MAX_PIECES:
        raise ValueError(f"it has {len(model.pieces):,} pieces, expected at most {_MAX_PIECES:,}")
    longest = max(map(len, map(attrgetter("piece"), model.pieces)), default=0)
    if longest > MAX_PIECE:
        raise ValueError(f"it has a piece of {longest:,} characters, expected at most {MAX_PIECE}")
    if not math.isfinite(sum(map(attrgetter("score"), model.pieces))):
        raise ValueError("the score of a piece is NaN or infinite")
    if model.normalizer_spec.precompiled_charsmap:
        _check_table(model.normalizer_spec.precompiled_charsmap)
    return bytes(model.SerializeToString())


def _check_table(table: bytes) -> None:
    """Walk through the double array by which SentencePiece's normaliser finds what to replace, as it does.

    A unit's place is its parent's base, xor a byte. It holds that byte, whether a key ends here, and how far its own
    base is; if a key ends, the unit there has the place of the replacement in the text behind the units.

    Raises:
        ValueError: A way leads out of the table or in circles, or a replacement is much longer than any sign.
    """
    damaged = ValueError("the table of its normaliser is damaged")
    (size,) = struct.unpack_from("<I", table)
    if len(table) > _MAX_TABLE_BYTES or size % 4 or not 4 <= size <= len(table) - 5 or table[-1]:
        raise damaged
    units, text = struct.unpack_from(f"<{size // 4}I", table, 4), table[4 + size :]
    text.decode()
    below: dict[int, list[int]] = {}
    for place, unit in enumerate(units):
        if not unit >> 31:
            below.setdefault(place ^ (unit & 0xFF), []).append(place)

    def base(place: int) -> int:
        found = place ^ (units[place] >> 10 << ((units[place] & 0x200) >> 6))
        if found | 0xFF >= len(units):
            raise damaged
        return found

    bases, ends, steps = {base(0)}, set[int](), 0
    for _ in range(_MAX_TABLE_KEY):
        places = [place for parent in bases for place in below.get(parent, ()) if place]
        ends |= {base(place) for place in places if units[place] & 0x100}
        bases, steps = {base(place) for place in places}, steps + len(places)
        if not bases or steps > 4 * len(units):
            break
    starts = {units[end] & 0x7FFFFFFF for end in ends}
    if bases or any(start >= len(text) or text.index(0, start) - start > _MAX_TABLE_VALUE for start in starts):
        raise damaged


def _charsmap(normalizer: Any) -> bytes:
    """SentencePiece's table in the normaliser of a ``tokenizer.json``; SentencePiece does the other steps anyway."""
    tables = []
    for step in _steps(normalizer, "normalizers"):
        if step.get("type") == "Precompiled" and isinstance(step.get("precompiled_charsmap"), str):
            tables.append(base64.b64decode(step["precompiled_charsmap"], validate=True))
        elif step.get("type") != "Strip" and step not in _HARMLESS_STEPS:
            raise ValueError(f"its normaliser has {shown(step.get('type'))}, which XLM-R's has not")
    if len(tables) != 1 and normalizer is not None:
        raise ValueError(f"its normaliser has {len(tables)} tables, expected 1")
    return b"".join(tables)


def _steps(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a part of a ``tokenizer.json``, in order; sequences may lie in a sequence."""
    steps = [] if part is None else [part]
    for _ in range(_MAX_STEPS):
        if not all(isinstance(step, dict) for step in steps) or len(steps) > _MAX_STEPS:
            break
        if not any(step.get("type") == "Sequence" for step in steps):
            return steps
        steps = [
            inner
            for step in steps
            for inner in ((step.get(name) or [None]) if step.get("type") == "Sequence" else [step])
        ]
    raise ValueError(f"its {name} are no list of steps")
