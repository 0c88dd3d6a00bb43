"""The tokenizer of a model, from its own folder, and what a prompt loses at 77 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, XLMRobertaTokenizer

from flagai_altdiff.errors import CheckpointError

_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
"""fairseq's order, in which the released embeddings have them."""
_MAX_BYTES = 64 << 20
_NAMES = ("sentencepiece.bpe.model", "tokenizer.json")


def own_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a model's folder or in its ``tokenizer/``; ``None`` if there is none."""
    return next((path for place in (folder, folder / "tokenizer") for name in _NAMES if (path := place / name).is_file()), None)


def neighbour_tokenizers(folder: Path) -> Iterator[Path]:
    """Tokenizer files in the folders beside a model's: FlagAI lets models share one."""
    folder = folder.resolve()
    for sibling in sorted(folder.parent.iterdir()):
        if sibling.is_dir() and sibling != folder and (path := own_tokenizer(sibling)) is not None:
            yield path


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """XLM-R's tokenizer from ``sentencepiece.bpe.model``, or from a ``tokenizer.json``.

    Args:
        path: The file; nothing else is read, nothing is downloaded.

    Raises:
        CheckpointError: The file is not a tokenizer of this kind.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        if path.suffix == ".json":
            tokenizer: PreTrainedTokenizerBase = XLMRobertaTokenizer(tokenizer_object=Tokenizer.from_buffer(data))
        else:
            tokenizer = _from_sentencepiece(data)
        if tokenizer.convert_tokens_to_ids(list(_SPECIAL_TOKENS)) != list(range(len(_SPECIAL_TOKENS))):
            raise ValueError(f"its first tokens are not {', '.join(_SPECIAL_TOKENS)}")
        tokenizer("a cat")  # some damage shows at the first text only
        return tokenizer
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # parsers of three libraries with errors of their own; a panic of Rust is no Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} is not a readable XLM-R tokenizer ({reason}). Fetch the file again.") from error


def _from_sentencepiece(data: bytes) -> PreTrainedTokenizerBase:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(data)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if [p for p, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("it does not begin with <unk>, <s>, </s>")
    # XLM-R's ids: four special tokens in fairseq's order, the pieces behind sentencepiece's own three, <mask> last.
    special = [(token, 0.0) for token in _SPECIAL_TOKENS]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *pieces[3:], ("<mask>", 0.0)])
    if proto.normalizer_spec.precompiled_charsmap:
        tokenizer.backend_tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    return tokenizer


def lost_text(tokenizer: PreTrainedTokenizerBase, prompt: str, max_tokens: int) -> str:
    """The end of a prompt that does not fit.

    Args:
        tokenizer: The model's tokenizer.
        prompt: The text.
        max_tokens: Tokens that fit, special tokens included.

    Returns:
        The characters that are cut; empty if everything fits.
    """
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= max_tokens:
        return ""
    return prompt[offsets[max_tokens - 1][0] :]  # the last place is taken by </s>
