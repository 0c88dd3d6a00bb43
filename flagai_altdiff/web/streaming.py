"""Waiting for a job while its client waits: for as long as that does, and no longer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.service import Service

HEARTBEAT_S = 10.0
_GONE = "the client went away"


def event(data: Mapping[str, Any], name: str = "") -> str:
    """A server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """An answer of server-sent events, which no proxy holds back."""
    return StreamingResponse(
        events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def while_connected(request: Request, service: Service, job: Job) -> Job:
    """Wait until a job is done, and cancel it if its client goes away before.

    Raises:
        JobError: It ended in another way.
    """
    gone = asyncio.create_task(_disconnected(request))
    done = asyncio.create_task(job.finished())
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            service.cancel(job, _GONE)
        return await done
    finally:
        service.cancel(job, _GONE)  # where the server itself gives up the request
        gone.cancel()
        done.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
