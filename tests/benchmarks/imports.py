"""Time from a cold process to the first use: the doors imported, four images of the embedded model, ``altdiff --help``.

    python -m tests.benchmarks.imports [--rounds 7] [--against CHECKOUT]

Every call is a fresh process and all take turns, so that a busy machine slows all of them; the first round fills the
caches and does not count. ``--against`` runs another checkout of this repository in the same rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGAI_SCRIPT = """
import sys
import torch
from flagai.auto_model.auto_loader import AutoLoader
from flagai.model.predictor.predictor import Predictor

loader = AutoLoader(task_name="text2img", model_name="AltDiffusion-mini", model_dir=sys.argv[1])
model = loader.get_model()
model.eval()
model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
Predictor(model).predict_generate_images("a large red heart on a white background")
"""
TORCH, DOORS, IMAGES, HELP = "import torch", "import AutoLoader, Predictor", "four saved images", "altdiff --help"
COMMANDS = {
    TORCH: ("-c", "import torch"),
    DOORS: ("-c", "from flagai_altdiff import AutoLoader, Predictor"),
    IMAGES: ("-c", FLAGAI_SCRIPT, "checkpoints"),
    HELP: ("-m", "flagai_altdiff", "--help"),
}

Times = dict[tuple[Path, str], list[tuple[float, float]]]
"""(checkout, what) -> seconds on the clock and of CPU, a pair for each round."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="counted rounds (default: %(default)s)")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout to compare with")
    args = parser.parse_args()
    checkouts = [ROOT] if args.against is None else [ROOT, args.against.resolve()]
    times: Times = {}
    for number in range(args.rounds + 1):
        for what in COMMANDS:
            for checkout in checkouts if what != TORCH else [ROOT]:
                measured = measure(checkout, what)
                if number:
                    times.setdefault((checkout, what), []).append(measured)
        print(f"round {number} of {args.rounds}", file=sys.stderr)
    for checkout in checkouts:
        report(checkout, times)


def measure(checkout: Path, what: str) -> tuple[float, float]:
    """Run a command in a process of its own; seconds on the clock, and of CPU."""
    paths = os.pathsep.join([str(checkout), str(checkout / "flagai_altdiff" / "_shim")])
    environment = {**os.environ, "PYTHONPATH": paths, "FLAGAI_ALTDIFF_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *COMMANDS[what]]
        cpu, start = os.times(), time.perf_counter()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        seconds, after = time.perf_counter() - start, os.times()
        if done.returncode:
            raise SystemExit(f"{what} in {checkout}:\n{done.stderr}")
        images = len(list(Path(folder).rglob("samples/*.png")))
    if what == IMAGES and images != 4:
        raise SystemExit(f"{checkout} saved {images} images instead of 4")
    return seconds, after.children_user + after.children_system - cpu.children_user - cpu.children_system


def report(checkout: Path, times: Times) -> None:
    """Medians, and ratios to ``import torch`` and to this checkout."""
    torch_s = median(times[ROOT, TORCH], 0)
    print(f"\n{checkout}\n{'':30}{'median':>9}{'least':>9}{'CPU':>9}{'/ import torch':>16}{'/ here':>9}")
    for what in COMMANDS:
        here, pairs = times[ROOT, what], times.get((checkout, what), times[ROOT, what])
        seconds = median(pairs, 0)
        print(
            f"{what:30}{seconds:7.2f} s{min(pairs)[0]:7.2f} s{median(pairs, 1):7.2f} s"
            f"{seconds / torch_s:15.2f}x{seconds / median(here, 0):8.2f}x"
        )


def median(pairs: list[tuple[float, float]], column: int) -> float:
    return statistics.median(pair[column] for pair in pairs)


if __name__ == "__main__":
    main()
