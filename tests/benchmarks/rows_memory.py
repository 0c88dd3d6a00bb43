"""What a process holds at most beyond the weights: each engine in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks import models
from tests.benchmarks.frame import Row, Side, machine
from tests.benchmarks.sides import SIDES, engines

MODELS = {"full": models.full_size, "mini": models.mini}


def peak_memory(kind: str, name: str, side_px: int) -> Row:
    """A step of the UNet with guidance and the decoding of one picture.

    Args:
        kind: Key of ``MODELS``.
        name: Key of the row.
        side_px: Height and width.
    """
    sides = {}
    for side in SIDES:
        words = [sys.executable, "-W", "ignore", "-m", __name__, side, kind, str(side_px), str(torch.get_num_threads())]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        sides[side] = Side(**json.loads(done.stdout.splitlines()[-1]))
        print(f"{name}: {side} {sides[side].gib:.2f} GiB", flush=True)
    return Row(
        name=name, what=f"memory over weights, step and picture of {side_px} px", reference="eager", sides=sides,
        machine=machine(),
    )  # fmt: skip


def measure(side: str, kind: str, side_px: int) -> Side:
    """In this process, which does nothing else."""
    model = MODELS[kind]()
    engine = engines(model, (side,))[side]
    shape = (1, model.channels, *[side_px // model.config.first_stage.downsampling] * 2)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    with torch.no_grad():
        engine.denoise(torch.randn(shape), torch.tensor([500]), torch.randn(2, 77, model.config.unet.context_dim))
        engine.decode(torch.randn(shape))
    return Side(seconds=[time.perf_counter() - began], gib=_memory("VmHWM") - before)


def _memory(field: str) -> float:
    """GiB, as Linux counts this process."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 2**20


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(vars(measure(sys.argv[1], sys.argv[2], int(sys.argv[3])))))
