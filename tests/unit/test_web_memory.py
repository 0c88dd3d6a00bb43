"""What programs are told of memory."""

from __future__ import annotations

import psutil
import pytest
import torch

from flagai_altdiff.web.memory_report import gpu_memory, gpu_report, main_memory

GIB = 2**30


def test_main_memory_is_this_machines_or_its_containers() -> None:
    told = main_memory()
    assert all(isinstance(value, int) for value in told.values())
    assert 0 < (told["total"] or 0) <= psutil.virtual_memory().total
    assert (told["free"] or 0) + (told["used"] or 0) == pytest.approx(told["total"])


def test_a_gpus_numbers_are_a1111s() -> None:
    statistics = {"allocated_bytes.all.current": GIB, "allocated_bytes.all.peak": 2 * GIB, "num_ooms": 3}
    told = gpu_report(6 * GIB, 8 * GIB, statistics)
    assert told["system"] == {"free": 6 * GIB, "used": 2 * GIB, "total": 8 * GIB}
    assert told["allocated"] == {"current": GIB, "peak": 2 * GIB}
    assert told["active"] == told["reserved"] == told["inactive"] == {"current": 0, "peak": 0}
    assert told["events"] == {"retries": 0, "oom": 3}


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_memory("cpu") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_this_gpu() -> None:
    told = gpu_memory("cuda")
    assert told is not None and 0 < told["system"]["free"] < told["system"]["total"]
