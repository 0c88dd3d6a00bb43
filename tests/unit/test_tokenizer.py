"""Token ids against sentencepiece itself, and what a long prompt loses."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import torch

from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import find_tokenizer
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.tokenizer import load_tokenizer, lost_text
from tests import tiny

LONG = " ".join(f"cat{i} on a hill" for i in range(60))
TEXTS = (
    *tiny.SENTENCES,
    "",
    "   ",
    "a  double   space ",
    " leading",
    "tab\tand\nnewline",
    "ＦＵＬＬ ｗｉｄｔｈ",
    "ﬁ ligature ½",
    "emoji 🐈 unknown ☃",
    "é e\u0301",
    "▁ underline ▁▁",
    LONG,
    "猫" * 200,
)


def xlm_roberta_ids(text: str) -> list[int]:
    """fairseq's ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then the pieces, one higher than in sentencepiece."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny.sentencepiece_model())
    pieces = [i + 1 if i else 3 for i in processor.encode(text)]
    ids = [0, *pieces[:75], 2]
    return ids + [1] * (77 - len(ids))


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:20])
def test_ids_are_sentencepieces(text: str, m9: LatentDiffusion) -> None:
    ids = m9.tokenize([text])
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == xlm_roberta_ids(text)


def test_texts_of_a_batch_do_not_see_each_other(m9: LatentDiffusion) -> None:
    ids = m9.tokenize([tiny.CAT, "", LONG])
    assert ids.tolist() == [xlm_roberta_ids(t) for t in (tiny.CAT, "", LONG)]
    assert ids[1].tolist() == [0, 2] + [1] * 75


def test_a_saved_tokenizer_json_gives_the_same_ids(m9_folder: Path, tmp_path: Path) -> None:
    source = load_tokenizer(m9_folder / "sentencepiece.bpe.model")
    source.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    for text in TEXTS:
        arguments = {"padding": "max_length", "truncation": True, "max_length": 77}
        assert again(text, **arguments)["input_ids"] == source(text, **arguments)["input_ids"]
    assert len(again) == len(source) == tiny.vocabulary_size()


def test_a_model_without_tokenizer_says_so(m9: LatentDiffusion) -> None:
    tokenizer, m9.tokenizer = m9.tokenizer, None
    try:
        with pytest.raises(RuntimeError, match="tokenizer"):
            m9.tokenize(["a"])
    finally:
        m9.tokenizer = tokenizer


@pytest.mark.parametrize("text", [tiny.CAT, "", "   ", tiny.SENTENCES[5]])
def test_a_short_prompt_loses_nothing(text: str, m9: LatentDiffusion) -> None:
    assert m9.tokenizer is not None
    assert lost_text(m9.tokenizer, text, 77) == ""


@pytest.mark.parametrize("text", [LONG, "猫" * 200, "a photo of a cat, " * 40])
def test_the_lost_part_is_what_the_tokens_do_not_cover(text: str, m9: LatentDiffusion) -> None:
    assert m9.tokenizer is not None
    lost = lost_text(m9.tokenizer, text, 77)
    assert lost and text.endswith(lost)
    kept = text[: len(text) - len(lost)]
    assert m9.tokenize([kept]).tolist() == m9.tokenize([text]).tolist()


def test_one_token_too_many_is_noticed(m9: LatentDiffusion) -> None:
    assert m9.tokenizer is not None
    count = len(m9.tokenizer(tiny.CAT)["input_ids"])
    assert lost_text(m9.tokenizer, tiny.CAT, count) == ""
    assert lost_text(m9.tokenizer, tiny.CAT, count - 1).strip() != ""


def test_the_models_own_tokenizer_comes_first(tmp_path: Path) -> None:
    model, size = tmp_path / "model", tiny.vocabulary_size()
    model.mkdir()
    with pytest.raises(CheckpointError, match="tokenizer"):
        find_tokenizer(model, size)
    tiny.write_tokenizer(tmp_path / "neighbour")
    (tmp_path / "a-broken-neighbour").mkdir()
    (tmp_path / "a-broken-neighbour" / "sentencepiece.bpe.model").write_bytes(b"<html>")
    assert find_tokenizer(model, size) == tmp_path / "neighbour" / "sentencepiece.bpe.model"
    with pytest.raises(CheckpointError, match="tokenizer"):
        find_tokenizer(model, size + 1)
    tiny.write_tokenizer(model / "tokenizer")
    assert find_tokenizer(model, size) == model / "tokenizer" / "sentencepiece.bpe.model"
    tiny.write_tokenizer(model)
    assert find_tokenizer(model, size) == model / "sentencepiece.bpe.model"


@pytest.mark.fault(40)
@pytest.mark.parametrize("data", [b"", b"<html>", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "tokenizer.json"])
def test_a_broken_file_is_named(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path / name)
