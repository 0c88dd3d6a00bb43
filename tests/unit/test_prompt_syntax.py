"""Prompts with weights: A1111's grammar in every script, and text wherever it is no grammar."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flagai_altdiff import generate
from flagai_altdiff.chunks import chunks
from flagai_altdiff.conditioning import encode_prompts, same_length
from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.prompt_syntax import has_weights, parse, read_as_text
from tests import tiny
from tests.cost import in_proportion


def read(prompt: str) -> list[tuple[str, float]]:
    """Runs of one weight, rounded; parts are joined by a bar."""
    found: list[tuple[str, float]] = []
    for number, part in enumerate(parse(prompt)):
        if number:
            found.append(("|", 0.0))
        for char, weight in zip(part.text, part.weights, strict=True):
            weight = round(weight, 3)
            if found and found[-1][1] == weight:
                found[-1] = (found[-1][0] + char, weight)
            else:
                found.append((char, weight))
    return found


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a cat", [("a cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        ("(red)", [("red", 1.1)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.909)]),
        ("[[red] cat]", [("red", 0.826), (" cat", 0.909)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-0.5)", [("a", -0.5)]),
        ("(a:.5)", [("a", 0.5)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] \\"[:-1], 1.0)]),
        (r"(a\):2)", [("a)", 2.0)]),
        ("a) b (c", [("a) b (c", 1.0)]),
        ("((a:2)", [("(", 1.0), ("a", 2.0)]),
        ("[(a])", [("a", 1.0)]),
        ("(:1.5)", []),
        ("()", []),
        ("(a:99)", [("(a:99)", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("（红色：1.3）的猫", [("红色", 1.3), ("的猫", 1.0)]),
        ("قطة (حمراء:1.2) كبيرة", [("قطة ", 1.0), ("حمراء", 1.2), (" كبيرة", 1.0)]),
        ("a BREAK b", [("a", 1.0), ("|", 0.0), ("b", 1.0)]),
        ("a\\b", [("ab", 1.0)]),
        ("a BREAKFAST break", [("a BREAKFAST break", 1.0)]),
        ("(a BREAK b:2)", [("a", 2.0), ("|", 0.0), ("b", 2.0)]),
        ("", []),
    ],
)
def test_the_grammar(prompt: str, found: list[tuple[str, float]]) -> None:
    assert read(prompt) == found


@given(st.text(alphabet="ab ():[]\\.1：（）", max_size=40))
def test_no_text_is_an_error(prompt: str) -> None:
    parts = parse(prompt)
    assert all(len(part.text) == len(part.weights) for part in parts)
    assert sum(len(part.text) for part in parts) <= len(prompt)


def test_without_weights_the_tokens_are_those_of_the_plain_text(m9: LatentDiffusion) -> None:
    engine = EagerEngine(m9)
    assert m9.text_tokenizer is not None
    for text in (tiny.CAT, "一只戴着帽子的小狗", "", "a, b"):
        (chunk,) = chunks(m9.text_tokenizer, text)
        assert chunk.row == m9.text_tokenizer.ids([text])[0]
        assert torch.equal(encode_prompts(m9, engine, [text], "weighted")[0], encode_prompts(m9, engine, [text])[0])


def test_weights_belong_to_their_words(m9: LatentDiffusion) -> None:
    assert m9.text_tokenizer is not None
    plain, (weighted,) = m9.text_tokenizer.encode("a red cat").ids, chunks(m9.text_tokenizer, "a (red:1.5) cat")
    assert weighted.ids == plain
    by_piece = dict(zip(weighted.pieces, weighted.weights, strict=True))
    assert sorted(set(by_piece.values())) == [1.0, 1.5] and by_piece[weighted.pieces[0]] == 1.0
    engine = EagerEngine(m9)
    before, after = (encode_prompts(m9, engine, [text], "weighted")[0] for text in ("a red cat", "a (red:1.5) cat"))
    assert not torch.allclose(before, after)
    assert after.mean().item() == pytest.approx(before.mean().item(), rel=1e-4), "as strong as before on the whole"


def test_long_prompts_take_several_chunks_that_end_at_commas(m9: LatentDiffusion) -> None:
    assert m9.text_tokenizer is not None
    text = ", ".join(["a castle on a hill"] * 40)
    found = chunks(m9.text_tokenizer, text)
    assert len(found) > 2 and all(len(chunk.ids) <= 75 for chunk in found)
    assert all(chunk.pieces[-1].strip() == "," for chunk in found[:-1])
    assert tuple(i for chunk in found for i in chunk.ids) == m9.text_tokenizer.encode(text).ids, "nothing is lost"
    without_commas = chunks(m9.text_tokenizer, "castle " * 200)
    assert len(without_commas[0].ids) == 75
    engine = EagerEngine(m9)
    states = encode_prompts(m9, engine, [text, tiny.CAT], "weighted")
    assert [len(own) for own in states] == [77 * len(found), 77], "a long neighbour changes nothing"
    (empty,) = encode_prompts(m9, engine, [""])
    long, short = same_length(states[0], empty, empty)
    assert len(long) == len(short) and torch.equal(short[:77], empty)


@pytest.mark.fault(48)
@pytest.mark.parametrize(
    "text",
    [
        "a" * 50 + "]" * 50,
        "(a" * 50 + "b)" * 50,
        "([" * 50 + ")]" * 50,
        " " * 100,
        " BREAK" * 20,
        "(a:" + "1" * 100,
        "<lora:" * 20,
    ],
)
def test_no_prompt_costs_more_than_its_length(text: str) -> None:
    for hostile in (text * 1000, "".join(char * 1000 for char in text)):
        with in_proportion(len(hostile), seconds=2.0):
            parse(hostile)
            has_weights(hostile)
            read_as_text(hostile)


@pytest.mark.fault(48)
def test_many_chunks_cost_no_more_than_their_length(m9: LatentDiffusion) -> None:
    assert m9.text_tokenizer is not None
    hostile = "x" * 600_000
    with in_proportion(len(hostile), seconds=5.0, megabytes=1000):
        found = chunks(m9.text_tokenizer, hostile)
    assert len(found) == -(-len(m9.text_tokenizer.encode(hostile).ids) // 75)


def test_of_many_open_brackets_the_inner_ones_count() -> None:
    (part,) = parse("(" * 100 + "a:2)" + ")" * 99)
    assert part.text == "(" * 36 + "a" + ")" * 36
    assert part.weights[36] == pytest.approx(2 * 1.1**63)


def test_a_prompt_that_seems_to_be_meant_otherwise_gets_a_note(m9: LatentDiffusion) -> None:
    small: dict[str, Any] = {"height": 64, "width": 64, "steps": 1}
    (note,) = generate(m9, "a (red:1.3) cat", **small).notes
    assert note.kind == "prompt syntax" and "prompt_syntax='weighted'" in note.text
    (note,) = generate(m9, "a <lora:x:1> [red:blue:0.5] cat AND [a|b]", prompt_syntax="weighted", **small).notes
    assert note.text == "read as mere text: '<lora:x:1>', '[red:blue:0.5]', 'AND'"
    for plain in ("a (small) cat, 4:3", "[a] cat", "(a: b)"):
        assert not generate(m9, plain, **small).notes
        assert not generate(m9, plain, prompt_syntax="weighted", **small).notes


def test_a_long_neighbour_changes_no_picture(m9: LatentDiffusion) -> None:
    small: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 1, "prompt_syntax": "weighted"}
    long = ", ".join(["a castle"] * 60)
    alone = generate(m9, [tiny.CAT, tiny.CASTLE], **small).images[0]
    for prompts in ([tiny.CAT, long], [tiny.CAT, "a BREAK b"]):
        together = generate(m9, prompts, **small, batch_size=2).images[0]
        assert abs(np.asarray(together).astype(int) - np.asarray(alone)).max() <= 1


def test_both_sides_of_guidance_may_have_other_lengths(m9: LatentDiffusion) -> None:
    small: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 1, "prompt_syntax": "weighted"}
    long = ", ".join(["a castle"] * 60)
    for prompt, negative in ((long, ""), ("a cat", long), ("a BREAK b", "c BREAK d BREAK e")):
        assert len(generate(m9, prompt, negative_prompt=negative, **small).images) == 1
    plain, weighted = (
        generate(m9, "a (cat:1.0)", **{**small, "prompt_syntax": s}).images[0] for s in ("plain", "weighted")
    )
    assert plain.tobytes() != weighted.tobytes()
    assert weighted.tobytes() == generate(m9, "a cat", **{**small, "prompt_syntax": "plain"}).images[0].tobytes()
