"""What a picture costs as work grows: python -m tests.benchmarks.scale [--parts calls,sizes] [--write].

Each part is kept in a file, so that each can be measured while the machine is quiet. ``--write`` puts tables and a plot
into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from flagai_altdiff import generate, load_model, pipeline, stream
from flagai_altdiff.batch import drawing
from flagai_altdiff.batch.agreement import agree
from flagai_altdiff.batch.drawing import Run, Tally, draw_share
from flagai_altdiff.batch.lines import PromptLines
from flagai_altdiff.batch.places import Folders
from flagai_altdiff.batch.work import Work
from flagai_altdiff.models import LatentDiffusion
from tests.benchmarks import scale_page

MODEL = "AltDiffusion-mini"
CALLS = (1, 2, 4, 8, 16, 32, 64)
SIDES = (256, 384, 512, 768, 1024)
COUNTS = (1, 10, 100, 1000, 10_000)
SMALL = {"height": 32, "width": 32, "steps": 1, "guidance_scale": 1.0}
"""So that ten thousand pictures are two minutes: what is not the model weighs as much as it ever can."""
KEPT = Path("runs", "scale")
ROUNDS = 3
Rows = list[dict[str, Any]]


def timed(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds that it takes, the least of a few times: what else runs on the machine only adds."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def peak_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1024


def warm(model: LatentDiffusion, **options: Any) -> None:
    generate(model, "a red heart", seed=1, **{"steps": 1, **options})


def calls() -> Rows:
    """Pictures of one call, all drawn at once."""
    model, rows = load_model(MODEL), Rows()
    warm(model)
    for count in CALLS:
        rounds = ROUNDS if count < 32 else 1
        seconds = timed(partial(generate, model, "a red heart", images_per_prompt=count, steps=5, seed=1), rounds)
        rows.append({"pictures": count, "seconds": seconds, "each": seconds / count, "peak MB": peak_mb()})
    return rows


def sizes() -> Rows:
    """Sides of a picture; in processor time of the one thread that draws, as single steps of seconds are short."""
    model, rows = load_model(MODEL), Rows()
    for side in SIDES:
        warm(model, height=side, width=side)
        began, times = time.thread_time(), []
        for _ in stream(model, "a red heart", seed=1, steps=4, height=side, width=side):
            times.append(time.thread_time())
        *steps, end = times
        step = min(after - before for before, after in pairwise(steps))
        rows.append({"side": side, "step": step, "rest": end - began - step * len(steps), "peak MB": peak_mb()})
    return rows


def threads() -> Rows:
    """Threads of one process, at the model's own size and at a large one."""
    model, rows = load_model(MODEL), Rows()
    for count in range(1, (os.cpu_count() or 1) + 1):
        torch.set_num_threads(count)
        row: dict[str, Any] = {"threads": count}
        for side, pictures in ((128, 4), (512, 1)):
            options: dict[str, Any] = {
                "height": side,
                "width": side,
                "images_per_prompt": pictures,
                "steps": 4,
                "seed": 1,
            }
            warm(model, height=side, width=side)
            row[f"{side} px"] = timed(partial(generate, model, "a red heart", **options)) / pictures
        rows.append(row)
    return rows


def prompts() -> Rows:
    """Prompts of a file, each count in a process of its own; then the model's usual settings."""
    return [in_process("member", str(count)) for count in COUNTS]


def usual() -> Rows:
    """The model's usual settings."""
    return [in_process("member", "60", "usual")]


def in_process(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.scale", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def member(count: int, options: dict[str, Any]) -> dict[str, Any]:
    """Draw so many prompts of a file; processor time in the model and outside it, memory after each thousand."""
    model = load_model(MODEL)
    warm(model, **{k: v for k, v in options.items() if k in ("height", "width")})
    spent = [0.0]
    drawing.draw = counted(pipeline.draw, spent)  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as place:
        folder, file = Path(place, "out"), Path(place, "prompts.jsonl")
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps({"prompt": f"a red heart, number {n}"}) + "\n" for n in range(count))
        agree(folder, {"run": "scale"})
        memory: list[float] = []
        began, wall = time.process_time(), time.perf_counter()
        work = Work(PromptLines(file), {"images_per_prompt": 1, "batch_size": 8, "seed": 1, **options})
        planned = time.process_time() - began
        run = Run(model=model, work=work, places=Folders(folder, work, "scale"), id="scale")

        def look(tally: Tally) -> None:
            memory.append(resident_mb())
            print(f"{tally.drawn:,} pictures, {memory[-1]:.0f} MB", file=sys.stderr, flush=True)

        draw_share(run, report=look)
        cpu, seconds = time.process_time() - began, time.perf_counter() - wall
        began = time.process_time()
        again = draw_share(run)
        assert (again.drawn, again.there) == (0, count)
        found_again = time.process_time() - began
    return {
        "prompts": count,
        "cpu": cpu,
        "seconds": seconds,
        "planned": planned,
        "outside": 1 - spent[0] / cpu,
        "outside each": (cpu - spent[0]) / count,
        "found again": found_again,
        "memory": memory or [resident_mb()],
    }


def counted(draw: Callable[..., Iterator[Any]], spent: list[float]) -> Callable[..., Iterator[Any]]:
    """``draw`` that adds the processor time of its own thread, which is all that it has."""

    def wrapped(*args: Any, **options: Any) -> Iterator[Any]:
        began = time.thread_time()
        found = list(draw(*args, **options))
        spent[0] += time.thread_time() - began
        yield from found

    return wrapped


PARTS: dict[str, Callable[[], Rows]] = {
    "calls": calls,
    "sizes": sizes,
    "threads": threads,
    "prompts": prompts,
    "usual": usual,
}


def main(words: Sequence[str]) -> None:
    if words[:1] == ["member"]:
        torch.set_num_threads(1)
        print(json.dumps(member(int(words[1]), {} if words[2:] else SMALL)))
        return
    if words[:1] == ["part"]:  # in a process of its own, whose peak of memory is its own
        torch.set_num_threads(1)
        rows = PARTS[words[1]]()
        (KEPT / f"{words[1]}.json").write_text(json.dumps(rows, indent=1))
        print(json.dumps(rows))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args(words)
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in filter(None, args.parts.split(",")):
        subprocess.run([sys.executable, "-m", "tests.benchmarks.scale", "part", name], check=True)
    if args.write:
        scale_page.write({name: json.loads((KEPT / f"{name}.json").read_text()) for name in PARTS})


if __name__ == "__main__":
    main(sys.argv[1:])
