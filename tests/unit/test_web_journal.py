"""Jobs on disk: there before they are answered, written beside the event loop, told of by the next server."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.web import journal as module
from flagai_altdiff.web.journal import Journal
from flagai_altdiff.web.messages import Problem, Task

SLOW_S = 0.3
WHY = Problem(code="cancelled", text="it was cancelled")


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def task(name: str, *, is_saved: bool = True) -> Task:
    request = GenerationRequest(prompts=(name,), seed=1)
    resolved = request.resolve(height=64, width=64, steps=5, guidance_scale=2.0, downsampling=8, halvings=1)
    return Task(id=name, request=resolved, model="m", is_saved=is_saved)


def told(folder: Path, journal: Journal | None = None) -> dict[str, str]:
    """What the next server says, once the one before has left: ids, the newest first, and states."""
    if journal is not None:
        journal.leave()
    return {own["id"]: own["state"] for own in Journal(folder).left()}


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A disk that takes its time to flush; the files that it has flushed."""
    flushed, fsync = list[Path](), os.fsync

    def slowly(handle: int) -> None:
        time.sleep(SLOW_S)
        fsync(handle)
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")))

    monkeypatch.setattr(os, "fsync", slowly)
    return flushed


@in_a_loop
async def test_a_slow_disk_holds_up_its_own_job_only(tmp_path: Path, slow_disk: list[Path]) -> None:
    journal, pauses = Journal(tmp_path), list[float]()

    async def beat() -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            pauses.append(time.monotonic() - began)

    beating = asyncio.create_task(beat())
    began = time.monotonic()
    await journal.open(task("a"), 1.0)
    assert time.monotonic() - began >= SLOW_S and [path.parent.name for path in slow_disk] == [".jobs"]
    assert told(tmp_path, journal) == {"a": "interrupted"}
    journal.end(task("a"), 1.0, "cancelled", WHY)
    journal.close("a")
    assert max(pauses) < SLOW_S / 2
    await journal.flush()
    beating.cancel()
    assert max(pauses) < SLOW_S / 2 and told(tmp_path, journal) == {}


@in_a_loop
async def test_how_jobs_ended_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number, name in enumerate(("waits", "fails", "cancelled", "done", "unsaved")):
        await journal.open(task(name, is_saved=name != "unsaved"), float(number))
    journal.end(task("fails"), 1.0, "failed", Problem(code="worker_died", text="it died"))
    journal.end(task("cancelled"), 2.0, "cancelled", WHY)
    journal.end(task("unsaved", is_saved=False), 4.0, "cancelled", WHY)
    journal.close("done")
    assert not (tmp_path / ".jobs" / "done.json").exists()  # at once, before anybody hears that it is done
    await journal.flush()
    assert told(tmp_path, journal) == {"cancelled": "cancelled", "fails": "failed", "waits": "interrupted"}
    own = next(own for own in Journal(tmp_path).left() if own["id"] == "fails")
    assert own["error"] == {"code": "worker_died", "text": "it died", "field": ""}
    assert own["request"]["prompts"] == ["fails"]
    assert own.keys() == {"id", "created", "model", "request", "state", "error"}


@in_a_loop
async def test_servers_at_one_folder_leave_each_others_jobs_alone(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path), Journal(tmp_path)
    await journal.open(task("ours"), 1.0)
    journal.end(task("failed"), 2.0, "failed", WHY)
    await other.open(task("theirs"), 3.0)
    await journal.flush()
    assert told(tmp_path) == {}
    assert told(tmp_path, journal) == {"failed": "failed", "ours": "interrupted"}
    assert told(tmp_path, other) == {"theirs": "interrupted", "failed": "failed", "ours": "interrupted"}
    assert not list((tmp_path / ".jobs").glob("*.lock"))


@in_a_loop
async def test_the_jobs_of_a_server_that_was_killed_are_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    await journal.open(task("ours"), 1.0)
    (lock,) = (tmp_path / ".jobs").glob("*.lock")
    journal.leave()
    lock.touch()  # as a process leaves it that has no time to tidy up
    assert told(tmp_path) == {"ours": "interrupted"} and not lock.exists()


@in_a_loop
async def test_a_job_that_ends_while_it_is_written_leaves_nothing(tmp_path: Path, slow_disk: list[Path]) -> None:
    journal = Journal(tmp_path)
    opening = asyncio.create_task(journal.open(task("a"), 1.0))
    await asyncio.sleep(SLOW_S / 3)
    journal.close("a")
    await opening
    await journal.flush()
    assert told(tmp_path, journal) == {} and slow_disk


@in_a_loop
async def test_old_ends_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 3)
    journal = Journal(tmp_path)
    for number in range(5):
        journal.end(task(f"a{number}"), float(number), "cancelled", WHY)
    await journal.flush()
    assert list(told(tmp_path, journal)) == ["a4", "a3", "a2"]
    later = Journal(tmp_path)
    assert len(list(later.left())) == 3
    later.end(task("a9"), 9.0, "failed", WHY)
    await later.flush()
    assert list(told(tmp_path, later)) == ["a9", "a4", "a3"]


@in_a_loop
async def test_what_is_no_record_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    await journal.open(task("a"), 1.0)
    for name, text in {"b": "{", "c": "[]", "d": json.dumps({"id": "other", "created": 1.0}), "e": "[" * 10**5}.items():
        (tmp_path / ".jobs" / f"{name}.json").write_text(text)
    assert told(tmp_path, journal) == {"a": "interrupted"} and "b.json" in caplog.text


@in_a_loop
async def test_a_disk_that_refuses_stops_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".jobs").write_text("in the way")
    journal = Journal(tmp_path)
    await journal.open(task("a"), 1.0)
    journal.end(task("a"), 1.0, "failed", WHY)
    journal.close("a")
    await journal.flush()
    assert "job a is not in the journal" in caplog.text
