"""Text -> XLM-R's token ids, through SentencePiece itself; and what a prompt loses at 77 tokens."""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
import struct
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from flagai_altdiff.errors import CheckpointError, printable, shown
from flagai_altdiff.model_files import TOKENIZER_FILES, is_hidden
from flagai_altdiff.plain_data import parse_json, read_capped

if TYPE_CHECKING:
    from transformers import XLMRobertaTokenizer

MAX_TOKENS = 77
"""Tokens that a prompt has for the model, ``<s>``, ``</s>`` and padding included."""
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's order, in which the released embeddings have them."""
_BOS, _PAD, _EOS, _UNK = range(4)
_OWN_SPECIAL = ("<unk>", "<s>", "</s>")
"""SentencePiece's order."""
_XLM_R = "cfc8146abe2a0488e9e2a0c56de7952f7c11ab059eca145a0a727afce0db2865"
"""SHA-256 of the sentencepiece.bpe.model that XLM-R was released with: it needs no look."""
_MAX_MODEL_BYTES, _MAX_JSON_BYTES, _MAX_BESIDE_BYTES = 16 << 20, 48 << 20, 4 << 20
"""XLM-R's have 5 MB, 9 to 22 MB, and some hundred bytes."""
_MAX_PIECES = 300_000
_MAX_PIECE = 128
"""Characters of a piece, or of an added token; the longest of XLM-R has 16. The time of a text grows with it."""
_MAX_ADDED = 1_000
_MAX_TABLE_BYTES = 1 << 20
_MAX_TABLE_KEY = _MAX_TABLE_VALUE = 64
"""Bytes that a normaliser takes for one sign, and that it makes of one; in SentencePiece's tables 12 and 33."""
_MAX_STEPS = 16
_LONG = 4_000
"""Characters of a text of which no more is looked at than the model has tokens for."""
_MAX_MARKS = 30
"""Marks of one letter that are put in order (Unicode's stream-safe format): the time of that is quadratic."""
_WIDE_TILDE, _PRIVATE = "\uff5e", "\U0010fffd"
_HARMLESS_STEPS = (
    {"type": "NFC"},
    {"type": "NFKC"},
    *({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": blank} for blank in (" ", "\u2581")),
    {"type": "Replace", "pattern": {"String": _WIDE_TILDE}, "content": _PRIVATE},
    {"type": "Replace", "pattern": {"String": _PRIVATE}, "content": _WIDE_TILDE},
)
"""Steps of a normaliser that SentencePiece takes anyway, or that our own twin of a tokenizer has."""
_INVISIBLE_CODES = (
    "0-20 7f-a0 1680 2000-200a 2028 2029 202f 205f 3000 2800 "  # controls and blanks
    "ad 34f 61c 115f 1160 17b4 17b5 180b-180f 200b-200f 202a-202e 2060-206f 3164 fe00-fe0f feff ffa0 fff0-fffb "
    "1bca0-1bca3 1d173-1d17a e0000-e0fff"  # Unicode's default ignorable: joiners, marks of direction, selectors, tags
)
_INVISIBLE = "".join(
    chr(code)
    for first, _, last in (codes.partition("-") for codes in _INVISIBLE_CODES.split())
    for code in range(int(first, 16), int(last or first, 16) + 1)
)
_SIMPLE_SIGNS = "\0-\u02ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\U0001f000-\U0001faff"
_SIMPLE = re.compile(f"[{_SIMPLE_SIGNS}]+(?![^{_SIMPLE_SIGNS}])")
"""Latin letters, Han, Hangul and emoji are what NFC makes of them, and none changes the one before it."""
_SELECTOR = re.compile("[\ufe00-\ufe0f\U000e0020-\U000e01ef]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text.

    Args:
        ids: Without ``<s>`` and ``</s>``, and not cut.
        spans: For each token the start and the end of its part of the text as it was typed, in characters.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


class Tokenizer:
    """A model's tokenizer. Nothing in it changes: any number of threads may use one at once.

    Args:
        path: The file that it comes from.
        model: What SentencePiece reads: pieces with scores, and the table of its normaliser.
        named: Tokens that a text may spell out, with their ids: special ones, and those added behind ``<mask>``.

    Raises:
        ValueError: SentencePiece refuses the model, or it is no XLM-R's.
        CheckpointError: The ids of ``named`` contradict the model, or leave a gap behind it.
    """

    def __init__(self, path: Path, model: bytes, named: Mapping[str, int] | None = None) -> None:
        self.path = path
        self._pieces = SentencePieceProcessor(model_proto=model)
        if tuple(self._pieces.id_to_piece(i) for i in range(3)) != _OWN_SPECIAL:
            raise ValueError(f"it does not begin with {', '.join(_OWN_SPECIAL)}")
        # XLM-R's ids: four special tokens in fairseq's order, the pieces behind SentencePiece's own three, <mask> last.
        own = self._own_size = self._size = self._pieces.get_piece_size() + 2
        self._named = {**{token: i for i, token in enumerate(_SPECIAL)}, "<mask>": own - 1}
        for token, i in sorted((named or {}).items(), key=lambda item: item[1]):
            if i > self._size or (i < self._size and i != self._id(token)):
                raise CheckpointError(
                    f"{path.parent}: the added token {shown(token)} has the id {i}, but {path.name} has {own} tokens "
                    f"of its own and added ones are numbered from {own} on without a gap. Mend or remove "
                    "added_tokens.json."
                )
            self._named[token] = i
            self._size = max(self._size, i + 1)
        self._longest_first = sorted(self._named, key=len, reverse=True)
        self._lock = threading.Lock()
        self._twin: XLMRobertaTokenizer | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def files(self) -> tuple[Path, ...]:
        """What to copy to have this tokenizer elsewhere: its file, and those beside it that name added tokens."""
        beside = (_added_tokens(self.path), _settings(self.path)) if self._size > self._own_size else ()
        return (self.path, *(path for path in beside if path.is_file()))

    def __deepcopy__(self, memo: object) -> Tokenizer:
        return self

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path, bytes, dict[str, int]]]:
        return Tokenizer, (self.path, self._pieces.serialized_model_proto(), self._named)

    def encode(self, text: str) -> Encoded:
        """The tokens of a text; names of special tokens in it are those tokens.

        Args:
            text: Any text; what is invisible at its ends has no tokens.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        place, end = _visible(text)
        for i, part in enumerate(self._split(_SURROGATE.sub("\ufffd", text[place:end]))):
            if i % 2:
                ids.append(self._named[part])
                spans.append((place, place + len(part)))
            elif part:
                composed, origins = _composed(part)
                found = self._pieces.encode(composed, return_type="offset_mapping")
                ids += [piece + 1 if piece else _UNK for piece in found["ids"]]
                spans += [(place + origins[first], place + origins[last]) for first, last in found["offsets"]]
            place += len(part)
        return Encoded(tuple(ids), tuple(spans))

    def ids(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """What the text encoder takes: ``<s>``, tokens, ``</s>``, cut and padded to one length.

        Args:
            texts: Prompts.
            max_tokens: The length.
        """
        rows = [[_BOS, *self._first(text, max_tokens).ids[: max_tokens - 2], _EOS] for text in texts]
        return [row + [_PAD] * (max_tokens - len(row)) for row in rows]

    def lost_text(self, text: str, max_tokens: int = MAX_TOKENS) -> str:
        """The end of a prompt that has no effect.

        Args:
            text: The prompt.
            max_tokens: Tokens that fit, ``<s>`` and ``</s>`` included.

        Returns:
            The characters that are cut; empty if everything fits.
        """
        lost = self._first(text, max_tokens).spans[max_tokens - 2 :]
        return text[lost[0][0] :] if lost else ""

    def same_as(self, other: Tokenizer) -> bool:
        """Whether every text has the same tokens, wherever the two come from.

        Args:
            other: Another tokenizer.
        """
        return self is other or (self._named == other._named and self._plain() == other._plain())

    def has_all_of(self, other: Tokenizer) -> bool:
        """Whether the pieces and scores are another's, and all its added tokens are here.

        Args:
            other: Another tokenizer.
        """
        return other._named.items() <= self._named.items() and self._plain()[0] == other._plain()[0]

    def _plain(self) -> tuple[list[tuple[str, float, int]], bytes]:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto.FromString(self._pieces.serialized_model_proto())
        return [(p.piece, p.score, p.type) for p in proto.pieces], proto.normalizer_spec.precompiled_charsmap

    def _first(self, text: str, count: int) -> Encoded:
        """The first ``count`` tokens of a text at least, if it has so many; the rest of it costs no time."""
        length = _LONG
        while True:
            found = self.encode(text[:length])
            if length >= len(text) or len(found.ids) >= count + _MAX_PIECE:  # where it is cut, tokens may differ
                return found
            length = len(text)

    def _split(self, text: str) -> list[str]:
        """Text and tokens that are spelled out in it, in turn."""
        there = [re.escape(token) for token in self._longest_first if token in text]
        return re.split(f"({'|'.join(there)})", text) if there else [text]

    def _id(self, token: str) -> int | None:
        piece = self._pieces.piece_to_id(token)
        return self._named.get(token, piece + 1 if piece else None)

    def to_transformers(self) -> XLMRobertaTokenizer:
        """The same tokenizer for scripts written for transformers; made once.

        Returns:
            One whose ``model_max_length`` is 77. Like every tokenizer of transformers it must not be called by two
            threads at once. Its ids differ in odd texts only: marks on letters of another script or on a ligature.

        Raises:
            CheckpointError: SentencePiece can read the file, the tokenizers library cannot.
        """
        with self._lock:
            if self._twin is None:
                with _named_errors(f"{self.path} cannot be given to transformers"):
                    self._twin = _twin(self._pieces.serialized_model_proto(), self._named)
            return self._twin


def trimmed(text: str) -> str:
    """A text without what is invisible at its ends: blanks, joiners, marks of direction, byte order marks."""
    start, end = _visible(text)
    return text[start:end]


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


def load_tokenizer(path: Path) -> Tokenizer:
    """XLM-R's tokenizer from ``sentencepiece.bpe.model``, or from a ``tokenizer.json``.

    Args:
        path: The file. Beside it, ``added_tokens.json`` and ``tokenizer_config.json`` may name further tokens.

    Raises:
        CheckpointError: The file is not a tokenizer of this kind, added tokens do not follow on its own, or a
            ``tokenizer.json`` beside it has other pieces.
    """
    with _named_errors(f"{path} is not a readable XLM-R tokenizer"):
        model, named = _read_model(path)
        tokenizer = Tokenizer(path, model, _joined(path, named, _tokens_beside(path)))
        tokenizer.encode("a cat")  # some damage shows at the first text only
    _refuse_another_beside(tokenizer)
    return tokenizer


@contextmanager
def _named_errors(problem: str) -> Iterator[None]:
    """Parsers of three libraries have errors of their own, and a panic of Rust is no Exception: all become ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, CheckpointError):
        raise
    except BaseException as error:
        reason = printable((str(error).splitlines() or [""])[0], 200) or type(error).__name__
        raise CheckpointError(f"{problem} ({reason}). Fetch the file again.") from error


def _visible(text: str) -> tuple[int, int]:
    """Start and end of a text without what is invisible at its ends."""
    start, end = len(text) - len(text.lstrip(_INVISIBLE)), len(text.rstrip(_INVISIBLE))
    if start >= end:
        return 0, 0
    if unicodedata.category(text[end - 1]) == "So" and (selector := _SELECTOR.match(text, end)):
        end = selector.end()  # part of the sign before it: a red heart, a flag
    return start, end


def _composed(text: str) -> tuple[str, list[int]]:
    """NFC of a text, and where in the text each of its characters begins; then the text's end.

    SentencePiece's table composes most decomposed letters itself, but not every order of their marks.
    """
    nfc = functools.partial(unicodedata.normalize, "NFC")
    parts: list[str] = []
    origins: list[int] = []
    start = i = 0
    while i < len(text):
        if i == start and (simple := _SIMPLE.match(text, i)):
            parts.append(simple[0])
            origins += range(i, simple.end())
            start = i = simple.end()
            continue
        i += 1
        letter, following = nfc(text[start:i]), text[i : i + 1]
        if following and i - start <= _MAX_MARKS and _joins(letter, following):
            continue
        parts.append(letter)
        origins += [start] * len(letter)
        start = i
    return "".join(parts), [*origins, len(text)]


def _joins(letter: str, following: str) -> bool:
    """Whether what follows a letter changes it, or is a mark of it."""
    nfc, nfd = (functools.partial(unicodedata.normalize, form) for form in ("NFC", "NFD"))
    return unicodedata.combining(nfd(following)[0]) != 0 or nfc(letter + following) != letter + nfc(following)


def _settings(path: Path) -> Path:
    return path.with_name("tokenizer_config.json")


def _added_tokens(path: Path) -> Path:
    return path.with_name("added_tokens.json")


def _read_model(path: Path) -> tuple[bytes, dict[str, int]]:
    """What SentencePiece reads, and the added tokens that a ``tokenizer.json`` names."""
    if path.suffix == ".json":
        return _from_json(parse_json(read_capped(path, _MAX_JSON_BYTES)))
    data = read_capped(path, _MAX_MODEL_BYTES)
    return data if hashlib.sha256(data).hexdigest() == _XLM_R else _from_sentencepiece(data), {}


def _refuse_another_beside(tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where a ``tokenizer.json`` lies beside SentencePiece's file and has other tokens."""
    path = tokenizer.path.with_name("tokenizer.json")
    if path == tokenizer.path or not path.is_file():
        return
    try:
        with _named_errors(str(path)):
            other = Tokenizer(path, *_read_model(path))
    except CheckpointError:
        return  # what cannot be read says nothing
    if not tokenizer.has_all_of(other):
        raise CheckpointError(
            f"{tokenizer.path} and {path.name} beside it are different tokenizers, and nothing tells which is the "
            "model's. Remove the one that is not."
        )


def _tokens_beside(path: Path) -> dict[str, int]:
    """Tokens that ``added_tokens.json`` or ``tokenizer_config.json`` name."""
    named: dict[str, int] = {}
    settings, added = _settings(path), _added_tokens(path)
    with suppress(OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):  # it says little else
        decoder = parse_json(read_capped(settings, _MAX_BESIDE_BYTES))["added_tokens_decoder"]
        named = _checked([(token["content"], int(i)) for i, token in decoder.items()])
    if not added.is_file():
        return named
    try:
        tokens = _checked(list(parse_json(read_capped(added, _MAX_BESIDE_BYTES)).items()))
    except (ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{added} is not a list of added tokens: expected {{token: id, ...}}.") from error
    return _joined(path, named, tokens)


def _joined(path: Path, named: Mapping[str, int], others: Mapping[str, int]) -> dict[str, int]:
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
        if not isinstance(token, str) or not 0 < len(token) <= _MAX_PIECE or type(i) is not int or i < 0:
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
    if tuple(token for token, _ in vocabulary[:4]) != _SPECIAL or part.get("unk_id", _UNK) != _UNK:
        raise ValueError(f"its first tokens are not {', '.join(_SPECIAL)}")
    kinds = ModelProto.SentencePiece
    special = zip(_OWN_SPECIAL, (kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL), strict=True)
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
    if longest > _MAX_PIECE:
        raise ValueError(f"it has a piece of {longest:,} characters, expected at most {_MAX_PIECE}")
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


def _twin(model: bytes, named: Mapping[str, int]) -> XLMRobertaTokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    from tokenizers import AddedToken, normalizers
    from transformers import XLMRobertaTokenizer

    proto = ModelProto.FromString(model)
    if proto.trainer_spec.model_type != TrainerSpec.UNIGRAM:
        raise ValueError("it is no Unigram model")
    special = [(token, 0.0) for token in _SPECIAL]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *pieces, ("<mask>", 0.0)], model_max_length=MAX_TOKENS)
    if proto.normalizer_spec.precompiled_charsmap:
        # Precompiled takes a letter and its marks for one key and may drop the marks: compose them first.
        # SentencePiece's tables are NFKC but for one sign.
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Replace(_WIDE_TILDE, _PRIVATE),
                normalizers.NFKC(),
                normalizers.Replace(_PRIVATE, _WIDE_TILDE),
                normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            ]
        )
    added = (token for token, i in named.items() if i >= len(proto.pieces) + 2)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer("a cat")  # some damage shows at the first text only
    return tokenizer
