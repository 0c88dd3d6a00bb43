"""The bench for a GPU runs on the processor, where there is none: the same program with a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from tests import tiny
from tests.benchmarks import gpu
from tests.benchmarks.frame import load


def test_it_compares_four_sides(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--tiny", "--backend", "eager", "--rounds", "1", "--out", str(out)]
    options += ["--precisions", "bf16", "--batches", "1", "2"]
    assert gpu.main(options) == 0
    rows = load(out)
    assert [row.name for row in rows] == ["gpu-bf16-1", "gpu-bf16-2"]
    for row in rows:
        assert [*row.sides] == ["eager", "compile", "diffusers", "diffusers compiled"]
        assert all(own.error < 0.2 for own in row.sides.values()), [own.error for own in row.sides.values()]
        assert row.flop > 0 and row.machine["moved_bytes"] > row.machine["weight_bytes"] > 0
    assert math.isclose(rows[1].flop, 2 * rows[0].flop, rel_tol=0.01)


def test_limits_are_counted_and_not_computed() -> None:
    model = tiny.fresh_model("m18").eval().to(dtype=torch.bfloat16)
    one, two = (gpu.limits(model, 1, side) for side in (64, 128))
    assert one["weight_bytes"] == two["weight_bytes"]
    assert 3.9 < two["flop"] / one["flop"] < 16
