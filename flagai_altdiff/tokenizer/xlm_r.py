"""Text -> XLM-R's token ids, through SentencePiece itself; and what a prompt loses at 77 tokens."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from flagai_altdiff.errors import CheckpointError, printable, shown
from flagai_altdiff.tokenizer.files import (
    BOS,
    EOS,
    MAX_PIECE,
    OWN_SPECIAL,
    PAD,
    PRIVATE,
    SPECIAL,
    UNK,
    WIDE_TILDE,
    files_beside,
    joined,
    read_model,
    tokens_beside,
)
from flagai_altdiff.tokenizer.text import SURROGATE, composed, visible

if TYPE_CHECKING:
    from transformers import XLMRobertaTokenizer

MAX_TOKENS = 77
"""Tokens that a prompt has for the model, ``<s>``, ``</s>`` and padding included."""
_PLAIN = re.compile(r"[A-Za-z0-9_]+")
_LONG = 4_000
"""Characters of a text of which no more is looked at than the model has tokens for."""


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
        if tuple(self._pieces.id_to_piece(i) for i in range(3)) != OWN_SPECIAL:
            raise ValueError(f"it does not begin with {', '.join(OWN_SPECIAL)}")
        # XLM-R's ids: four special tokens in fairseq's order, the pieces behind SentencePiece's own three, <mask> last.
        own = self._own_size = self._size = self._pieces.get_piece_size() + 2
        self._named = {**{token: i for i, token in enumerate(SPECIAL)}, "<mask>": own - 1}
        for token, i in sorted((named or {}).items(), key=lambda item: item[1]):
            if i > self._size or (i < self._size and i != self._id(token)):
                raise CheckpointError(
                    f"{path.parent}: the added token {shown(token)} has the id {i}, but {path.name} has {own} tokens "
                    f"of its own and added ones are numbered from {own} on without a gap. Mend or remove "
                    "added_tokens.json."
                )
            self._named[token] = i
            self._size = max(self._size, i + 1)
        self._words: dict[str, tuple[int, ...]] = {}
        self._patterns: dict[str, str] = {}
        self._longest_first = sorted(self._named, key=len, reverse=True)
        self._lock = threading.Lock()
        self._twin: XLMRobertaTokenizer | None = None

    def __len__(self) -> int:
        return self._size

    def with_word(self, word: str, count: int) -> Tokenizer:
        """A tokenizer that knows one more word, which is ``count`` new tokens wherever it stands in a text.

        Args:
            word: As it is typed, blanks around it or not.
            count: Of its tokens; their ids go on where the vocabulary ends.

        Raises:
            ValueError: The word is known already, or is none.
        """
        if not word.strip() or word in self._named or word in self._words:
            raise ValueError(f"the word {shown(word)} is known already; name another one")
        other = copy.copy(self)
        other._words = {**self._words, word: tuple(range(self._size, self._size + count))}
        if _PLAIN.fullmatch(word):  # "art" is no part of "party"
            other._patterns = {**self._patterns, word: f"(?<![A-Za-z0-9_]){word}(?![A-Za-z0-9_])"}
        other._size, other._lock, other._twin = self._size + count, threading.Lock(), None
        other._longest_first = sorted((*self._named, *other._words), key=len, reverse=True)
        return other

    @property
    def files(self) -> tuple[Path, ...]:
        """What to copy to have this tokenizer elsewhere: its file, and those beside it that name added tokens."""
        beside = files_beside(self.path) if self._size > self._own_size else ()
        return (self.path, *(path for path in beside if path.is_file()))

    def __deepcopy__(self, memo: object) -> Tokenizer:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        words = {word: len(ids) for word, ids in self._words.items()}
        return _again, (self.path, self._pieces.serialized_model_proto(), self._named, words)

    def encode(self, text: str) -> Encoded:
        """The tokens of a text; names of special tokens in it are those tokens.

        Args:
            text: Any text; what is invisible at its ends has no tokens.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        place, end = visible(text)
        for i, part in enumerate(self._split(SURROGATE.sub("\ufffd", text[place:end]))):
            if i % 2:
                own = self._words.get(part) or (self._named[part],)
                ids += own
                spans += [(place, place + len(part))] * len(own)
            elif part:
                letters, origins = composed(part)
                found = self._pieces.encode(letters, return_type="offset_mapping")
                ids += [piece + 1 if piece else UNK for piece in found["ids"]]
                spans += [(place + origins[first], place + origins[last]) for first, last in found["offsets"]]
            place += len(part)
        return Encoded(tuple(ids), tuple(spans))

    def ids(self, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
        """What the text encoder takes: ``<s>``, tokens, ``</s>``, cut and padded to one length.

        Args:
            texts: Prompts.
            max_tokens: The length.
        """
        rows = [[BOS, *self._first(text, max_tokens).ids[: max_tokens - 2], EOS] for text in texts]
        return [row + [PAD] * (max_tokens - len(row)) for row in rows]

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
            if length >= len(text) or len(found.ids) >= count + MAX_PIECE:  # where it is cut, tokens may differ
                return found
            length = len(text)

    def _split(self, text: str) -> list[str]:
        """Text and tokens that are spelled out in it, in turn."""
        there = [self._patterns.get(token, re.escape(token)) for token in self._longest_first if token in text]
        return re.split(f"({'|'.join(there)})", text) if there else [text]

    def _id(self, token: str) -> int | None:
        piece = self._pieces.piece_to_id(token)
        return self._named.get(token, piece + 1 if piece else None)

    @property
    def words(self) -> tuple[str, ...]:
        """What :meth:`with_word` added, in its order."""
        return tuple(self._words)

    def to_transformers(self) -> XLMRobertaTokenizer:
        """The same tokenizer for scripts written for transformers; made once.

        Returns:
            One whose ``model_max_length`` is 77. Like every tokenizer of transformers it must not be called by two
            threads at once. Its ids differ in odd texts only: marks on letters of another script or on a ligature.

        Raises:
            CheckpointError: SentencePiece can read the file, the tokenizers library cannot; or words were learnt, which
                are several tokens each.
        """
        if self._words:
            raise CheckpointError(f"transformers' tokenizer cannot have the learnt words {', '.join(self._words)}.")
        with self._lock:
            if self._twin is None:
                with _named_errors(f"{self.path} cannot be given to transformers"):
                    self._twin = _twin(self._pieces.serialized_model_proto(), self._named)
            return self._twin


def _again(path: Path, model: bytes, named: Mapping[str, int], words: Mapping[str, int]) -> Tokenizer:
    """A tokenizer that was pickled."""
    tokenizer = Tokenizer(path, model, named)
    for word, count in words.items():
        tokenizer = tokenizer.with_word(word, count)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """XLM-R's tokenizer from ``sentencepiece.bpe.model``, or from a ``tokenizer.json``.

    Args:
        path: The file. Beside it, ``added_tokens.json`` and ``tokenizer_config.json`` may name further tokens.

    Raises:
        CheckpointError: The file is not a tokenizer of this kind, added tokens do not follow on its own, or a
            ``tokenizer.json`` beside it has other pieces.
    """
    with _named_errors(f"{path} is not a readable XLM-R tokenizer"):
        model, named = read_model(path)
        tokenizer = Tokenizer(path, model, joined(path, named, tokens_beside(path)))
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


def _refuse_another_beside(tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where a ``tokenizer.json`` lies beside SentencePiece's file and has other tokens."""
    path = tokenizer.path.with_name("tokenizer.json")
    if path == tokenizer.path or not path.is_file():
        return
    try:
        with _named_errors(str(path)):
            other = Tokenizer(path, *read_model(path))
    except CheckpointError:
        return  # what cannot be read says nothing
    if not tokenizer.has_all_of(other):
        raise CheckpointError(
            f"{tokenizer.path} and {path.name} beside it are different tokenizers, and nothing tells which is the "
            "model's. Remove the one that is not."
        )


def _twin(model: bytes, named: Mapping[str, int]) -> XLMRobertaTokenizer:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
    from tokenizers import AddedToken, normalizers
    from transformers import XLMRobertaTokenizer

    proto = ModelProto.FromString(model)
    if proto.trainer_spec.model_type != TrainerSpec.UNIGRAM:
        raise ValueError("it is no Unigram model")
    special = [(token, 0.0) for token in SPECIAL]
    pieces = [(piece.piece, piece.score) for piece in proto.pieces[3:]]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *pieces, ("<mask>", 0.0)], model_max_length=MAX_TOKENS)
    if proto.normalizer_spec.precompiled_charsmap:
        # Precompiled takes a letter and its marks for one key and may drop the marks: compose them first.
        # SentencePiece's tables are NFKC but for one sign.
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
            [
                normalizers.Replace(WIDE_TILDE, PRIVATE),
                normalizers.NFKC(),
                normalizers.Replace(PRIVATE, WIDE_TILDE),
                normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            ]
        )
    added = (token for token, i in named.items() if i >= len(proto.pieces) + 2)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    tokenizer("a cat")  # some damage shows at the first text only
    return tokenizer
