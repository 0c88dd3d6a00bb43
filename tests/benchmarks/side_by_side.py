"""Ours beside others', row by row: ``python -m tests.benchmarks.side_by_side [--full] [--rows NAME ...]``.

Without ``--full``, the embedded model and small sizes: minutes. With it, also AltDiffusion-m18 at full size with random
weights.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; for all sides

import torch

from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from tests.benchmarks import models, report
from tests.benchmarks.frame import Row, load, save, table
from tests.benchmarks.load import NAME, loading
from tests.benchmarks.rows_memory import peak_memory
from tests.benchmarks.rows_pictures import pictures
from tests.benchmarks.rows_unet import decoding, unet_step
from tests.full.test_full_size import write_released_folder

FILES = Path("runs/bench")
"""12 GB for the row ``load``, made once."""
Measure = Callable[[int], Row]


def with_text() -> LatentDiffusion:
    """m18 at full size from files, text encoder and tokenizer and all; its weights stay in them."""
    if not (FILES / NAME).exists():
        write_released_folder(FILES / NAME, NAME)
    return load_path(FILES / NAME, safety_checker=False, mapped=True)


SMALL: dict[str, tuple[int, Measure]] = {
    "half-unet-256": (5, lambda rounds: unet_step(models.half_width(), "half-unet-256", 256, rounds)),
    "mini-unet-128": (15, lambda rounds: unet_step(models.mini(), "mini-unet-128", 128, rounds)),
    "mini-unet-256": (9, lambda rounds: unet_step(models.mini(), "mini-unet-256", 256, rounds)),
    "mini-decode-256": (9, lambda rounds: decoding(models.mini(), "mini-decode-256", 256, rounds)),
    "mini-pictures-128": (5, lambda rounds: pictures(models.mini(), "mini-pictures-128", rounds, side_px=128)),
    "mini-pictures-256": (3, lambda rounds: pictures(models.mini(), "mini-pictures-256", rounds)),
    "mini-memory-256": (1, lambda rounds: peak_memory("mini", "mini-memory-256", 256)),
}
FULL: dict[str, tuple[int, Measure]] = {
    "unet-256": (5, lambda rounds: unet_step(models.full_size(), "unet-256", 256, rounds)),
    "unet-512": (3, lambda rounds: unet_step(models.full_size(), "unet-512", 512, rounds)),
    "decode-512": (3, lambda rounds: decoding(models.full_size(), "decode-512", 512, rounds)),
    "pictures-256": (1, lambda rounds: pictures(with_text(), "pictures-256", rounds)),
    "memory-512": (1, lambda rounds: peak_memory("full", "memory-512", 512)),
    "load": (3, lambda rounds: loading(FILES, rounds)),
}
"""Name -> rounds, and what they measure."""
LABELS = {"mini": "AltDiffusion-mini", "half": "m18 of half the width"}
"""By how a row's name begins; all others are of AltDiffusion-m18."""
CHECKED, LEAST = "half-unet-256", 1.2
"""How many times faster packed must be there than the model as it is; coarse, as other programs run meanwhile."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="AltDiffusion-m18 at full size as well")
    parser.add_argument("--rows", nargs="+", choices=[*SMALL, *FULL], help="only these")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: %(default)s")
    parser.add_argument(
        "--write", action="store_true", help="put all that was measured so far into docs/performance.md"
    )
    parser.add_argument("--rounds", type=int, help="of each row, instead of its own number")
    parser.add_argument("--out", type=Path, default=Path("runs/side_by_side.json"), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.rows or ({**FULL, **SMALL} if args.full else SMALL):
        rounds, measure = {**SMALL, **FULL}[name]
        row = measure(args.rounds or rounds)
        row.what = f"{LABELS.get(name.partition('-')[0], 'AltDiffusion-m18')}: {row.what}"
        rows.append(row)
        save(rows[-1:], args.out)
    print(table(rows))
    if args.write:
        report.write(load(args.out))
    slow = [row.ratio("packed") for row in rows if row.name == CHECKED and row.ratio("packed") < LEAST]
    if slow:
        print(f"\nthe packed engine is {slow[0]:.2f} times as fast as the model as it is, expected at least {LEAST}")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
