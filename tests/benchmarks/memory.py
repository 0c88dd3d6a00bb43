"""Peak memory of drawing with AltDiffusion-m18 at full size, mode by mode, and of its decoder; beside what was planned.

    python -m tests.benchmarks.memory [--folder runs/full] [--sizes 512x512,1024x1024] [--only ROW] [--keep]

Each row is a process of its own, on one thread. What is resident counts the pages of the file that it looks at, as the
kernel remembers the peak; private memory is what the process alone has, sampled every 10 ms, and the part of it that
came with drawing. The weights are random, since memory hangs on their number only, and a picture has one step: all of
them take the same. What was measured goes into ``docs/performance.md``, between its marks, one row after the other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.page import chapter_of, write_chapter
from tests.full.test_full_size import write_released_folder

NAME = "AltDiffusion-m18"
CHAPTER, HEAD = "memory", "| | resident | private | of it for drawing | planned |\n|---|---|---|---|---|"
ROWS = ("normal packed", "normal eager", "low", "lowest", "decoder whole", "decoder in strips")

WATCHED = r"""
import json, re, sys, threading, time
from pathlib import Path
import torch
from flagai_altdiff import generate, load_model
from flagai_altdiff.config import RELEASED
from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.engine.plan import Size, plan_memory
from flagai_altdiff.engine.sparing import SparingEngine
torch.set_num_threads(1)
folder, row, width, height = sys.argv[1], sys.argv[2].split(), int(sys.argv[3]), int(sys.argv[4])

def gib(field):
    return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

class Peak(threading.Thread):
    private, running = 0.0, True
    def run(self):
        while self.running:
            self.private = max(self.private, gib("RssAnon"))
            time.sleep(0.01)

size, mode = Size(height=height, width=width), row[0]
if mode == "decoder":
    model = load_model(folder, safety_checker=False, memory="normal", mapped=True)
    engine = (SparingEngine if row[-1] == "strips" else EagerEngine)(model)
    x = torch.randn(1, *engine.latent_shape(height, width), generator=torch.Generator().manual_seed(0))
    def work():
        with torch.no_grad():
            engine.decode(x)
    planned = plan_memory(RELEASED["AltDiffusion-m18"], size, "low" if row[-1] == "strips" else "normal").vae.working
else:
    model = load_model(folder, safety_checker=False, memory=mode, mapped=True)
    options = {"engine": row[1]} if mode == "normal" else {}
    def work():
        for prompt in ("a cat", "a dog"):  # the second text is read beside the weights that drew the first
            generate(model, prompt, height=height, width=width, steps=1, seed=1, **options)
    plan = plan_memory(RELEASED["AltDiffusion-m18"], size, mode)
    planned = None if row[-1] == "packed" else plan.peak - plan.text.weights
before = gib("RssAnon")
peak = Peak(daemon=True)
peak.start()
start = time.perf_counter()
work()
seconds = time.perf_counter() - start
peak.running = False
peak.join()
print(json.dumps({"resident": gib("VmHWM"), "private": peak.private, "drawing": peak.private - before,
    "planned": planned and planned / 2**30, "seconds": seconds}))
"""


def main() -> None:
    """Write the model unless it is there, measure, and fill in the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/full"))
    parser.add_argument("--sizes", default="512x512", help="width x height, with commas between them")
    parser.add_argument("--only", choices=ROWS)
    parser.add_argument("--keep", action="store_true", help="leave the 6 GB of weights where they are")
    args = parser.parse_args()
    folder = args.folder / NAME
    if not (folder / "model.ckpt").exists():
        write_released_folder(folder, NAME)
    for size in args.sizes.split(","):
        for row in [args.only] if args.only else ROWS:
            found = _measured(folder, row, *size.split("x"))
            print(row, size, found, flush=True)
            _fill_in(f"{row}, {size}", found)
    if not args.keep:
        shutil.rmtree(folder)


def _measured(folder: Path, row: str, width: str, height: str) -> dict[str, float]:
    command = [sys.executable, "-c", WATCHED, str(folder), row, width, height]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _fill_in(name: str, found: dict[str, float]) -> None:
    """Put a row in the place of an earlier one of its name."""
    lines = chapter_of(CHAPTER).splitlines()[2:]
    lines = [line for line in lines if not line.startswith(f"| {name} |")]
    write_chapter(CHAPTER, "\n".join([HEAD, *lines, f"| {name} | {' | '.join(_numbers(found))} |"]))


def _numbers(found: dict[str, float]) -> Iterator[str]:
    for field in ("resident", "private", "drawing", "planned"):
        yield "" if found[field] is None else f"{found[field]:.2f}"


if __name__ == "__main__":
    main()
