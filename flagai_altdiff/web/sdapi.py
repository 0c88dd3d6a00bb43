"""A1111's interface, for the programs that speak it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request

from flagai_altdiff.registry import find_model
from flagai_altdiff.sampling import GRIDS, SAMPLERS
from flagai_altdiff.web.a1111 import LATENT, MODEL, SCHEDULERS, info_of, model_name, parameters_of, read_drawing
from flagai_altdiff.web.bodies import read_json
from flagai_altdiff.web.clients import client_of
from flagai_altdiff.web.encoding import as_text, png_of, texts_of
from flagai_altdiff.web.extras import UPSCALERS, add_extras
from flagai_altdiff.web.jobs import Job, JobError
from flagai_altdiff.web.memory_report import NO_GPU, main_memory
from flagai_altdiff.web.messages import ModelCard
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.streaming import while_connected

_NO_RHO = {"default_rho": -1.0, "need_inner_model": False}


def sdapi(service: Service) -> APIRouter:
    """The routes under ``/sdapi/v1``."""
    api = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    latest: list[Job] = []
    """The job that ``progress`` tells of, and ``interrupt`` ends."""

    async def draw(request: Request, *, from_picture: bool) -> dict[str, Any]:
        body = await read_json(request)
        asked = await read_drawing(body, service, from_picture=from_picture)
        job = await service.submit(
            asked.options, client=client_of(request), model=asked.model, loras=asked.loras, is_saved=asked.is_saved
        )
        latest[:] = [job]
        try:
            await while_connected(request, service, job)
        except JobError:
            if job.state != "cancelled":  # what was interrupted is answered with what there is
                raise
        pngs = await asyncio.to_thread(lambda: [png_of(image) for image in job.images])
        return {
            "images": [as_text(png) for png in pngs] if asked.sends else [],
            "parameters": {name: value for name, value in body.items() if name not in ("init_images", "mask")},
            "info": json.dumps(info_of(job, pngs, asked), ensure_ascii=False),
        }

    @api.post("/txt2img", summary="Images from a prompt")
    async def txt2img(request: Request) -> dict[str, Any]:
        return await draw(request, from_picture=False)

    @api.post("/img2img", summary="Images from a picture and a prompt")
    async def img2img(request: Request) -> dict[str, Any]:
        return await draw(request, from_picture=True)

    @api.post("/png-info", summary="What a picture says of its making")
    async def pnginfo_of(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        texts = await asyncio.to_thread(texts_of, body.get("image"), "image")
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": parameters_of(texts)}

    @api.get("/progress", summary="How far the latest job is")
    async def progress(skip_current_image: bool = False) -> dict[str, Any]:
        job = latest[0] if latest and not latest[0].is_over else next(iter(service.drawing), None)
        state: dict[str, Any] = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": ""}
        state |= {"job_count": 0, "job_no": 0, "sampling_step": 0, "sampling_steps": 0, "job_timestamp": "0"}
        if job is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        batches = len(list(job.task.request.batches()))
        steps = job.steps // batches
        number = min(max(job.step - 1, 0) // max(steps, 1), batches - 1)
        state |= {"job": job.id, "job_count": batches, "job_no": number}
        state |= {"sampling_step": job.step - number * steps, "sampling_steps": steps}
        shown = None if skip_current_image or job.preview is None else as_text(job.preview)
        done = job.step / job.steps if job.steps else 0.01
        left = job.seconds_left or 0.0
        return {"progress": done, "eta_relative": left, "state": state, "current_image": shown, "textinfo": job.state}

    @api.post("/interrupt", summary="End the latest job; its answer has the images that are finished")
    async def interrupt() -> dict[str, Any]:
        for job in latest:
            service.cancel(job, "it was interrupted")
        return {}

    @api.post("/skip", summary="Leave out the batch that is drawn now; the latest job goes on with the rest")
    async def skip() -> dict[str, Any]:
        for job in latest:
            service.skip(job)
        return {}

    @api.get("/options", summary="The model that draws")
    async def options() -> dict[str, Any]:
        card = service.card(None)
        own = {MODEL: card.name, "sd_checkpoint_hash": "", "sd_vae": "Automatic", "samples_format": "png"}
        return {**own, "CLIP_stop_at_last_layers": 1, "upscaler_for_img2img": None, "show_progress_every_n_steps": 1}

    @api.post("/options", summary="Another model that draws where a request names none")
    async def set_options(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        if MODEL in body:
            service.default_model = service.card(model_name(body[MODEL])).name
        return {"ignored": sorted(set(body) - {MODEL})}

    add_extras(api, service.settings)
    _add_lists(api, service)
    return api


def _add_lists(api: APIRouter, service: Service) -> None:
    """What there is to choose from."""

    @api.get("/samplers", summary="Samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": spec.title, "aliases": [name], "options": {}} for name, spec in SAMPLERS.items()]

    @api.get("/schedulers", summary="Grids of timesteps")
    async def schedulers() -> list[dict[str, Any]]:
        return [{"name": name, "label": SCHEDULERS[name], "aliases": [name], **_NO_RHO} for name in GRIDS]

    @api.get("/upscalers", summary="Ways to enlarge")
    async def upscalers() -> list[dict[str, Any]]:
        own = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [{"name": name, **own} for name in UPSCALERS]

    @api.get("/latent-upscale-modes", summary="Ways to enlarge latents")
    async def latent_upscale_modes() -> list[dict[str, str]]:
        return [{"name": LATENT}]

    @api.get("/sd-models", summary="Models")
    async def sd_models() -> list[dict[str, Any]]:
        return [_model(card) for card in service.cards.values()]

    @api.get("/loras", summary="Additions to models")
    async def loras() -> list[dict[str, Any]]:
        return [{"name": name, "alias": name, "path": "", "metadata": {}} for name in service.loras]

    @api.get("/embeddings", summary="Learnt words")
    async def embeddings() -> dict[str, Any]:
        files = service.settings.drawing.embeddings
        own = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
        return {"loaded": {file.stem: {**own, "shape": 0, "vectors": 0} for file in files}, "skipped": {}}

    @api.get("/sd-vae", summary="Autoencoders")
    async def sd_vae() -> list[dict[str, Any]]:
        vae = service.settings.drawing.vae
        return [{"model_name": vae.name, "filename": vae.name}] if vae else []

    @api.get("/cmd-flags", summary="How the server was started, without its secrets")
    async def cmd_flags() -> dict[str, Any]:
        own = service.settings
        return {"api": True, "listen": own.host != "127.0.0.1", "port": own.port, "ckpt": next(iter(own.drawing.names))}

    @api.get("/memory", summary="Memory of this machine, and of its first GPU as it was after the last job")
    async def memory() -> dict[str, Any]:
        gpu = next((worker.gpu for worker in service.workers if worker.gpu), NO_GPU)
        return {"ram": await asyncio.to_thread(main_memory), "cuda": gpu}

    @api.post("/refresh-checkpoints", summary="Nothing: models are named when the server starts")
    async def refresh_checkpoints() -> dict[str, Any]:
        return {}

    async def none() -> list[Any]:
        return []

    for name in ("hypernetworks", "face-restorers", "realesrgan-models", "prompt-styles", "script-info"):
        api.get(f"/{name}", summary="There are none")(none)

    @api.get("/scripts", summary="There are none")
    async def scripts() -> dict[str, Any]:
        return {"txt2img": [], "img2img": []}


def _model(card: ModelCard) -> dict[str, Any]:
    known = find_model(card.name)
    title = known.name if known else card.name
    return {"title": title, "model_name": title, "hash": None, "sha256": None, "filename": title, "config": None}
