"""Which pictures a file asks for, and which are drawn together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flagai_altdiff.batch.lines import PromptLines
from flagai_altdiff.batch.work import Lot, Work
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.request import MAX_SEED

ONE_EACH = {"images_per_prompt": 1, "batch_size": 3, "seed": 7}


def work(folder: Path, rows: list[Any], **typed: Any) -> Work:
    path = folder / "p.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return Work(PromptLines(path), {**ONE_EACH, **typed})


def rows(lot: Lot) -> list[tuple[int, str, int]]:
    return list(zip(lot.pictures, lot.prompts, lot.seeds, strict=True))


def test_pictures_have_numbers_and_seeds_of_their_own(tmp_path: Path) -> None:
    said = [{"prompt": "a"}, {"prompts": ["b", "c"]}, {"prompt": "d", "seed": 40, "n_samples": 2}, {"prompt": "e"}]
    found = work(tmp_path, said)
    assert found.pictures == 6
    assert [rows(found[i]) for i in range(len(found))] == [
        [(0, "a", 7), (1, "b", 8), (2, "c", 9)],
        [(3, "d", 40), (4, "d", 41)],
        [(5, "e", 12)],
    ]
    assert [found.lot_of(n) for n in range(6)] == [0, 0, 0, 1, 1, 2]
    assert [found.size(i) for i in range(len(found))] == [3, 2, 1]


def test_a_lot_has_one_set_of_options(tmp_path: Path) -> None:
    said = [{"prompt": "a", "H": 64}, {"prompt": "b", "height": 64}, {"prompt": "c"}, {"prompt": "d", "steps": 9}]
    found = work(tmp_path, said)
    assert [found[i].prompts for i in range(len(found))] == [("a", "b"), ("c",), ("d",)]
    assert [found[i].request().height for i in range(3)] == [64, None, None]
    assert found[2].request().steps == 9
    assert [line for line, _ in found.checks()] == [0, 2, 3]


def test_many_of_a_line_are_cut_where_the_batch_is_full(tmp_path: Path) -> None:
    found = work(tmp_path, [{"prompt": "a", "images_per_prompt": 5}, {"prompt": "b", "images_per_prompt": 5}])
    assert [found[i].prompts for i in range(len(found))] == [
        ("a", "a", "a"),
        ("a", "a", "b"),
        ("b", "b", "b"),
        ("b",),
    ]
    assert [seed for i in range(len(found)) for seed in found[i].seeds] == list(range(7, 17))


def test_seeds_go_round(tmp_path: Path) -> None:
    found = work(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], seed=MAX_SEED)
    assert found[0].seeds == (MAX_SEED, 0)


def test_a_text_has_a_picture_for_each_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    found = Work(PromptLines(tmp_path / "p.txt"), ONE_EACH)
    assert rows(found[0]) == [(0, "a", 7), (1, "b", 8)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": ', "line 3: it is no JSON"),
        ({"steps": 3}, "line 3: it has no prompt; expected"),
        ({"prompt": 3}, "line 3: prompts=3: expected a text"),
        ({"prompt": "a", "steps": 0}, "line 3: steps=0: expected a whole number from 1"),
        ({"prompt": "a", "stepz": 1}, "line 3: stepz=1: there is no such option"),
        ({"prompt": "a", "seed": -1}, "line 3: seed=-1: a run needs a seed"),
        ({"prompt": "a", "seed": 2**32}, "line 3: seed="),
        ({"prompt": "a", "seed_mode": "batch"}, "line 3: seed_mode='batch': a picture of a run has a seed"),
        ({"prompt": "a", "n_iter": 2}, "line 3: iterations=2"),
        ({"prompt": "a", "fixed_code": True}, "line 3: fixed_code=True"),
        ('{"prompt": "\\ud83d"}', "line 3: prompts=.*surrogate"),
    ],
)
def test_a_bad_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        work(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, row, {"prompt": "c"}])
    assert caught.value.field == "from_file"


def test_what_is_wrong_for_all_lines_is_said_by_its_option(tmp_path: Path) -> None:
    for typed in ({"steps": 0}, {"seed": -1}, {"seed_mode": "batch"}):
        with pytest.raises(InvalidRequestError) as caught:
            work(tmp_path, [{"prompt": "a"}], **typed)
        assert caught.value.field == next(iter(typed))
