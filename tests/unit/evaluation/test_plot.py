"""The plot of a report: every panel has its place, and the font every letter."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from flagai_altdiff.evaluation.intervals import Estimate
from flagai_altdiff.evaluation.plot import plot
from flagai_altdiff.evaluation.report import METRICS, Report


@pytest.mark.parametrize(("metrics", "rows"), [(1, 1), (3, 1), (4, 2), (7, 3)])
def test_panels_are_not_side_by_side_for_ever(metrics: int, rows: int) -> None:
    values = {name: Estimate(value=0.5, low=0.25, high=0.75, count=8) for name in [*METRICS][:metrics]}
    image = plot(Report(model="m", settings={}, languages={"en": values, "zh": values}))
    assert image.width < 1300
    assert (
        image.height == plot(Report(model="m", settings={}, languages={"en": {}, "zh": {}})).height + (rows - 1) * 146
    )
    for row in range(rows):  # a dot in the last panel of each row, and none beyond
        column = min(metrics - 3 * row, 3) - 1
        middle = 76 + column * 376 + 160
        assert (colours := image.crop((middle - 3, 42 + 146 * row, middle + 3, 188 + 146 * row)).getcolors())
        assert (31, 95, 168) in [colour for _, colour in colours]


def test_the_font_has_every_letter_of_the_titles() -> None:
    font = ImageFont.load_default(15)
    missing = bytes(font.getmask("\uffff"))
    letters = {letter for metric in METRICS.values() for letter in metric.title if letter != " "}
    assert [letter for letter in letters if bytes(font.getmask(letter)) == missing] == []
