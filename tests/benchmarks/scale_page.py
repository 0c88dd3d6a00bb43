"""The chapter "As work grows" of docs/performance.md, from what tests/benchmarks/scale.py measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flagai_altdiff.charts import Curve, draw_curves
from tests.benchmarks.page import DOCS, write_chapter

PLOT = DOCS / "images" / "scale.png"
Rows = Sequence[dict[str, Any]]


def write(found: dict[str, list[dict[str, Any]]]) -> None:
    """Put tables and plots in place of earlier ones."""
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    draw_curves([*curves(found)]).save(PLOT)
    write_chapter("scale", "\n\n".join([f"![Cost as work grows](images/{PLOT.name})", *sections(found)]))


def curves(found: dict[str, list[dict[str, Any]]]) -> list[Curve]:
    calls, sizes, prompts = found["calls"], found["sizes"], found["prompts"]
    many = next(row for row in prompts if row["prompts"] == max(row["prompts"] for row in prompts))
    return [
        curve("seconds of a call, by its pictures (128 px, 5 steps)", calls, "pictures", lambda row: row["seconds"]),
        curve("peak memory of that, MB", calls, "pictures", lambda row: row["peak MB"]),
        Curve(
            title="seconds of a step, by thousand pixels of the picture",
            x=[row["side"] ** 2 / 1000 for row in sizes],
            y=[row["step"] for row in sizes],
            from_zero=True,
        ),
        curve(
            "processor seconds of a file, by its prompts (32 px, 1 step)", prompts, "prompts", lambda row: row["cpu"]
        ),
        Curve(
            title="memory of the process while it draws them, MB",
            x=[1000 * number for number in range(1, 1 + len(many["memory"]))],
            y=many["memory"],
            from_zero=True,
        ),
    ]


def curve(title: str, rows: Rows, x: str, y: Callable[[dict[str, Any]], float]) -> Curve:
    return Curve(title=title, x=[row[x] for row in rows], y=[y(row) for row in rows], from_zero=True)


def sections(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    return [
        "**Pictures of a call**, all drawn at once (128 px, 5 steps, one thread):",
        table(
            ("pictures", "s", "s a picture", "peak MB"),
            [(r["pictures"], f"{r['seconds']:.2f}", f"{r['each']:.3f}", f"{r['peak MB']:.0f}") for r in found["calls"]],
        ),
        "**Sizes**, one picture, one thread; the rest is text, decoder and checks:",
        table(
            ("px", "s a step", "µs a step and thousand pixels", "s for the rest", "peak MB"),
            [
                (
                    f"{r['side']}x{r['side']}",
                    f"{r['step']:.3f}",
                    f"{r['step'] / r['side'] ** 2 * 1e9:.0f}",
                    f"{r['rest']:.2f}",
                    f"{r['peak MB']:.0f}",
                )
                for r in found["sizes"]
            ],
        ),
        "**Threads** of a process, s a picture of 4 steps:",
        table(
            ("threads", "128x128", "512x512"),
            [(r["threads"], f"{r['128 px']:.3f}", f"{r['512 px']:.2f}") for r in found["threads"]],
        ),
        "**Prompts of a file**, in one process (32 px, 1 step, without guidance; in the last row the model's usual"
        " 128 px and 20 steps); processor time, which other programs do not change:",
        table(
            (
                "prompts",
                "s",
                "s a picture",
                "outside the model",
                "ms of that a picture",
                "memory MB",
                "s to find all again",
            ),
            [
                (
                    f"{r['prompts']:,}" + (" (usual settings)" if r in found["usual"] else ""),
                    f"{r['cpu']:.1f}",
                    f"{r['cpu'] / r['prompts']:.3f}",
                    f"{r['outside']:.1%}",
                    f"{1000 * r['outside each']:.1f}",
                    memory(r["memory"]),
                    f"{r['found again']:.2f}",
                )
                for r in (*found["prompts"], *found["usual"])
            ],
        ),
    ]


def memory(found: Sequence[float]) -> str:
    low, high = min(found), max(found)
    return f"{high:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
