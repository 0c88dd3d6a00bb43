"""The report as files; one is an image, with a panel for each metric and a dot for each language, by Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from flagai_altdiff.errors import OutputError
from flagai_altdiff.evaluation.intervals import Estimate
from flagai_altdiff.evaluation.report import Metric, Report, metric
from flagai_altdiff.files import new_file

_TITLE, _ROW, _PANEL, _LABELS, _MARGIN, _HEAD, _FOOT = 42, 30, 320, 76, 56, 42, 44
_ACROSS = 3
"""Panels side by side."""
_DOT, _SIZE = 5, 15
_INK, _PALE, _GRID, _DOTS = "#1b1b1b", "#777777", "#e4e4e4", "#1f5fa8"
_INTERVALS = 4
_ROUNDING = 1e-9


def plot(report: Report) -> Image.Image:
    """Draw a report; languages below each other, metrics side by side, each with a scale of its own."""
    names = report.metrics
    across = min(max(len(names), 1), _ACROSS)
    height = _HEAD + _ROW * len(report.languages) + _FOOT
    size = (_LABELS + across * (_PANEL + _MARGIN), _TITLE + height * max(-(-len(names) // across), 1))
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.text((_MARGIN // 2, 12), report.model, font=_font(20), fill=_INK)
    for number, name in enumerate(names):
        found = {i: row[name] for i, row in enumerate(report.languages.values()) if name in row}
        known = {i: estimate for i, estimate in found.items() if math.isfinite(estimate.value)}
        left, top = _LABELS + number % across * (_PANEL + _MARGIN), _TITLE + number // across * height
        if number % across == 0:
            for i, language in enumerate(report.languages):
                pen.text((_LABELS - 14, _middle(top, i)), language, font=_font(), fill=_INK, anchor="rm")
        _panel(pen, left, top, metric(name), known, len(report.languages))
    return image


def _panel(
    pen: ImageDraw.ImageDraw, left: int, top: int, shown: Metric, rows: Mapping[int, Estimate], count: int
) -> None:
    better = "lower is better" if shown.lower_is_better else "higher is better"
    pen.text((left, top), f"{shown.title}{' %' if shown.percent else ''}", font=_font(), fill=_INK)
    pen.text((left + _PANEL, top), better, font=_font(12), fill=_PALE, anchor="ra")
    head, bottom = top + _HEAD, top + _HEAD + _ROW * count
    ends = [end for row in rows.values() for end in (row.value, row.low, row.high) if end is not None]
    ticks = _ticks(min(ends, default=0.0), max(ends, default=1.0))
    low, high = ticks[0], ticks[-1]

    def across(value: float) -> float:
        return left + (value - low) / (high - low) * _PANEL

    for value in ticks:
        pen.line([(across(value), head - 6), (across(value), bottom)], fill=_GRID)
        label = _label(value, ticks[1] - ticks[0], shown)
        pen.text((across(value), bottom + 8), label, font=_font(12), fill=_PALE, anchor="ma")
    for i, row in rows.items():
        x, y = across(row.value), _middle(top, i)
        if row.low is not None and row.high is not None:
            pen.line([(across(row.low), y), (across(row.high), y)], fill=_DOTS, width=2)
        pen.ellipse([(x - _DOT, y - _DOT), (x + _DOT, y + _DOT)], fill=_DOTS)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances, the first no higher than ``low`` and the last no lower than ``high``."""
    if high <= low:
        half = abs(low) / 10 or 0.1
        low, high = low - half, high + half
    rough = (high - low) / _INTERVALS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.floor(low / step + _ROUNDING), math.ceil(high / step - _ROUNDING)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _label(value: float, step: float, shown: Metric) -> str:
    factor = 100 if shown.percent else 1
    decimals = max(0, -math.floor(math.log10(step * factor) + _ROUNDING))
    return f"{round(value * factor, decimals) + 0.0:.{decimals}f}"


def _middle(top: int, row: int) -> int:
    return top + _HEAD + _ROW * row + _ROW // 2


def _font(size: int = _SIZE) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def write_report(report: Report, folder: Path) -> None:
    """Write ``evaluation.md``, ``evaluation.json`` and ``evaluation.png``, in place of earlier ones.

    Raises:
        OutputError: The disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("evaluation.md", report.as_markdown()), ("evaluation.json", report.as_json())):
            with new_file(folder / name, replace=True) as unfinished:
                unfinished.write_text(text, encoding="utf-8")
        with new_file(folder / "evaluation.png", replace=True) as unfinished:
            plot(report).save(unfinished, "PNG")
    except OSError as error:
        raise OutputError(f"{folder}: the report cannot be written: {error.strerror or error}.", error.errno) from error
