"""Measured rows -> the tables of docs/performance.md, between its markers, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from tests.benchmarks.frame import Row
from tests.benchmarks.page import DOCS, PAGE, write_chapter

PICTURE = DOCS / "images" / "performance.png"
CHAPTER = "side by side"
WIDTH, LINE, LEFT, RIGHT = 760, 22, 250, 60
COLOURS = {"eager": "#9db4c8", "packed": "#1f5fa8", "openvino": "#d08a2e", "compile": "#5b8c5a", "diffusers": "#b05a6a"}
_PALE, _INK = "#dddddd", "#222222"


def write(rows: Sequence[Row], page: Path = PAGE, picture: Path = PICTURE) -> None:
    """Put tables and picture in their places.

    Args:
        rows: All rows that are to be shown.
        page: Has the two markers.
        picture: To write.
    """
    write_chapter(CHAPTER, "\n\n".join(map(markdown, rows)), page)
    draw([row for row in rows if "load" not in row.name and "memory" not in row.name]).save(picture, optimize=True)


def markdown(row: Row) -> str:
    """A row as a table, a line for each side."""
    lines = [f"**{row.what[:1].upper()}{row.what[1:]}** ({_about(row)})", "", *_head(row)]
    lines += [_line(row, side) for side in row.sides]
    if steps := repaid(row):
        lines += ["", f"Laying out the weights is repaid after {steps:.0f} step{'s' * (steps >= 1.5)}."]
    return "\n".join(lines)


def repaid(row: Row) -> float:
    """After how many repetitions the set-up of the packed engine has saved what it cost; 0 where it never does."""
    if not {"eager", "packed"} <= row.sides.keys():
        return 0.0
    eager, packed = row.sides["eager"], row.sides["packed"]
    saved_s = eager.median - packed.median
    return max((packed.first_s - packed.median) / saved_s, 1.0) if saved_s > 0 and packed.first_s > 0 else 0.0


def _about(row: Row) -> str:
    about, rounds = row.machine, len(row.sides[row.reference].seconds)
    parts = [f"{about.get('threads')} threads", f"{rounds} round{'s' * (rounds != 1)}"]
    if "load" in about:
        low, high = about["load"]
        parts += [f"load average {low:.1f} to {high:.1f}", f"matrix products at {about['gflops']:.0f} GFLOP/s"]
    return ", ".join([*parts, str(about.get("date"))])


def _is_memory(row: Row) -> bool:
    return "memory" in row.name


def _head(row: Row) -> list[str]:
    if _is_memory(row):
        return ["| side | GiB over the weights |", "|---|---:|"]
    return [
        f"| side | median s | times faster than {row.reference} | rounds | GFLOP/s | relative error | first call s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]


def _line(row: Row, side: str) -> str:
    own = row.sides[side]
    if _is_memory(row):
        return f"| {side} | {own.gib:.2f} |"
    ratios = row.ratios(side)
    rate = f"{row.flop / own.median / 1e9:.0f}" if row.flop else ""
    cells = [f"{own.median:.3g}", f"{row.ratio(side):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", rate]
    cells += [f"{value:{form}}" if value == value else "" for value, form in ((own.error, ".0e"), (own.first_s, ".1f"))]
    return f"| {side} | {' | '.join(cells)} |"


def draw(rows: Sequence[Row]) -> Image.Image:
    """Bars: how many times faster than its reference each side is."""
    bars = [(row, side) for row in rows for side in row.sides]
    image = Image.new("RGB", (WIDTH, LINE * (len(bars) + len(rows)) + 2 * LINE), "white")
    pen, most = ImageDraw.Draw(image), max((row.ratio(side) for row, side in bars), default=1.0)
    scale = (WIDTH - LEFT - RIGHT) / most
    pen.line([(LEFT + scale, LINE), (LEFT + scale, image.height - LINE)], fill=_PALE, width=2)
    y = LINE
    for row in rows:
        pen.text((8, y + 4), f"{row.what} (times faster than {row.reference})", fill=_INK)
        y += LINE
        for side in row.sides:
            ratio = row.ratio(side)
            pen.text((24, y + 4), side, fill=_INK)
            pen.rectangle((LEFT, y + 3, LEFT + scale * ratio, y + LINE - 3), fill=COLOURS.get(side, "#888888"))
            pen.text((LEFT + scale * ratio + 6, y + 4), f"{ratio:.2f}", fill=_INK)
            y += LINE
    return image
