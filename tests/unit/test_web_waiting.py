"""The queue: bounded, fair, like jobs together; what a job tells those who watch it; what is kept of old ones."""

from __future__ import annotations

import asyncio
import functools
import gc
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from PIL import Image

from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.web import service as service_module
from flagai_altdiff.web.jobs import Job, JobError
from flagai_altdiff.web.messages import Drawn, Problem, Progress, Task
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.settings import Drawing, Settings
from flagai_altdiff.web.waiting import FullError, WaitingRoom


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def job(client: str, prompt: str = "a", *, model: str = "m", lora: str = "", **options: Any) -> Job:
    request = GenerationRequest(prompts=prompt, seed=1, **options)  # type: ignore[arg-type]
    resolved = request.resolve(height=64, width=64, steps=5, guidance_scale=2.0, downsampling=8, halvings=1)
    loras = ((lora, 1.0),) if lora else ()
    return Job(task=Task(id=f"{client}{prompt}", request=resolved, model=model, loras=loras), client=client)


def taken(room: WaitingRoom, most_images: int = 1) -> list[str]:
    return [job.id for job in room.take(most_images)]


@in_a_loop
async def test_clients_take_turns() -> None:
    room = WaitingRoom(20, 20)
    for name in "123":
        room.add(job("greedy", name))
    room.add(job("late", "1"))
    late = job("later", "1")
    room.add(late)
    assert room.position(late) == 2
    assert [taken(room)[0] for _ in range(5)] == ["greedy1", "late1", "later1", "greedy2", "greedy3"]
    assert room.take(1) == [] and len(room) == 0


@in_a_loop
async def test_nobody_takes_all_places() -> None:
    room = WaitingRoom(4, 2)
    for name in "12":
        room.add(job("a", name))
    with pytest.raises(FullError):
        room.add(job("a", "3"))
    room.add(job("b"))
    room.add(job("c"))
    with pytest.raises(FullError):
        room.add(job("d"))
    assert room.remove(next(iter(room))) and len(room) == 3


@in_a_loop
async def test_like_jobs_are_taken_together() -> None:
    room = WaitingRoom(20, 20)
    room.add(job("a", "1", negative_prompt="x", guidance_scale=7.0))
    room.add(job("b", "other size", width=128))
    room.add(job("c", "2", images_per_prompt=2))
    room.add(job("d", "other model", model="n"))
    room.add(job("e", "3"))
    room.add(job("f", "with a LoRA", lora="robot"))
    assert taken(room, 4) == ["a1", "c2", "e3"]
    assert taken(room, 4) == ["bother size"]
    assert taken(room, 4) == ["dother model"]
    assert taken(room, 4) == ["fwith a LoRA"]


@in_a_loop
async def test_a_batch_has_its_limit_and_a_job_alone_may_be_larger() -> None:
    room = WaitingRoom(20, 20)
    room.add(job("a", "1", images_per_prompt=9))
    for client in "bcd":
        room.add(job(client, "1", images_per_prompt=2))
    assert taken(room, 4) == ["a1"]
    assert taken(room, 4) == ["b1", "c1"]


@in_a_loop
async def test_who_is_slow_misses_steps_and_holds_nobody_up() -> None:
    watched = job("a")
    seen = []

    async def watch() -> None:
        async for _ in watched.watch():
            seen.append(watched.step)
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(watch())
    watched.begin()
    for step in range(1, 101):
        watched.advance(Progress(watched.id, step, 100))
        await asyncio.sleep(0.001)
    watched.end("done")
    await asyncio.wait_for(watching, 5)
    assert seen[-1] == 100 and len(seen) < 50
    assert (await watched.finished()).is_over


@in_a_loop
async def test_only_the_first_end_counts() -> None:
    ended = job("a")
    ended.end("cancelled", Problem(code="cancelled", text="no more"))
    ended.end("done")
    with pytest.raises(JobError, match="no more"):
        await ended.finished()


@in_a_loop
async def test_the_pictures_of_a_job_go_with_its_end() -> None:
    own = job("a", init_image=Image.new("RGB", (64, 64), "red"), mask_image=Image.new("L", (64, 64), 255))
    told, pixels = own.task.request.as_json(), weakref.ref(own.task.request.init_image.image)
    assert told["init_image"]["sha256"] and told["mask_image"]["sha256"]
    own.end("done")
    gc.collect()
    assert pixels() is None
    assert own.task.request.as_json() == told and own.count == 1 and own.task.request.final_size == (64, 64)


@in_a_loop
async def test_unsaved_images_of_old_jobs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_REMEMBERED_BYTES", 250, raising=False)
    service = Service(Settings(drawing=Drawing(folder=None)))
    for name, size_bytes in {"1": 100, "2": 0, "3": 100, "4": 100, "5": 300}.items():
        own = job("a", name)
        service.jobs[own.id] = own
        png = bytes(size_bytes)
        own.add(
            Drawn(id=own.id, index=0, prompt="", seed=1, safety="unchecked", size=(8, 8), path=None, png=png or None)
        )
        service._end(own, "done")
        if name == "4":
            assert list(service.jobs) == ["a2", "a3", "a4"]
    assert list(service.jobs) == ["a2", "a5"]
