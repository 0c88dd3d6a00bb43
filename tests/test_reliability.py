"""docs/reliability.md and the tests that it names agree."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (\d+) \|(.*)\|$", re.MULTILINE)
FAULTS = set(range(1, 67))


def marked_tests() -> dict[int, set[str]]:
    """Item -> names of the tests marked with it."""
    found = defaultdict[int, set[str]](set)
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                        for number in mark.args:
                            found[ast.literal_eval(number)].add(node.name)
    return found


def rows() -> dict[int, set[str]]:
    """Item -> names of the tests in its row."""
    text = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
    return {int(number): set(re.findall(r"`(test_\w+)`", cells)) for number, cells in ROW.findall(text)}


def test_every_fault_has_a_row_and_a_test() -> None:
    assert {number for number, names in rows().items() if names} >= FAULTS


def test_the_named_tests_exist_and_carry_the_mark() -> None:
    marked = marked_tests()
    assert {number: names - marked[number] for number, names in rows().items() if names - marked[number]} == {}


def test_every_mark_has_a_row() -> None:
    assert set(marked_tests()) <= set(rows())
