"""Our own interface: jobs that are accepted at once, watched, fetched and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.web.bodies import order_schema, read_json, read_order
from flagai_altdiff.web.clients import client_of
from flagai_altdiff.web.encoding import FORMATS, as_text, converted, png_of
from flagai_altdiff.web.history import History
from flagai_altdiff.web.jobs import Job, JobError
from flagai_altdiff.web.messages import Drawn, Problem
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.streaming import HEARTBEAT_S, event, event_stream

_SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'; sandbox"}
"""A picture is a picture, whatever is in it."""
_MOST_LISTED = 200


def jobs_api(service: Service, history: History) -> APIRouter:
    """The routes under ``/api``."""
    api = APIRouter(prefix="/api", tags=["jobs"])
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": order_schema()}}}}

    @api.post("/jobs", status_code=202, openapi_extra=body, summary="Ask for images")
    async def submit(request: Request) -> dict[str, Any]:
        """Accept a job; its images are drawn when its turn comes."""
        order = await read_order(await read_json(request), service.settings)
        job = await service.submit(
            order.options, client=client_of(request), model=order.model, loras=order.loras, is_saved=order.is_saved
        )
        return job_json(service, job)

    @api.get("/jobs", summary="Jobs that are not over, and those that were interrupted")
    async def jobs() -> dict[str, Any]:
        now = [job_json(service, job) for job in service.jobs.values() if not job.is_over]
        interrupted = [own for own in service.earlier.values() if own["state"] == "interrupted"]
        return {"jobs": now, "interrupted": [earlier_json(own) for own in interrupted]}

    @api.get("/jobs/{job_id}", summary="How a job stands")
    async def job(job_id: str) -> dict[str, Any]:
        if job_id in service.earlier:
            return earlier_json(service.earlier[job_id])
        return job_json(service, _found(service, job_id))

    @api.delete("/jobs/{job_id}", summary="Cancel a job")
    async def cancel(job_id: str) -> dict[str, Any]:
        """It ends within one step. One of an earlier server is forgotten."""
        if own := service.forget(job_id):
            return earlier_json(own)
        found = _found(service, job_id)
        service.cancel(found)
        return job_json(service, found)

    @api.get("/jobs/{job_id}/events", response_class=StreamingResponse, summary="Watch a job (server-sent events)")
    async def events(job_id: str) -> StreamingResponse:
        """`position` while it waits, `step` and `preview` while it is drawn, `image` for each image, and at the end
        `done`, `failed`, `cancelled` or `interrupted`."""
        return event_stream(job_events(service, _found(service, job_id)))

    @api.get("/jobs/{job_id}/images/{index}", response_class=Response, summary="An image of a job")
    async def image(job_id: str, index: int, format: str = "png", quality: int | None = None) -> Response:
        images = {image.index: image for image in _found(service, job_id).images}
        if index not in images:
            raise _missing(f"job {job_id} has no image {index} (yet)")
        if format not in FORMATS:
            raise InvalidRequestError("format", format, f"expected one of {', '.join(FORMATS)}")
        return Response(await file_of(images[index], format, quality), media_type=FORMATS[format], headers=_SAFE)

    @api.get("/history", summary="Images that were saved, and jobs that were not finished, the newest first")
    async def saved(before: int | None = None, limit: int = 50) -> dict[str, Any]:
        """What the images' own records say; `before` is the last number of the page before. The first page has, under
        `jobs`, those that failed, were cancelled or interrupted, of this server and of earlier ones."""
        limit = max(1, min(limit, _MOST_LISTED))
        found = await asyncio.to_thread(history.page, before, limit)
        images = [{"number": n, "url": f"/api/history/{n}", "record": record} for n, _, record in found]
        return {"images": images, "jobs": _unfinished(service)[:limit] if before is None else []}

    @api.get("/history/{number}", response_class=Response, summary="A saved image")
    async def saved_image(number: int) -> Response:
        content = await asyncio.to_thread(history.png, number)
        if content is None:
            raise _missing(f"there is no saved image {number}")
        return Response(content, media_type="image/png", headers=_SAFE)

    @api.get("/models", summary="Models, samplers, LoRAs and options that there are")
    async def models() -> dict[str, Any]:
        cards = [vars(card) for card in service.cards.values()]
        return {"models": cards, "default": service.default_model, "loras": service.loras}

    return api


async def file_of(image: Drawn, kind: str, quality: int | None = None) -> bytes:
    """An image as a file of some format.

    Raises:
        JobError: Its file is gone.
    """
    if quality is not None and not 1 <= quality <= 100:
        raise InvalidRequestError("quality", quality, "expected 1 to 100")
    try:
        return await asyncio.to_thread(lambda: converted(png_of(image), kind, quality))
    except OSError as error:
        raise _missing("the image was saved, and its file is gone") from error


async def job_events(service: Service, job: Job) -> AsyncIterator[str]:
    """Everything that happens to a job, as server-sent events; nobody waits for a slow reader."""
    said: tuple[Any, ...] = ()
    previews = images = 0
    async for changed in job.watch(HEARTBEAT_S):
        if not changed:
            yield ": still here\n\n"
            continue
        position = service.position(job) if job.state == "waiting" else None
        now = (position, job.step)
        if position is not None and now != said:
            yield event({"position": position, "wait_s": round(service.wait_s(), 1)}, "position")
        elif job.state == "drawing" and now != said:
            left = job.seconds_left
            yield event({"step": job.step, "steps": job.steps, "seconds_left": left and round(left, 1)}, "step")
        said = now
        if job.preview is not None and job.previews != previews:
            previews = job.previews
            yield event({"image": "data:image/jpeg;base64," + as_text(job.preview)}, "preview")
        for image in job.images[images:]:
            yield event(image_json(job, image), "image")
        images = len(job.images)
        if job.is_over:
            yield event(job_json(service, job), job.state)


def job_json(service: Service, job: Job) -> dict[str, Any]:
    """A job as JSON."""
    own = {
        "id": job.id,
        "state": job.state,
        "model": job.task.model,
        "created": job.created,
        "position": service.position(job) if job.state == "waiting" else None,
        "step": job.step,
        "steps": job.steps,
        "seconds_left": job.seconds_left,
        "images": [image_json(job, image) for image in job.images],
        "notes": job.notes,
        "error": job.problem and vars(job.problem),
        "request": job.task.request.as_json(),
        "links": {"self": f"/api/jobs/{job.id}", "events": f"/api/jobs/{job.id}/events"},
    }
    return own


def image_json(job: Job, image: Drawn) -> dict[str, Any]:
    """An image as JSON, with where it can be fetched."""
    return {
        "index": image.index,
        "url": f"/api/jobs/{job.id}/images/{image.index}",
        "prompt": image.prompt,
        "seed": image.seed,
        "safety": image.safety,
        "width": image.size[0],
        "height": image.size[1],
        "file": image.path and image.path.name,
    }


def earlier_json(own: dict[str, Any]) -> dict[str, Any]:
    """A job that an earlier server accepted, and that has not all of its images."""
    lost = Problem(code="interrupted", text="the server ended before this was drawn; ask again")
    return {**own, "images": [], "error": own.get("error") or vars(lost)}


def _unfinished(service: Service) -> list[dict[str, Any]]:
    """Jobs that are over and have not all of their images, the newest first."""
    now = [job_json(service, job) for job in service.jobs.values() if job.is_over and job.state != "done"]
    return [*reversed(now), *map(earlier_json, service.earlier.values())]


def _found(service: Service, job_id: str) -> Job:
    if (job := service.jobs.get(job_id)) is None:
        raise _missing(f"there is no job {job_id[:40]!r} here, or it is long over")
    return job


def _missing(text: str) -> JobError:
    return JobError(Problem(code="not_found", text=text))
