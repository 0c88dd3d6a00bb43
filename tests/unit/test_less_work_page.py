"""The tables of docs/performance.md that a command writes."""

from __future__ import annotations

import pytest

from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.request import GenerationRequest
from tests.benchmarks.less_work import CHAPTER, WAYS, multiplications, table
from tests.benchmarks.page import chapter_of, written


def test_tables_are_replaced_and_all_else_stays() -> None:
    begin, end = "<!-- b: begin -->", "<!-- b: end -->"
    page = f"# A\n\nbefore\n\n{begin}\nold\n{end}\n\n## After\n"
    once = written(page, "b", "| new |")
    assert once == f"# A\n\nbefore\n\n{begin}\n\n| new |\n\n{end}\n\n## After\n" == written(once, "b", "| new |")
    for broken in ("# A\n", page.replace(end, "")):
        with pytest.raises(ValueError, match="needs the lines"):
            written(broken, "b", "| new |")


def test_every_way_stands_in_the_page() -> None:
    content = chapter_of(CHAPTER)
    assert [way.label for way in WAYS if f"| {way.label} |" not in content] == []
    for way in WAYS:
        GenerationRequest(prompts=("a cat",), **way.options)


def test_ways_are_compared_round_by_round() -> None:
    seconds = {way.label: [10.0, 40.0, 10.0] if way.times_of == way.label else [5.0, 10.0, 4.0] for way in WAYS}
    seen = {way.label: {"right": [1.0, 0.0], "psnr": [30.0, 40.0, 50.0]} for way in WAYS}
    lines = table(seconds, seen).splitlines()
    assert len(lines) == 2 + len(WAYS)
    plain, other = (line.split(" | ") for line in lines[2:4])
    assert plain[1:3] == ["2500 ms", "1.00"] and other[1:3] == ["1250 ms", "2.50"]
    assert other[3].startswith("50.0 ±") and other[4] == "40 dB |"


def test_what_is_left_is_counted() -> None:
    whole, merged = (multiplications(32, way) for way in (NONE, Shortcuts(merged_tokens=0.5)))
    assert 0.8 * whole < merged < whole
    assert 2 * multiplications(32, NONE, rows=1) == pytest.approx(whole, rel=0.01)
