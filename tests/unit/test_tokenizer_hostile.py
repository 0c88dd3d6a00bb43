"""Tokenizers that are made up: refused at a cost in proportion, or understood; never a hang, a crash or a panic."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import find_tokenizer, load_path
from flagai_altdiff.registry import embedded_dir
from flagai_altdiff.tokenizer import Tokenizer, load_tokenizer
from flagai_altdiff.tokenizer.text import SIMPLE, joins
from tests import tiny
from tests.cost import in_proportion

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60"))
MINI = embedded_dir() / "AltDiffusion-mini" / "sentencepiece.bpe.model"
PROMPT = "a photo of a cat 猫 é ﬁ ½ \u200b<mask>"
KINDS = ModelProto.SentencePiece
Change = Callable[[Any], object]


def model(change: Change = lambda proto: None) -> bytes:
    """A small SentencePiece model, changed."""
    proto = ModelProto.FromString(tiny.sentencepiece_model())
    change(proto)
    return bytes(proto.SerializeToString())


def as_json(change: Change = lambda file: None) -> bytes:
    """A small tokenizer.json, changed."""
    proto = ModelProto.FromString(tiny.sentencepiece_model())
    pieces = [[piece.piece, piece.score] for piece in proto.pieces[3:]]
    vocabulary = [["<s>", 0.0], ["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], *pieces, ["<mask>", 0.0]]
    table = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    file = {
        "added_tokens": [{"id": 3, "content": "<unk>"}],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True},
        "model": {"type": "Unigram", "unk_id": 3, "vocab": vocabulary},
    }
    changed = change(file)
    return json.dumps(file if changed is None else changed).encode()


def use(path: Path) -> Tokenizer:
    """Load a tokenizer and do with it what is done with one."""
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.ids([PROMPT])[0]) == 77
    tokenizer.lost_text(PROMPT)
    twin = tokenizer.to_transformers()
    assert len(twin(PROMPT)["input_ids"]) > 1
    return tokenizer


def refused_or_used(data: bytes, path: Path) -> str:
    """Why a tokenizer was refused, if it was; at a cost in proportion, and in words that name it."""
    path.write_bytes(data)
    message = ""
    with in_proportion(len(data)):
        try:
            use(path)
        except CheckpointError as error:
            message = str(error)
    assert not message or (str(path.parent) in message and len(message) < 1000 and message.isprintable()), message
    return message


def table(units: list[int], text: bytes) -> bytes:
    """A table as SentencePiece's normaliser has it."""
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + text


def unit(label: int, offset: int, ends: bool = False) -> int:
    return label | ends << 8 | offset << 10


def replacing(letter: str, by: bytes) -> bytes:
    """A table with one key: the letter's."""
    units = [unit(0, 256), *[1 << 31] * 511]
    units[256 ^ ord(letter)] = unit(ord(letter), 256 ^ ord(letter) ^ 384, ends=True)
    units[384] = 1 << 31 | 1
    return table(units, b"\0" + by + b"\0")


def circular() -> bytes:
    """A table whose key never ends: after an ``a`` comes an ``a``."""
    units = [unit(0, 256), *[1 << 31] * 511]
    units[256 ^ ord("a")] = unit(ord("a"), ord("a"))
    return table(units, b"\0x\0")


def normaliser(charsmap: bytes) -> Change:
    def change(proto: Any) -> None:
        proto.normalizer_spec.precompiled_charsmap = charsmap

    return change


@pytest.fixture(scope="module")
def warm() -> None:
    """Libraries that are loaded once are not what a file costs."""
    use(MINI)


def many_pieces(proto: Any) -> None:
    proto.pieces.extend(KINDS(piece=f"p{i:x}", score=-1.0) for i in range(400_000))


def nested_pieces(proto: Any) -> None:
    proto.pieces.extend(KINDS(piece="a" * i, score=-1.0 / i) for i in range(200, 3000))


SENTENCEPIECE: dict[str, Change] = {
    "a piece of a megabyte": lambda p: p.pieces.add(piece="a" * 1_000_000, score=-1.0),
    "each piece the beginning of the next": nested_pieces,
    "400,000 pieces": many_pieces,
    "NaN": lambda p: p.pieces.add(piece="qq", score=float("nan")),
    "infinity": lambda p: p.pieces.add(piece="qq", score=float("inf")),
    "minus infinity": lambda p: p.pieces.add(piece="qq", score=float("-inf")),
    "both infinities": lambda p: p.pieces.extend([KINDS(piece="q1", score=x) for x in (float("inf"), float("-inf"))]),
    "a piece twice": lambda p: p.pieces.add(piece=p.pieces[9].piece, score=-1.0),
    "an empty piece": lambda p: p.pieces.add(piece="", score=-1.0),
    "two unknown": lambda p: p.pieces.add(piece="qq", score=-1.0, type=KINDS.UNKNOWN),
    "no pieces": lambda p: p.ClearField("pieces"),
    "bytes": lambda p: setattr(p.trainer_spec, "byte_fallback", True),
    "BPE": lambda p: setattr(p.trainer_spec, "model_type", TrainerSpec.BPE),
    "WORD": lambda p: setattr(p.trainer_spec, "model_type", TrainerSpec.WORD),
    "CHAR": lambda p: setattr(p.trainer_spec, "model_type", TrainerSpec.CHAR),
    "table: random": normaliser(os.urandom(5000)),
    "table: short": normaliser(b"\x01"),
    "table: no text": normaliser(struct.pack("<I", 1024) + b"\0" * 1024),
    "table: size beyond": normaliser(struct.pack("<I", 1 << 31) + b"\0" * 2048),
    "table: size that wraps": normaliser(struct.pack("<I", (1 << 32) - 4) + b"\0" * 2048),
    "table: leads outside": normaliser(table([unit(0, 1 << 20)] * 256, b"\0x\0")),
    "table: leads far outside": normaliser(table([unit(0, 1 << 21) | 1 << 9] * 256, b"\0x\0")),
    "table: circular": normaliser(circular()),
    "table: to a megabyte": normaliser(replacing("a", b"x" * 1_000_000)),
    "table: to a thousand": normaliser(replacing("a", b"x" * 1_000)),
    "table: no end": normaliser(replacing("a", b"x" * 9)[:-1]),
    "table: no text but bytes": normaliser(replacing("a", b"\xff\xfe")),
    "table: behind the text": normaliser(replacing("a", b"x")[:-3] + b"\0"),
    "table: all zero": normaliser(table([0] * 256, b"\0")),
    "table: all ones": normaliser(table([0xFFFFFFFF] * 256, b"\0")),
}


@pytest.mark.fault(149)
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_a_hostile_sentencepiece_model_is_refused(name: str, tmp_path: Path, warm: None) -> None:
    message = refused_or_used(model(SENTENCEPIECE[name]), tmp_path / "sentencepiece.bpe.model")
    assert "not a readable XLM-R tokenizer" in message or name in ("table: all zero", "table: all ones"), name


@pytest.mark.fault(149)
def test_small_tables_are_used(tmp_path: Path, warm: None) -> None:
    """What the tables above break is otherwise a table."""
    path = tmp_path / "sentencepiece.bpe.model"
    path.write_bytes(model(normaliser(replacing("a", b"c"))))
    found = use(path)
    assert found.ids(["a"]) == found.ids(["c"]) != found.ids(["d"])


@pytest.mark.fault(149)
def test_what_xlm_r_has_not_is_left_out(tmp_path: Path, warm: None) -> None:
    def add(proto: Any) -> None:
        proto.denormalizer_spec.precompiled_charsmap = b"\xff" * 100
        proto.normalizer_spec.normalization_rule_tsv = "\x1b[31m" * 100
        proto.trainer_spec.input.append("/etc/passwd")
        proto.trainer_spec.treat_whitespace_as_suffix = True

    path = tmp_path / "sentencepiece.bpe.model"
    self_test = b"\x22\x0a\x0a\x08\x0a\x01a\x12\x03x y"
    path.write_bytes(model(add) + self_test)
    found = use(path)
    tiny.write_tokenizer(tmp_path / "plain")
    plain = load_tokenizer(tmp_path / "plain" / "sentencepiece.bpe.model")
    assert found.same_as(plain) and found.ids([PROMPT, *tiny.SENTENCES]) == plain.ids([PROMPT, *tiny.SENTENCES])


def test_released_settings_of_the_normaliser_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "sentencepiece.bpe.model"
    path.write_bytes(model(lambda p: setattr(p.normalizer_spec, "add_dummy_prefix", False)))
    tiny.write_tokenizer(tmp_path / "plain")
    plain = load_tokenizer(tmp_path / "plain" / "sentencepiece.bpe.model")
    assert load_tokenizer(path).ids(["cat"]) != plain.ids(["cat"])
    for name in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert name in NormalizerSpec.DESCRIPTOR.fields_by_name


def vocabulary(file: dict[str, Any]) -> list[Any]:
    return file["model"]["vocab"]  # type: ignore[no-any-return]


def step(**fields: object) -> Change:
    def change(file: dict[str, Any]) -> None:
        file["normalizer"] = {"type": "Sequence", "normalizers": [file["normalizer"], fields]}

    return change


def deep(name: str, inner: str) -> Change:
    def change(file: dict[str, Any]) -> None:
        for _ in range(200):
            file[name] = {"type": "Sequence", inner: [file[name]]}

    return change


def wide(name: str, inner: str) -> Change:
    def change(file: dict[str, Any]) -> None:
        file[name] = {"type": "NFC" if name == "normalizer" else "WhitespaceSplit"}
        for _ in range(5):
            file[name] = {"type": "Sequence", inner: [file[name]] * 9}

    return change


JSON: dict[str, Change] = {
    "doubling": step(type="Replace", pattern={"String": "a"}, content="aa"),
    "doubling what is harmless": step(type="Replace", pattern={"Regex": " {2,}"}, content=" " * 10_000),
    "a harmless pattern of another step": step(type="Prepend", pattern={"Regex": " {2,}"}, prepend="x" * 10_000),
    "catastrophic": step(type="Replace", pattern={"Regex": "(a*)*(b*)*$"}, content=""),
    "a regex to split by": lambda f: f.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a*)*$"}}),
    "another blank": lambda f: f.update(pre_tokenizer={"type": "Metaspace", "replacement": "x"}),
    "deep normalisers": deep("normalizer", "normalizers"),
    "deep splitters": deep("pre_tokenizer", "pretokenizers"),
    "many normalisers": wide("normalizer", "normalizers"),
    "many splitters": wide("pre_tokenizer", "pretokenizers"),
    "no steps": lambda f: f.update(normalizer={"type": "Sequence"}),
    "a step that is a list": lambda f: f.update(normalizer=[f["normalizer"]]),
    "a normaliser of text": lambda f: f.update(normalizer="NFKC"),
    "two tables": lambda f: f.update(normalizer={"type": "Sequence", "normalizers": [f["normalizer"]] * 2}),
    "a table that is none": lambda f: f["normalizer"].update(precompiled_charsmap="AAAA"),
    "a table of another type": lambda f: f["normalizer"].update(precompiled_charsmap=[1]),
    "a table of no base64": lambda f: f["normalizer"].update(precompiled_charsmap="\ud800"),
    "a table in circles": lambda f: f["normalizer"].update(precompiled_charsmap=base64.b64encode(circular()).decode()),
    "a list": lambda f: [f],
    "a text": lambda f: "x",
    "nothing": lambda f: {},
    "no vocabulary": lambda f: f["model"].pop("vocab"),
    "an empty vocabulary": lambda f: f["model"].update(vocab=[]),
    "a vocabulary of numbers": lambda f: f["model"].update(vocab=[1, 2, 3, 4, 5]),
    "scores of text": lambda f: vocabulary(f).append(["x", "-1"]),
    "scores that are true": lambda f: vocabulary(f).append(["x", True]),
    "scores of 6000 digits": lambda f: vocabulary(f).append(["qq", 10**300]),
    "half a character": lambda f: vocabulary(f).append(["\ud800", -1.0]),
    "a long piece": lambda f: vocabulary(f).append(["x" * 100_000, -1.0]),
    "another unknown": lambda f: f["model"].update(unk_id=7),
    "bytes": lambda f: f["model"].update(byte_fallback=True),
    "a type that is a list": lambda f: f["model"].update(type=["Unigram"]),
    "many added tokens": lambda f: f.update(added_tokens=[{"id": i + 999, "content": f"<{i}>"} for i in range(5000)]),
    "a long added token": lambda f: f["added_tokens"].append({"id": 999, "content": "x" * 100_000}),
    "an added token with two ids": lambda f: f["added_tokens"].append({"id": 2, "content": "<unk>"}),
    "an added token of a list": lambda f: f["added_tokens"].append({"id": [2], "content": ["x"]}),
    "an added token without a name": lambda f: f["added_tokens"].append({"id": 2}),
    "added tokens that are a mapping": lambda f: f.update(added_tokens={"a": 1}),
}


@pytest.mark.fault(149)
@pytest.mark.parametrize("name", JSON)
def test_a_hostile_tokenizer_json_is_refused(name: str, tmp_path: Path, warm: None) -> None:
    assert "not a readable XLM-R tokenizer" in refused_or_used(as_json(JSON[name]), tmp_path / "tokenizer.json"), name


@pytest.mark.fault(149)
@pytest.mark.parametrize(
    "change",
    [
        lambda f: None,
        step(type="Replace", pattern={"Regex": " {2,}"}, content=" "),
        step(type="Replace", pattern={"Regex": " {2,}"}, content="▁"),
        step(type="Strip", strip_left=False, strip_right=True),
        step(type="Sequence", normalizers=[{"type": "NFKC"}]),
        lambda f: f.update(pre_tokenizer=None),
        lambda f: f.update(post_processor={"type": "Nonsense"}, decoder=[1], truncation="x", padding=7),
    ],
)
def test_a_tokenizer_json_of_a_known_form_is_used(change: Change, tmp_path: Path, warm: None) -> None:
    """And the tokenizers library is never given the file's own steps."""
    assert refused_or_used(as_json(change), tmp_path / "tokenizer.json") == ""


@pytest.mark.fault(149)
@pytest.mark.parametrize("name", ["sentencepiece.bpe.model", "tokenizer.json"])
@pytest.mark.parametrize("size_mb", [17, 49, 4000])
def test_a_file_larger_than_any_tokenizer_is_refused(name: str, size_mb: int, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(size_mb << 20)
    with in_proportion(min(size_mb, 49) << 20), pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path / name)


LONG_TEXTS = {
    "words": "a photo of a cat " * 60_000,
    "one letter": "a" * 1_000_000,
    "Han": "猫" * 333_000,
    "kana": "ガ" * 333_000,
    "the longest ligature": "\ufdfa" * 333_000,
    "marks": "e\u0301" * 333_000,
    "only marks": "\u0301\u0323" * 250_000,
    "invisible": "a" + "\u200b" * 333_000 + "a",
    "blanks": "a" + " " * 1_000_000 + "a",
    "special tokens": "<mask>" * 160_000,
    "nearly special tokens": "<mask" * 200_000,
    "emoji": "😀" * 250_000,
}


@pytest.mark.fault(149)
@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_text_of_a_megabyte_costs_in_proportion(name: str) -> None:
    tokenizer, text = load_tokenizer(MINI), LONG_TEXTS[name]
    tokenizer.ids(["warm"])
    with in_proportion(len(text.encode())):
        ids = tokenizer.ids([text])
    with in_proportion(len(text.encode())):
        lost = tokenizer.lost_text(text)
    assert ids == tokenizer.ids([text[:20_000] if name not in ("Han", "invisible", "blanks") else text])
    assert not lost or text.endswith(lost)


@pytest.mark.fault(149)
def test_tokens_of_a_long_text_are_those_of_the_whole(tmp_path: Path) -> None:
    for tokenizer in (load_tokenizer(MINI), use_plain(tmp_path)):
        for text in (" ".join(tiny.SENTENCES) * 60, "castleonahillatsunset" * 1200, "一只戴着帽子的小狗" * 3000):
            assert len(text) > 20_000
            whole = tokenizer.encode(text)
            assert tokenizer.ids([text])[0][1:76] == list(whole.ids[:75])
            assert tokenizer.lost_text(text) == text[whole.spans[75][0] :]


def use_plain(folder: Path) -> Tokenizer:
    tiny.write_tokenizer(folder)
    return load_tokenizer(folder / "sentencepiece.bpe.model")


@pytest.mark.fault(149)
def test_many_added_tokens_cost_a_text_little(tmp_path: Path) -> None:
    plain = use_plain(tmp_path / "plain")
    tiny.write_tokenizer(tmp_path)
    added = {"a" * 100 + f"{i:03}": len(plain) + i for i in range(1000)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    tokenizer = load_tokenizer(tmp_path / "sentencepiece.bpe.model")
    text = "a" * 1_000_000
    with in_proportion(len(text)):
        assert tokenizer.ids([text]) == plain.ids([text])
    assert len(plain) + 7 in tokenizer.ids(["x " + "a" * 100 + "007"])[0]
    (tmp_path / "added_tokens.json").write_text(json.dumps({f"<{i}>": len(plain) + i for i in range(1001)}))
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        load_tokenizer(tmp_path / "sentencepiece.bpe.model")


def test_simple_signs_are_simple() -> None:
    """None is changed by NFC, alone or after another; so a run of them need not be looked at letter by letter."""
    signs = [chr(code) for code in range(0x110000) if SIMPLE.fullmatch(chr(code))]
    assert len(signs) > 40_000
    assert not [sign for sign in signs if any(joins(letter, sign) for letter in "aÿ가각猫😀")]


@pytest.mark.fault(147)
def test_two_tokenizers_in_one_folder_must_agree(tmp_path: Path) -> None:
    own = use_plain(tmp_path)
    own.to_transformers().save_pretrained(tmp_path)
    assert load_tokenizer(own.path).same_as(own)
    other = use_plain_of(tmp_path / "other", seed=1)
    other.to_transformers().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json beside it are different tokenizers"):
        load_tokenizer(own.path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "model": {"type": "BPE"}}))
    assert load_tokenizer(own.path).same_as(own)  # nothing of ours: it says nothing
    own.to_transformers().save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"].append({"id": len(own), "content": "<dog>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="different tokenizers"):
        load_tokenizer(own.path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<dog>": len(own)}))
    assert len(load_tokenizer(own.path)) == len(own) + 1


def use_plain_of(folder: Path, seed: int) -> Tokenizer:
    tiny.write_tokenizer(folder, seed=seed)
    return load_tokenizer(folder / "sentencepiece.bpe.model")


@pytest.mark.fault(147)
def test_an_added_token_of_two_ids_is_named(tmp_path: Path) -> None:
    own = use_plain(tmp_path)
    decoder = {str(len(own)): {"content": "<dog>"}, str(len(own) + 1): {"content": "<cat>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<dog>": len(own) + 1, "<cat>": len(own)}))
    with pytest.raises(CheckpointError, match=r"'<(dog|cat)>' has the id \d+ in one file and \d+ in another"):
        load_tokenizer(own.path)
    (tmp_path / "added_tokens.json").write_text(f'{{"<dog>": {len(own)}, "<dog>": {len(own)}}}')
    with pytest.raises(CheckpointError, match=r"added_tokens\.json"):
        load_tokenizer(own.path)


@pytest.mark.fault(149)
def test_neighbours_are_read_as_carefully_as_ones_own(tmp_path: Path, warm: None) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for i, (name, change) in enumerate(SENTENCEPIECE.items()):
        if name not in ("table: all zero", "table: all ones", "400,000 pieces"):
            (tmp_path / f"n{i}").mkdir()
            (tmp_path / f"n{i}" / "sentencepiece.bpe.model").write_bytes(model(change))
    for i, change in enumerate(JSON.values()):
        (tmp_path / f"m{i}").mkdir()
        (tmp_path / f"m{i}" / "tokenizer.json").write_bytes(as_json(change))
    (tmp_path / "o").mkdir()
    os.mkfifo(tmp_path / "o" / "sentencepiece.bpe.model")
    (tmp_path / "p").symlink_to(tmp_path / "p")
    tiny.write_tokenizer(tmp_path / "z")
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file())
    with in_proportion(size):
        assert find_tokenizer(folder, tiny.vocabulary_size()).parent == tmp_path / "z"


@pytest.mark.fault(149)
def test_a_model_with_a_hostile_tokenizer_does_not_load(tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    (folder / "sentencepiece.bpe.model").write_bytes(model(normaliser(circular())))
    with pytest.raises(CheckpointError, match=r"sentencepiece\.bpe\.model is not a readable XLM-R tokenizer"):
        load_path(folder)


CRASH = """
import sys
from pathlib import Path
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.tokenizer import load_tokenizer
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        tokenizer = load_tokenizer(path / "sentencepiece.bpe.model")
        tokenizer.ids(["a photo of a cat", "a" * 5000, "\u732b\ufb01"])
    except CheckpointError:
        pass
"""


@pytest.mark.fault(149)
def test_tables_that_lead_outside_do_not_end_the_process(tmp_path: Path, script_environment: dict[str, str]) -> None:
    """SentencePiece reads where they point."""
    for i, name in enumerate(name for name in SENTENCEPIECE if name.startswith("table")):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "sentencepiece.bpe.model").write_bytes(model(SENTENCEPIECE[name]))
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], env=script_environment, timeout=120, check=False
    )
    assert done.returncode == 0


# Structure-aware: fields of a SentencePiece model and of a tokenizer.json with values that they should not have.

TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", "▁", "<s>", "a" * 129, "a" * 5000, "\0", "<unk>", "▁a", "\x1b[31m", "猫", "\ue000"]),
)
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, 1e38, -1e38, -1e-38]))


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """A real table with some units exchanged, or one made up."""
    real = ModelProto.FromString(tiny.sentencepiece_model()).normalizer_spec.precompiled_charsmap
    kind = draw(st.integers(0, 2))
    if kind == 0:
        changed = bytearray(real)
        for place, value in draw(
            st.lists(st.tuples(st.integers(0, len(real) // 4 - 1), UNITS), min_size=1, max_size=9)
        ):
            changed[4 * place : 4 * place + 4] = struct.pack("<I", value)
        return bytes(changed)
    if kind == 1:
        return real[: draw(st.integers(0, len(real)))] + draw(st.binary(max_size=9))
    units = draw(st.lists(UNITS, min_size=1, max_size=16)) * 64
    return table(units, draw(st.binary(max_size=40)) + b"\0" * draw(st.integers(0, 1)))


UNITS = st.builds(
    lambda label, offset, ends, wide, leaf: label | ends << 8 | wide << 9 | offset << 10 | leaf << 31,
    st.integers(0, 255),
    st.one_of(st.integers(0, 1 << 10), st.integers(0, (1 << 21) - 1)),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
PIECES = st.builds(lambda text, score, kind: (text, score, kind), TEXTS, FLOATS, st.integers(1, 6))
BOOLS = ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces")


@pytest.mark.fault(149)
def test_any_sentencepiece_model_is_used_or_refused(tmp_path: Path, warm: None) -> None:
    path = tmp_path / "sentencepiece.bpe.model"

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        proto = ModelProto.FromString(tiny.sentencepiece_model())
        for text, score, kind in data.draw(st.lists(PIECES, max_size=4)):
            proto.pieces.add(piece=text.encode("utf-8", "replace").decode(), score=score, type=kind)
        for place, (text, score, kind) in data.draw(st.dictionaries(st.integers(0, 9), PIECES, max_size=2)).items():
            proto.pieces[place].CopyFrom(KINDS(piece=text.encode("utf-8", "replace").decode(), score=score, type=kind))
        if data.draw(st.booleans()):
            proto.normalizer_spec.precompiled_charsmap = data.draw(tables())
        for name in data.draw(st.sets(st.sampled_from(BOOLS))):
            setattr(proto.normalizer_spec, name, data.draw(st.booleans()))
        if data.draw(st.booleans()):
            proto.trainer_spec.model_type = data.draw(st.integers(1, 4))
            proto.trainer_spec.byte_fallback = data.draw(st.booleans())
            proto.trainer_spec.unk_id = data.draw(st.integers(-5, 5))
        refused_or_used(proto.SerializeToString() + data.draw(st.binary(max_size=4)), path)

    survives()


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)
STEPS = st.one_of(
    VALUES,
    st.builds(
        lambda kind, pattern, content: {"type": kind, "pattern": pattern, "content": content},
        st.sampled_from(["Replace", "NFKC", "NFC", "Strip", "Prepend", "Lowercase", "Precompiled", "Sequence"]),
        st.one_of(st.sampled_from([{"Regex": " {2,}"}, {"Regex": "(a*)*$"}, {"String": "a"}]), VALUES),
        st.one_of(TEXTS, VALUES),
    ),
)


@pytest.mark.fault(149)
def test_any_tokenizer_json_is_used_or_refused(tmp_path: Path, warm: None) -> None:
    path = tmp_path / "tokenizer.json"

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        def change(file: dict[str, Any]) -> None:
            for name in data.draw(st.sets(st.sampled_from(list(file)), max_size=1)):
                file[name] = data.draw(VALUES)
            if isinstance(file["model"], dict):
                for name in data.draw(
                    st.sets(st.sampled_from(["type", "unk_id", "vocab", "byte_fallback"]), max_size=1)
                ):
                    file["model"][name] = data.draw(VALUES)
                if isinstance(entries := file["model"].get("vocab"), list):
                    entries[len(entries) // 2 : 0] = data.draw(st.lists(st.tuples(TEXTS, FLOATS), max_size=2))
                    entries += data.draw(st.lists(VALUES, max_size=1))
            if data.draw(st.booleans()):
                steps = data.draw(st.lists(STEPS, max_size=3))
                file["normalizer"] = {"type": "Sequence", "normalizers": [*steps, file["normalizer"]]}
            if isinstance(file["added_tokens"], list):
                file["added_tokens"] += data.draw(st.lists(VALUES, max_size=1))

        refused_or_used(as_json(change), path)

    survives()
