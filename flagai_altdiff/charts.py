"""Plain line charts, drawn with Pillow: enough to see how a training went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

WIDTH, HEIGHT = 720, 180
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 24, 28
_INK, _PALE, _LINE, _SMOOTH = "#222222", "#dddddd", "#a8c4e0", "#1f5fa8"
_SMOOTHING = 0.02
"""Share of the points that a point of the smooth line is the mean of."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One panel.

    Args:
        title: Above it.
        x: Where its points lie, ascending.
        y: Their heights.
        smooth: Whether a running mean is drawn over the points.
        from_zero: Whether heights begin at 0, so that what hardly changes looks so.
    """

    title: str
    x: Sequence[float] = field(repr=False)
    y: Sequence[float] = field(repr=False)
    smooth: bool = False
    from_zero: bool = False


def draw_curves(curves: Sequence[Curve]) -> Image.Image:
    """Panels below each other."""
    image = Image.new("RGB", (WIDTH, HEIGHT * max(len(curves), 1)), "white")
    pen = ImageDraw.Draw(image)
    for i, curve in enumerate(curves):
        _panel(pen, curve, i * HEIGHT)
    return image


def _panel(pen: ImageDraw.ImageDraw, curve: Curve, top: int) -> None:
    pen.text((LEFT, top + 6), curve.title, fill=_INK)
    if not curve.y:
        return
    low, high = _bounds([*curve.y, 0.0] if curve.from_zero else curve.y)
    first, last = curve.x[0], max(curve.x[-1], curve.x[0] + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - first) / (last - first), (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), top + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        y = place(first, value)[1]
        pen.line([(LEFT, y), (WIDTH - RIGHT, y)], fill=_PALE)
        pen.text((6, y - 6), f"{value:.4g}", fill=_INK)
        x = first + share * (last - first)
        pen.text((place(x, low)[0] - 6 - 24 * share, top + HEIGHT - BOTTOM + 8), f"{x:,.0f}", fill=_INK)
    pen.line([place(x, y) for x, y in zip(curve.x, curve.y, strict=True)], fill=_LINE if curve.smooth else _SMOOTH)
    if curve.smooth:
        pen.line([place(x, y) for x, y in zip(curve.x, _running_mean(curve.y), strict=True)], fill=_SMOOTH, width=2)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)


def _running_mean(values: Sequence[float]) -> list[float]:
    half = max(int(len(values) * _SMOOTHING), 1)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    ends = ((max(i - half, 0), min(i + half + 1, len(values))) for i in range(len(values)))
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]
