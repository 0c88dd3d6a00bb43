"""Token ids against SentencePiece itself and against transformers, and what a long prompt loses."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import random
import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff import load_model
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import find_tokenizer
from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import all_scenes
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.registry import embedded_dir
from flagai_altdiff.tokenizer import Tokenizer, load_tokenizer, own_tokenizer, trimmed
from tests import tiny

MINI = embedded_dir() / "AltDiffusion-mini" / "sentencepiece.bpe.model"
Form = Literal["NFC", "NFD", "NFKD"]

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
    "wave ～ dash 〜",
    "ｶﾞｷﾞ ﾊﾟ half width",
    LONG,
    "猫" * 200,
)
SPECIAL_TEXTS = (
    "<s>",
    "a <s> b",
    "</s>cat",
    "cat<pad>cat",
    "a <unk> cat",
    "a  <mask> cat",
    "<mask>",
    "<S> <masK> < s>",
    "<s></s>",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder / "sentencepiece.bpe.model")


@functools.cache
def shared() -> Tokenizer:
    return load_tokenizer(MINI)


@pytest.fixture(scope="module")
def mini() -> Tokenizer:
    return shared()


@functools.cache
def processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def xlm_roberta_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """fairseq's ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then the pieces, one higher than in SentencePiece."""
    pieces = [i + 1 if i else 3 for i in processor(tokenizer.path).encode(text)]
    ids = [0, *pieces[:75], 2]
    return ids + [1] * (77 - len(ids))


def transformers_ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    arguments = {"padding": "max_length", "truncation": True, "max_length": 77}
    return tokenizer.to_transformers()(texts, **arguments)["input_ids"]  # type: ignore[no-any-return]


def captions(code: str, count: int) -> list[str]:
    rng, scenes = random.Random(code), all_scenes()
    return [random_caption(rng.choice(scenes), code, rng) for _ in range(count)]


@pytest.mark.parametrize("text", TEXTS, ids=lambda t: t[:20])
def test_ids_are_sentencepieces(text: str, own: Tokenizer) -> None:
    assert own.ids([text]) == [xlm_roberta_ids(own, text)]
    assert transformers_ids(own, [text]) == own.ids([text])


def test_a_model_gives_them_as_a_tensor(m9: LatentDiffusion) -> None:
    ids = m9.tokenize([tiny.CAT, "", LONG])
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert m9.text_tokenizer is not None
    assert ids.tolist() == m9.text_tokenizer.ids([tiny.CAT, "", LONG])
    assert ids[1].tolist() == [0, 2] + [1] * 75


@pytest.mark.fault(115)
@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKD"])
def test_captions_of_all_languages(code: str, form: Form, mini: Tokenizer) -> None:
    """As they are typed, and taken apart as macOS gives them: SentencePiece's ids, one and the same."""
    texts = captions(code, 100)
    other = [unicodedata.normalize(form, text) for text in texts]
    ids = mini.ids(texts)
    assert mini.ids(other) == ids == [xlm_roberta_ids(mini, text) for text in other]
    assert transformers_ids(mini, other) == ids


EQUAL = (
    ("một ngôi sao lớn", unicodedata.normalize("NFD", "một ngôi sao lớn")),
    ("o\u0323\u0302", "o\u0302\u0323"),  # the same letter with its marks in another order
    ("ẹ\u0301 Yoruba", "é\u0323 Yoruba"),
    ("سَّ", "س\u0651\u064e"),
    ("y\u0323\u0322", "y\u0322\u0323"),
    ("한국어", unicodedata.normalize("NFD", "한국어")),
    ("ガギグ", "ｶﾞｷﾞｸﾞ"),
    ("パピプ", "ﾊﾟﾋﾟﾌﾟ"),
    ("क़", "क\u093c"),
    ("กำ", unicodedata.normalize("NFKD", "กำ")),
    ("Å", "\u212b"),
)


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal_texts_are_equal_tokens(one: str, other: str, own: Tokenizer, mini: Tokenizer) -> None:
    for tokenizer in (own, mini):
        assert tokenizer.ids([f"a {one} b"]) == tokenizer.ids([f"a {other} b"])


@pytest.mark.fault(115)
@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_the_same_in_every_canonical_form(text: str) -> None:
    tokenizer = shared()
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert len({tokenizer.encode(form).ids for form in (text, *forms)}) == 1
    found = tokenizer.encode(text)
    assert all(0 <= first <= last <= len(text) for first, last in found.spans)
    assert list(found.spans) == sorted(found.spans)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_composed_text_has_sentencepieces_ids(text: str) -> None:
    tokenizer, composed = shared(), trimmed(unicodedata.normalize("NFC", text))
    assert tokenizer.ids([composed]) == [xlm_roberta_ids(tokenizer, composed)]


EXTRAS = ("ｱｶﾞﾊﾟ", "ＡＢｃ１～", "〜…“”–™½①㎏", "❤🐈🎨", "e\u0301o\u0323\u0302", "한국", "a<mask>b", "</s>", "a  b")
WORDS = st.one_of(
    st.sampled_from(EXTRAS),
    *(st.text(sorted({sign for text in captions(code, 20) for sign in text}), max_size=6) for code in LANGUAGES),
)
ORDINARY = st.lists(WORDS, max_size=8).map(" ".join)


@settings(deadline=None)  # the first call makes the tokenizer
@given(ORDINARY)
def test_transformers_agrees_on_ordinary_text(text: str) -> None:
    """Letters of 18 languages, composed or not, half and full width, signs, special tokens.

    It does not where the marks of one script follow the letters of another, or ligatures, or where something invisible
    stands at an end: its normaliser sees a letter with all its marks at once.
    """
    tokenizer = shared()
    if trimmed(text) == text.strip():
        assert transformers_ids(tokenizer, [text]) == tokenizer.ids([text])


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_tokens_may_be_spelled_out(text: str, own: Tokenizer) -> None:
    assert transformers_ids(own, [text]) == own.ids([text])


def test_special_tokens_are_fairseqs(own: Tokenizer) -> None:
    found = own.encode("<s><pad></s><unk> <mask>")
    assert found.ids == (0, 1, 2, 3, len(own) - 1)
    assert found.spans == ((0, 3), (3, 8), (8, 12), (12, 17), (18, 24))
    assert len(own) == len(own.to_transformers()) == tiny.vocabulary_size()


INVISIBLE = (
    "\u200b\u200c\u200d\u2060\u00ad\ufeff\u00a0\u3000\u200e\u200f\u202a\u202e\u2066\u2069\u061c\u180e\u034f"
    "\u3164\u2800\ufe0f\U000e0001\x00\t\n\u2028\x1b"
)


@pytest.mark.fault(115)
@pytest.mark.parametrize("sign", INVISIBLE, ids=lambda sign: f"U+{ord(sign):04X}")
def test_what_is_invisible_at_the_ends_changes_nothing(sign: str, own: Tokenizer, mini: Tokenizer) -> None:
    for tokenizer in (own, mini):
        for text in (tiny.CAT, "große Katze", "猫 🐈", ""):
            for other in (sign + text, text + sign, f" {sign}{sign} {text} {sign} \u200b{sign}"):
                if text.endswith("🐈") and sign in "\ufe0f\U000e0001":
                    continue  # a part of the sign before it
                assert tokenizer.ids([other]) == tokenizer.ids([text])
                assert trimmed(other) == text
    assert own.ids([tiny.CAT * 9 + sign]) == own.ids([tiny.CAT * 9])
    assert own.lost_text(sign + tiny.CAT) == ""


def test_a_selector_stays_with_its_sign(mini: Tokenizer) -> None:
    assert trimmed("\ufe0f a \u2764\ufe0f\u200d ") == "a \u2764\ufe0f"
    flag = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    assert trimmed(flag + " ") == flag
    assert mini.ids(["a \u2764\ufe0f"]) == [xlm_roberta_ids(mini, "a \u2764\ufe0f")]


def test_what_is_invisible_inside_is_left_alone(mini: Tokenizer) -> None:
    for text in ("नक\u094d\u200dष", "می\u200cخواهم", "soft\u00adhyphen", "👩\u200d🎨 art"):
        assert mini.ids([text]) == [xlm_roberta_ids(mini, text)]


@pytest.mark.parametrize("text", ["\ud83d", "a \ud800 cat"])
def test_half_a_character_is_an_unknown_one(text: str, mini: Tokenizer) -> None:
    """As a wrongly cut text, or a command line that is not UTF-8, has them."""
    assert mini.encode(text).ids == mini.encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")).ids


def test_spans_are_places_in_the_text_as_typed(mini: Tokenizer) -> None:
    text = "\u200b  m\u00f4\u0323t ｶﾞ <mask> ½"
    pieces = [text[first:last].strip() for first, last in mini.encode(text).spans]
    assert "".join(pieces) == "mộtｶﾞ<mask>½".replace("ộ", "\u00f4\u0323")
    assert {"<mask>", "ｶﾞ", "\u00f4\u0323"} <= set(pieces)


def test_ids_are_cut_and_padded_as_asked(own: Tokenizer) -> None:
    assert own.ids([LONG, ""], max_tokens=5) == [[*own.ids([LONG])[0][:4], 2], [0, 2, 1, 1, 1]]
    assert own.ids([]) == []


@pytest.mark.parametrize("text", [tiny.CAT, "", "   ", tiny.SENTENCES[5]])
def test_a_short_prompt_loses_nothing(text: str, own: Tokenizer) -> None:
    assert own.lost_text(text) == ""


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize(
    "text", [LONG, "猫" * 200, "a photo of a cat, " * 40, "\u200b một ngôi sao lớn " * 40, "<s> cat " * 60]
)
def test_the_lost_part_is_what_the_tokens_do_not_cover(text: str, form: Form, own: Tokenizer) -> None:
    text = unicodedata.normalize(form, text)
    lost = own.lost_text(text)
    assert lost and text.endswith(lost)
    kept = text[: len(text) - len(lost)]
    assert own.ids([kept]) == own.ids([text])
    assert own.lost_text(kept) == ""


def test_one_token_too_many_is_noticed(own: Tokenizer) -> None:
    count = len(own.encode(tiny.CAT).ids) + 2
    assert own.lost_text(tiny.CAT, count) == ""
    assert own.lost_text(tiny.CAT, count - 1).strip() != ""


@pytest.mark.fault(109)
def test_threads_share_a_tokenizer(own: Tokenizer) -> None:
    texts = [" ".join([tiny.CAT] * (i % 13)) + str(i) for i in range(400)]
    expected = [(own.ids([text]), own.lost_text(text)) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: (own.ids([text]), own.lost_text(text)), texts * 5))
        twins = {id(twin) for twin in pool.map(lambda _: load_tokenizer(own.path).to_transformers(), range(2))}
        same = {id(twin) for twin in pool.map(lambda _: own.to_transformers(), range(20))}
    assert found == expected * 5
    assert len(same) == 1 and len(twins) == 2


def test_it_is_copied_and_sent_to_other_processes(own: Tokenizer) -> None:
    assert copy.deepcopy(own) is own
    again = pickle.loads(pickle.dumps(own))
    assert again.path == own.path and len(again) == len(own) and again.ids([LONG]) == own.ids([LONG])


def test_scripts_call_it_as_they_do_with_transformers(own: Tokenizer) -> None:
    twin = own.to_transformers()
    prompts = [tiny.CAT, LONG]
    batch = twin(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert batch["input_ids"].tolist() == own.ids(prompts)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(own.encode(tiny.CAT).ids) + 2, 77]
    assert twin.model_max_length == 77
    rows = [
        twin(text, padding="do_not_pad", truncation=True, max_length=twin.model_max_length).input_ids
        for text in prompts
    ]
    padded = twin.pad({"input_ids": rows}, padding=True, return_tensors="pt").input_ids
    assert padded.tolist() == own.ids(prompts)
    assert (twin.bos_token_id, twin.pad_token_id, twin.eos_token_id, twin.unk_token_id) == (0, 1, 2, 3)
    assert twin.decode(own.encode(tiny.CAT).ids) == tiny.CAT


def tokenizer_json(own: Tokenizer, folder: Path, kind: str) -> Path:
    """A tokenizer.json in one of the layouts in use."""
    own.to_transformers().save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    table = next(step for step in data["normalizer"]["normalizers"] if step["type"] == "Precompiled")
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    metaspace = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    if kind == "published":
        data["normalizer"] = table
        data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    elif kind == "converted":
        data["normalizer"] = {"type": "Sequence", "normalizers": [table, spaces]}
        data["pre_tokenizer"] = metaspace
        data["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0}
        data["padding"] = {
            "strategy": {"Fixed": 9},
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<pad>",
            "direction": "Right",
        }
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize("kind", ["saved by us", "published", "converted"])
def test_a_tokenizer_json_gives_the_same_ids(kind: str, own: Tokenizer, tmp_path: Path) -> None:
    again = load_tokenizer(tokenizer_json(own, tmp_path, kind))
    texts = [*TEXTS, *SPECIAL_TEXTS, *(text for pair in EQUAL for text in pair)]
    assert again.ids(texts) == own.ids(texts)
    assert len(again) == len(own)
    assert transformers_ids(again, list(TEXTS)) == again.ids(TEXTS)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", {"type": "Lowercase"}, "Lowercase"),
        ("normalizer", {"type": "NFKC"}, "0 tables"),
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}, "Replace"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "ByteLevel"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "BPE"),
        ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]] * 9}, "first tokens"),
    ],
)
def test_a_tokenizer_json_of_another_kind_is_refused(
    part: str, value: dict[str, Any], message: str, own: Tokenizer, tmp_path: Path
) -> None:
    path = tokenizer_json(own, tmp_path, "published")
    path.write_text(json.dumps(json.loads(path.read_text()) | {part: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def write_added(folder: Path, kind: str, tokens: dict[str, int], own: Tokenizer) -> Path:
    """A tokenizer with added tokens, named in one of the files that do."""
    tiny.write_tokenizer(folder)
    if kind == "added_tokens.json":
        (folder / kind).write_text(json.dumps(tokens))
    if kind == "tokenizer_config.json":
        known = {"0": {"content": "<s>"}, str(len(own) - 1): {"content": "<mask>", "lstrip": True}}
        decoder = {**known, **{str(i): {"content": token, "special": False} for token, i in tokens.items()}}
        (folder / kind).write_text(json.dumps({"added_tokens_decoder": decoder}))
    if kind == "tokenizer.json":
        path = tokenizer_json(own, folder, "published")
        data = json.loads(path.read_text())
        data["added_tokens"] += [{"id": i, "content": token, "special": False} for token, i in tokens.items()]
        path.write_text(json.dumps(data))
        (folder / "sentencepiece.bpe.model").unlink()
    return next(path for name in ("sentencepiece.bpe.model", "tokenizer.json") if (path := folder / name).is_file())


NAMES_TOKENS = ("added_tokens.json", "tokenizer_config.json", "tokenizer.json")


@pytest.mark.parametrize("kind", NAMES_TOKENS)
def test_added_tokens_are_tokens(kind: str, own: Tokenizer, tmp_path: Path) -> None:
    size = len(own)
    path = write_added(tmp_path, kind, {"<my dog>": size, "<my": size + 1, "<mask>": size - 1}, own)
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == size + 2 == len(tokenizer.to_transformers())
    texts = ["a photo of <my dog> on a chair", "<my cat<my dog>", tiny.CAT, "<mask>"]
    assert [i for i in tokenizer.ids(texts[:2])[1] if i >= size] == [size + 1, size]
    assert tokenizer.ids(texts[2:]) == own.ids(texts[2:])
    assert transformers_ids(tokenizer, texts) == tokenizer.ids(texts)
    assert pickle.loads(pickle.dumps(tokenizer)).ids(texts) == tokenizer.ids(texts)


@pytest.mark.parametrize("kind", NAMES_TOKENS)
@pytest.mark.parametrize("place", [-3, 1, 1000])
def test_added_tokens_that_do_not_fit_are_named(kind: str, place: int, own: Tokenizer, tmp_path: Path) -> None:
    path = write_added(tmp_path, kind, {"<my dog>": len(own) + place}, own)
    with pytest.raises(
        CheckpointError, match=rf"'<my dog>' has the id {len(own) + place}, but.* {len(own)} tokens"
    ) as caught:
        load_tokenizer(path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{nope", '{"a": "b"}', '{"": 5}', '{"a": true}', '{"a": -1}', "[" * 100_000, "\x00"]
)
def test_broken_added_tokens_are_named(text: str, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        load_tokenizer(tmp_path / "sentencepiece.bpe.model")


@pytest.mark.parametrize(
    "text", ["", "[]", "{nope", "{}", '{"added_tokens_decoder": 5}', '{"added_tokens_decoder": {"x": {}}}']
)
def test_nothing_else_of_tokenizer_config_json_matters(text: str, own: Tokenizer, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert len(load_tokenizer(tmp_path / "sentencepiece.bpe.model")) == len(own)


def test_a_model_with_an_added_token_draws_with_it(own: Tokenizer, tmp_path: Path) -> None:
    key = "cond_stage_model.roberta.embeddings.word_embeddings.weight"
    state = dict(tiny.tiny_state("m9"))
    state[key] = torch.cat([state[key][: len(own)], torch.ones(1, state[key].shape[1])])
    folder = tiny.write_flagai_folder(tmp_path / "model", "m9", state)
    with pytest.raises(CheckpointError, match="tokens"):
        load_model(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<my dog>": len(own)}))
    model = load_model(folder)
    assert len(own) in model.tokenize(["a photo of <my dog>"])[0].tolist()
    assert model.get_learned_conditioning(["a photo of <my dog>"]).isfinite().all()
    for layout, name in (("flagai", "folder"), ("diffusers", "parts"), ("single", "single/model.safetensors")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        convert(folder, tmp_path / name, layout)
        again = load_model(tmp_path / name)
        assert torch.equal(again.tokenize(["a photo of <my dog>"]), model.tokenize(["a photo of <my dog>"]))


def test_a_model_without_tokenizer_says_so(m9: LatentDiffusion) -> None:
    tokenizer, m9.text_tokenizer = m9.text_tokenizer, None
    try:
        with pytest.raises(RuntimeError, match="tokenizer"):
            m9.tokenize(["a"])
    finally:
        m9.text_tokenizer = tokenizer


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


@pytest.mark.fault(116)
def test_hidden_files_are_no_tokenizers(tmp_path: Path) -> None:
    for name in ("._sentencepiece.bpe.model", ".tokenizer.json", "._tokenizer.json"):
        (tmp_path / name).write_bytes(b"Mac OS X")
    assert own_tokenizer(tmp_path) is None
    (tmp_path / "model").mkdir()
    tiny.write_tokenizer(tmp_path / ".hidden")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        find_tokenizer(tmp_path / "model", tiny.vocabulary_size())


@pytest.mark.fault(40)
@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"\x00" * 100, b"version https://git-lfs.github.com/spec/v1\n", b"[" * 10**5]
)
@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "tokenizer.json"])
def test_a_broken_file_is_named(data: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path / name)


@pytest.mark.fault(40)
def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="more than"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_long_texts_take_time_in_proportion(mini: Tokenizer) -> None:
    for text in (
        "e" + "\u0301\u0323" * 10**5,
        "e\u0345" + "\u0301" * 10**5,
        "\u1100" * 10**5,
        "\u200b" * 10**6,
        "<s" * 10**5,
        "猫" * 10**5,
    ):
        mini.ids([text])


LIGHT = """
import sys
from pathlib import Path
from flagai_altdiff.tokenizer import load_tokenizer
load_tokenizer(Path(sys.argv[1])).ids(["a cat"])
heavy = {"torch", "transformers", "tokenizers", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_tokens_need_neither_torch_nor_transformers(script_environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-c", LIGHT, str(MINI)], check=True, env=script_environment, timeout=120)
