"""Text -> XLM-R's token ids, through SentencePiece itself; and what a prompt loses at 77 tokens."""

from __future__ import annotations

import base64
import functools
import json
import re
import threading
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.model_files import TOKENIZER_FILES, is_hidden

if TYPE_CHECKING:
    from transformers import XLMRobertaTokenizer

MAX_TOKENS = 77
"""Tokens that a prompt has for the model, ``<s>``, ``</s>`` and padding included."""
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's order, in which the released embeddings have them."""
_BOS, _PAD, _EOS, _UNK = range(4)
_OWN_SPECIAL = ("<unk>", "<s>", "</s>")
"""SentencePiece's order."""
_MAX_BYTES = 64 << 20
_MAX_ADDED = 10_000
_MAX_MARKS = 30
"""Marks of one letter that are put in order (Unicode's stream-safe format): the time of that is quadratic."""
_WIDE_TILDE, _PRIVATE = "\uff5e", "\U0010fffd"
_HARMLESS_PATTERNS = ({"Regex": " {2,}"}, {"String": _WIDE_TILDE}, {"String": _PRIVATE})
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
                    f"{path.parent}: the added token {token!r} has the id {i}, but {path.name} has {own} tokens of its "
                    f"own and added ones are numbered from {own} on without a gap. Mend or remove added_tokens.json."
                )
            self._named[token] = i
            self._size = max(self._size, i + 1)
        longest_first = sorted(self._named, key=len, reverse=True)
        self._spelled = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
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
        for i, part in enumerate(self._spelled.split(_SURROGATE.sub("\ufffd", text[place:end]))):
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
        rows = [[_BOS, *self.encode(text).ids[: max_tokens - 2], _EOS] for text in texts]
        return [row + [_PAD] * (max_tokens - len(row)) for row in rows]

    def lost_text(self, text: str, max_tokens: int = MAX_TOKENS) -> str:
        """The end of a prompt that has no effect.

        Args:
            text: The prompt.
            max_tokens: Tokens that fit, ``<s>`` and ``</s>`` included.

        Returns:
            The characters that are cut; empty if everything fits.
        """
        lost = self.encode(text).spans[max_tokens - 2 :]
        return text[lost[0][0] :] if lost else ""

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
    for sibling in sorted(folder.parent.iterdir()):
        if is_hidden(sibling.name) or not sibling.is_dir() or sibling == folder:
            continue
        if (path := own_tokenizer(sibling)) is not None:
            yield path


def load_tokenizer(path: Path) -> Tokenizer:
    """XLM-R's tokenizer from ``sentencepiece.bpe.model``, or from a ``tokenizer.json``.

    Args:
        path: The file. Beside it, ``added_tokens.json`` and ``tokenizer_config.json`` may name further tokens.

    Raises:
        CheckpointError: The file is not a tokenizer of this kind, or added tokens do not follow on its own.
    """
    with _named_errors(f"{path} is not a readable XLM-R tokenizer"):
        data = _read(path)
        model, named = _from_json(data) if path.suffix == ".json" else (data, {})
        tokenizer = Tokenizer(path, model, {**named, **_tokens_beside(path)})
        tokenizer.encode("a cat")  # some damage shows at the first text only
        return tokenizer


@contextmanager
def _named_errors(problem: str) -> Iterator[None]:
    """Parsers of three libraries have errors of their own, and a panic of Rust is no Exception: all become ours."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, CheckpointError):
        raise
    except BaseException as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{problem} ({reason}). Fetch the file again.") from error


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    return data


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
    start = 0
    for i in range(1, len(text) + 1):
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


def _tokens_beside(path: Path) -> dict[str, int]:
    """Tokens that ``added_tokens.json`` or ``tokenizer_config.json`` name."""
    named: dict[str, int] = {}
    settings, added = _settings(path), _added_tokens(path)
    with suppress(OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):  # it says little else
        for i, token in json.loads(_read(settings))["added_tokens_decoder"].items():
            named |= _checked({token["content"]: int(i)})
    if added.is_file():
        try:
            named |= _checked(json.loads(_read(added)))
        except (ValueError, RecursionError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{added} is not a list of added tokens: expected {{token: id, ...}}.") from error
    return named


def _checked(tokens: dict[str, int]) -> dict[str, int]:
    """Added tokens as they should be.

    Raises:
        ValueError: They are not.
    """
    if len(tokens) > _MAX_ADDED:
        raise ValueError(f"more than {_MAX_ADDED} added tokens")
    for token, i in tokens.items():
        if not isinstance(token, str) or not token or type(i) is not int or i < 0:
            raise ValueError(f"an added token {token!r} with the id {i!r}")
    return tokens


def _from_json(data: bytes) -> tuple[bytes, dict[str, int]]:
    """SentencePiece's model of the pieces and the normaliser in a ``tokenizer.json``, and its added tokens."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    file = json.loads(data)
    kind, vocabulary = file["model"].get("type", "Unigram"), file["model"]["vocab"]
    if kind != "Unigram" or file["model"].get("byte_fallback"):
        raise ValueError(f"it is a {kind} model, expected Unigram without bytes")
    if tuple(token for token, _ in vocabulary[:4]) != _SPECIAL:
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
    splitters = {step["type"] for step in _steps(file.get("pre_tokenizer"), "pretokenizers")}
    if not splitters <= {"WhitespaceSplit", "Metaspace"}:
        raise ValueError(f"it splits texts by {', '.join(sorted(splitters))}, expected Metaspace")
    return model.SerializeToString(), _checked(
        {token["content"]: token["id"] for token in file.get("added_tokens") or ()}
    )


def _charsmap(normalizer: Any) -> bytes:
    """SentencePiece's table in the normaliser of a ``tokenizer.json``; SentencePiece does the other steps anyway."""
    tables = []
    for step in _steps(normalizer, "normalizers"):
        if step["type"] == "Precompiled":
            tables.append(base64.b64decode(step["precompiled_charsmap"], validate=True))
        elif step["type"] not in ("NFC", "NFKC", "Strip") and step.get("pattern") not in _HARMLESS_PATTERNS:
            raise ValueError(f"its normaliser has {step['type']}, which XLM-R's has not")
    if len(tables) != 1 and normalizer is not None:
        raise ValueError(f"its normaliser has {len(tables)} tables, expected 1")
    return b"".join(tables)


def _steps(part: Any, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a part of a ``tokenizer.json``, in order."""
    if part is not None and part["type"] == "Sequence":
        for step in part[name]:
            yield from _steps(step, name)
    elif part is not None:
        yield part


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
