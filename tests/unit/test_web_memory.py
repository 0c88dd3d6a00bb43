"""What programs are told of memory, and what a process draws together where there is little of it."""

from __future__ import annotations

from multiprocessing import Pipe

import psutil
import pytest
import torch

from flagai_altdiff import memory
from flagai_altdiff.engine.plan import planning_of
from flagai_altdiff.pipeline import prepare
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.web.memory_report import gpu_memory, gpu_report, main_memory
from flagai_altdiff.web.messages import Done, Progress, Task
from flagai_altdiff.web.settings import Drawing
from flagai_altdiff.web.shelf import Shelf
from flagai_altdiff.web.worker import _Worker

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


@pytest.mark.parametrize(("room", "order"), [(1.5, "aabb"), (4.0, "abab")])
def test_what_does_not_fit_together_is_drawn_one_by_one(
    monkeypatch: pytest.MonkeyPatch, room: float, order: str
) -> None:
    """Steps of both jobs before the end of one show that they are one batch."""
    shelf = Shelf(Drawing(folder=None), "cpu")
    model = shelf.get("AltDiffusion-mini").model
    request, _ = prepare(model, GenerationRequest(prompts="a red heart", steps=1, seed=1))  # type: ignore[arg-type]
    alone = planning_of(model).batch(request)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0.75 * room * alone)
    ours, theirs = Pipe()
    worker = _Worker(theirs, shelf, None, "cpu")
    worker._draw([Task(id=name, request=request, model="AltDiffusion-mini", is_saved=False) for name in "ab"])
    said = []
    while ours.poll():
        said.append(ours.recv())
    assert "".join(message.id for message in said if isinstance(message, Progress | Done)) == order
