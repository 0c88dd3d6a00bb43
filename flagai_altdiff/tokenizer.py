"""The tokenizer of a model, from its own folder, and what a prompt loses at 77 tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, XLMRobertaTokenizer

from flagai_altdiff.errors import CheckpointError

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
        if path.suffix == ".json":
            return XLMRobertaTokenizer(tokenizer_object=Tokenizer.from_file(str(path)))
        return _from_sentencepiece(path)
    except Exception as error:  # parsers of three libraries, each with errors of its own
        raise CheckpointError(f"{path} is not a readable XLM-R tokenizer ({error}). Fetch the file again.") from error


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if [p for p, _ in pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("it does not begin with <unk>, <s>, </s>")
    # XLM-R's ids: four special tokens in fairseq's order, the pieces behind sentencepiece's own three, <mask> last.
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
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
