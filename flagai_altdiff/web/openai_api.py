"""OpenAI's interface for images, for the programs that speak it. Our own options are taken beside its own."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import UploadFile

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import ALPHA, Picture
from flagai_altdiff.request import OPTIONS
from flagai_altdiff.web.answers import problem_of
from flagai_altdiff.web.bodies import Order, model_of, read_json, read_order
from flagai_altdiff.web.clients import client_of
from flagai_altdiff.web.encoding import FORMATS, as_text, picture_from_bytes
from flagai_altdiff.web.jobs import Job, JobError
from flagai_altdiff.web.jobs_api import file_of
from flagai_altdiff.web.messages import ModelCard, Problem
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.streaming import event, event_stream, while_connected

_OWN = (
    "n size quality response_format output_format output_compression stream partial_images background moderation style "
    "user safety_identifier input_fidelity image mask"
).split()
"""Fields of OpenAI's that are no options of a request."""
_FILES = ("image", "mask")
"""Fields of a form that are pictures."""
_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_QUALITY = {"low": 0.5, "medium": 1.0, "auto": 1.0, "standard": 1.0, "high": 1.5, "hd": 1.5, "xhigh": 2.0, "max": 2.0}
"""How many of the model's usual steps a quality takes."""
_MOST_IMAGES, _MOST_PARTIALS = 10, 3
_VARIATION = 0.6


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a client wants its answer.

    Args:
        kind: File format.
        quality: Of JPEG and WebP.
        form: ``"url"``, ``"b64_json"``, or empty for both.
        is_streamed: Whether events come.
        partials: Unfinished images among them.
        user: Who it is for.
        words: What the events say of the image.
    """

    kind: str
    quality: int | None
    form: str
    is_streamed: bool
    partials: int
    user: str
    words: Mapping[str, str]


def openai_api(service: Service) -> APIRouter:
    """The routes under ``/v1``."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"])

    @api.get("/models", summary="Models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(card) for card in service.cards.values()]}

    @api.get("/models/{name:path}", summary="A model")
    async def model(name: str) -> dict[str, Any]:
        return _model(service.card(name))

    @api.post("/images/generations", response_class=Response, openapi_extra=_docs(), summary="Images from a prompt")
    async def generations(request: Request) -> Response:
        return await _answer(request, service, await read_json(request), "image_generation")

    @api.post("/images/edits", response_class=Response, summary="Images from a picture and a prompt")
    async def edits(request: Request) -> Response:
        """A form with `image`, `prompt` and perhaps `mask`, whose transparent parts are drawn anew."""
        body = await _form(request, service)
        picture: Picture | None = body.pop("image", None)
        if picture is None:
            raise InvalidRequestError("image", None, "it must be given")
        mask: Picture | None = body.pop("mask", None)
        body |= {"init_image": picture}
        if mask is not None:
            body |= {"mask_image": _where_transparent(mask), "strength": body.get("strength", 1.0)}
        elif _has_holes(picture):
            body |= {"mask_image": ALPHA, "strength": body.get("strength", 1.0)}
        return await _answer(request, service, body, "image_edit")

    @api.post("/images/variations", response_class=Response, summary="Images near a picture")
    async def variations(request: Request) -> Response:
        body = await _form(request, service)
        picture = body.pop("image", None)
        if picture is None:
            raise InvalidRequestError("image", None, "it must be given")
        body = {"prompt": "", "strength": _VARIATION, **body, "init_image": picture}
        return await _answer(request, service, body, "image_generation")

    return api


async def _answer(request: Request, service: Service, body: Mapping[str, Any], kind: str) -> Response:
    order, wish = await _read(body, service)
    job = await service.submit(
        order.options,
        client=client_of(request, wish.user),
        model=order.model,
        loras=order.loras,
        is_saved=order.is_saved,
    )
    if wish.is_streamed:
        return event_stream(_events(service, job, wish, kind))
    await while_connected(request, service, job)
    base = str(request.base_url).rstrip("/")
    data = [await _datum(job, number, wish, base) for number in range(len(job.images))]
    resolved = job.task.request
    size = "x".join(map(str, resolved.final_size))
    answer = {"created": int(job.created), "data": data, "size": size, "output_format": wish.kind, "usage": _USAGE}
    return JSONResponse({**answer, "notes": job.notes})


async def _datum(job: Job, number: int, wish: Wish, base: str) -> dict[str, Any]:
    image = job.images[number]
    own: dict[str, Any] = {"revised_prompt": image.prompt, "seed": image.seed, "safety": image.safety}
    if wish.form != "url":
        own["b64_json"] = as_text(await file_of(image, wish.kind, wish.quality))
    if wish.form != "b64_json":
        query = "" if wish.kind == "png" else f"?format={wish.kind}"
        own["url"] = f"{base}/api/jobs/{job.id}/images/{image.index}{query}"
    return own


async def _events(service: Service, job: Job, wish: Wish, kind: str) -> AsyncIterator[str]:
    """Some unfinished images, evenly spread over the steps, and each finished one."""
    common: dict[str, Any] = {"created_at": int(job.created), "output_format": wish.kind, **wish.words}
    common["size"] = "x".join(map(str, job.task.request.final_size))
    sent = seen = said = 0
    try:
        async for _ in job.watch():
            due = (sent + 1) / (wish.partials + 1)
            if sent < wish.partials and job.preview and job.previews != seen and job.step >= due * job.steps:
                seen = job.previews
                own = {"type": f"{kind}.partial_image", "partial_image_index": sent, "b64_json": as_text(job.preview)}
                sent += 1
                yield event({**own, **common, "output_format": "jpeg"}, f"{kind}.partial_image")
            for image in job.images[said:]:
                said += 1
                text = as_text(await file_of(image, wish.kind, wish.quality))
                own = {"type": f"{kind}.completed", "b64_json": text, "seed": image.seed, "usage": _USAGE}
                yield event({**own, **common}, f"{kind}.completed")
        if job.state != "done":
            raise JobError(job.problem or Problem(code=job.state, text=job.state))
    except JobError as error:
        problem = problem_of(error)
        own = {"type": "error", "message": problem.text, "code": problem.code, "param": problem.field or None}
        yield event({"type": "error", "error": own}, "error")
    finally:
        service.cancel(job, "the client went away")


async def _read(body: Mapping[str, Any], service: Service) -> tuple[Order, Wish]:
    """What is asked for, and how the answer is wanted."""
    given = {name: value for name, value in body.items() if value is not None}
    wish = Wish(
        kind=_one_of(given, "output_format", FORMATS, "png"),
        quality=_whole(given, "output_compression", 1, 100) if "output_compression" in given else None,
        form=_one_of(given, "response_format", ("url", "b64_json"), ""),
        is_streamed=_flag(given, "stream"),
        partials=_whole(given, "partial_images", 0, _MOST_PARTIALS) if "partial_images" in given else 0,
        user=str(given.get("user") or given.get("safety_identifier") or ""),
        words={"quality": str(given.get("quality", "auto")), "background": "opaque"},
    )
    if given.get("background") == "transparent":
        raise InvalidRequestError("background", "transparent", "expected 'opaque' or 'auto'; images have no holes here")
    options = {name: value for name, value in given.items() if name not in _OWN}
    pictures = {
        name: options.pop(name) for name in ("init_image", "mask_image") if isinstance(options.get(name), Picture)
    }
    if "prompt" not in options and "prompts" not in options:
        raise InvalidRequestError("prompt", None, "it must be given")
    if "n" in given:
        options["images_per_prompt"] = _whole(given, "n", 1, _MOST_IMAGES)
    card = service.card(model_of(given))
    size = given.get("size", "auto")
    if size != "auto":
        found = _SIZE.fullmatch(size) if isinstance(size, str) else None
        if not found:
            raise InvalidRequestError("size", size, "expected 'auto', or width and height as in '512x512'")
        options |= {"width": int(found[1]), "height": int(found[2])}
    share = _QUALITY[_one_of(given, "quality", _QUALITY, "auto")]
    if "steps" not in options and share != 1.0:
        options["steps"] = min(max(1, round(card.steps * share)), card.timesteps)
    order = await read_order(options, service.settings)
    return replace(order, options={**order.options, **pictures}), wish


async def _form(request: Request, service: Service) -> dict[str, Any]:
    """The fields of a form, with their types, and its pictures; a JSON body is taken as well."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequestError("body", request.headers.get("content-type", ""), "expected multipart/form-data")
    most, found = service.settings.limits, dict[str, Any]()
    async with request.form(max_files=4, max_fields=100, max_part_size=most.body_bytes) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in found:
                raise InvalidRequestError(name, "several", "expected one; a picture is begun with, not several")
            if isinstance(value, UploadFile):
                content = await value.read()
                found[name] = await asyncio.to_thread(picture_from_bytes, content, name, most.picture_pixels)
            elif name in _FILES:
                raise InvalidRequestError(name, value, f"expected a file, as of curl -F {name}=@cat.png")
            else:
                found[name] = _typed(name, value)
    return found


def _typed(name: str, text: str) -> object:
    """The value of a form's field, which is always a text, as its option has it."""
    option = OPTIONS.get(name)
    if text in ("true", "false"):
        return text == "true"
    whole = name in ("n", "output_compression", "partial_images") or (option and option.whole)
    try:
        if whole:
            return int(text)
        return float(text) if option and option.minimum is not None else text
    except ValueError:
        raise InvalidRequestError(name, text, "expected a number") from None


def _where_transparent(mask: Picture) -> Picture:
    """OpenAI's mask, transparent where something is drawn, as ours, white there; one without alpha is ours already."""
    if mask.image.mode != "RGBA":
        return mask
    return Picture(mask.image.getchannel("A").point(lambda alpha: 255 - alpha).convert("RGB"))


def _has_holes(picture: Picture) -> bool:
    return picture.image.mode == "RGBA" and picture.image.getchannel("A").getextrema() != (255, 255)


def _one_of(given: Mapping[str, Any], name: str, choices: Any, default: str) -> str:
    value = given.get(name, default)
    if value != default and (not isinstance(value, str) or value not in choices):
        raise InvalidRequestError(name, value, f"expected one of {', '.join(choices)}")
    return str(value)


def _whole(given: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = given[name]
    if type(value) is not int or not least <= value <= most:
        raise InvalidRequestError(name, value, f"expected a whole number from {least} to {most}")
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequestError(name, value, "expected true or false")
    return value


_USAGE = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""Nothing is charged for."""
_STARTED = int(time.time())


def _model(card: ModelCard) -> dict[str, Any]:
    return {"id": card.name, "object": "model", "created": _STARTED, "owned_by": "flagai_altdiff"}


def _docs() -> dict[str, Any]:
    properties: dict[str, Any] = {
        "prompt": {"type": "string"},
        "model": {"type": "string"},
        "n": {"type": "integer", "minimum": 1, "maximum": _MOST_IMAGES},
        "size": {"type": "string", "examples": ["auto", "512x512"]},
        "quality": {"enum": list(_QUALITY)},
        "response_format": {"enum": ["url", "b64_json"]},
        "output_format": {"enum": list(FORMATS)},
        "output_compression": {"type": "integer", "minimum": 1, "maximum": 100},
        "stream": {"type": "boolean"},
        "partial_images": {"type": "integer", "minimum": 0, "maximum": _MOST_PARTIALS},
    }
    schema = {"type": "object", "properties": properties, "required": ["prompt"], "description": "And our options."}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
