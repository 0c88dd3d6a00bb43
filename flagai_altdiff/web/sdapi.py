"""A1111's interface, for the programs that speak it: its names and numbers, our drawing."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import FITS, Picture
from flagai_altdiff.registry import find_model
from flagai_altdiff.request import MAX_SEED
from flagai_altdiff.sampling import GRIDS, SAMPLERS, find_sampler
from flagai_altdiff.web.bodies import picture, read_json
from flagai_altdiff.web.clients import client_of
from flagai_altdiff.web.encoding import as_text, png_of, texts_of
from flagai_altdiff.web.extras import UPSCALERS, add_extras
from flagai_altdiff.web.jobs import Job, JobError
from flagai_altdiff.web.memory_report import NO_GPU, main_memory
from flagai_altdiff.web.messages import Lora, ModelCard
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.streaming import while_connected

_LORA = re.compile(r"<lora:([^:<>]+)(?::([0-9.+-]+))?(?::[^<>]*)?>")
_PLAIN = {
    "prompt": "prompts",
    "negative_prompt": "negative_prompt",
    "steps": "steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "eta": "eta",
    "subseed_strength": "variation_strength",
    "mask_blur": "mask_feather",
    "inpaint_full_res_padding": "mask_padding",
}
"""A1111's fields that mean what one of our options means."""
_READ = (
    "seed subseed batch_size n_iter sampler_name sampler_index scheduler tiling enable_hr hr_scale hr_upscaler "
    "denoising_strength init_images mask mask_blur_x mask_blur_y inpainting_mask_invert inpaint_full_res resize_mode "
    "override_settings override_settings_restore_afterwards send_images save_images include_init_images"
).split()
"""Those that are read in another way."""
_WITHOUT_EFFECT: tuple[object, ...] = (None, "", 0, 0.0, False, -1, [], {}, "None", "Automatic")
"""Values with which a field that is unknown here asks for nothing."""
_USUAL = {"s_noise": 1.0, "s_tmax": (None, 0), "inpainting_fill": (0, 1, 2, 3), "do_not_save_samples": False}
_FIT = {0: "stretch", 1: "crop", 2: "pad", 3: "stretch"}
_SCHEDULERS = {"flagai": "Automatic", "trailing": "SGM Uniform", "uniform": "Uniform", "karras": "Karras"}
_SCHEDULERS |= {"exponential": "Exponential"}
_LATENT, _SMOOTH = "Latent", ("None", "Lanczos")
"""Upscalers of a second pass: of latents, and what is near to how pictures are enlarged between two passes."""
_MODEL = "sd_model_checkpoint"


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of A1111's, in our words.

    Args:
        options: Of a request.
        model: Which one.
        loras: Named within the prompt.
        is_saved: Whether the images are filed.
        sends: Whether the answer has the images.
        ignored: Fields that have no meaning here, as they were given.
    """

    options: Mapping[str, Any]
    model: str | None
    loras: Sequence[Lora]
    is_saved: bool
    sends: bool
    ignored: Mapping[str, Any]


def sdapi(service: Service) -> APIRouter:
    """The routes under ``/sdapi/v1``."""
    api = APIRouter(prefix="/sdapi/v1", tags=["A1111"])
    latest: list[Job] = []
    """The job that ``progress`` tells of, and ``interrupt`` ends."""

    async def draw(request: Request, *, from_picture: bool) -> dict[str, Any]:
        body = await read_json(request)
        asked = await _asked(body, service, from_picture=from_picture)
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
            "info": json.dumps(_info(job, pngs, asked), ensure_ascii=False),
        }

    @api.post("/txt2img", summary="Images from a prompt")
    async def txt2img(request: Request) -> dict[str, Any]:
        return await draw(request, from_picture=False)

    @api.post("/img2img", summary="Images from a picture and a prompt")
    async def img2img(request: Request) -> dict[str, Any]:
        return await draw(request, from_picture=True)

    @api.post("/png-info", summary="What a picture says of its making")
    async def png_info(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        texts = await asyncio.to_thread(texts_of, body.get("image"), "image")
        return {"info": texts.get("parameters", ""), "items": texts, "parameters": _parameters(texts)}

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
        own = {_MODEL: card.name, "sd_checkpoint_hash": "", "sd_vae": "Automatic", "samples_format": "png"}
        return {**own, "CLIP_stop_at_last_layers": 1, "upscaler_for_img2img": None, "show_progress_every_n_steps": 1}

    @api.post("/options", summary="Another model that draws where a request names none")
    async def set_options(request: Request) -> dict[str, Any]:
        body = await read_json(request)
        if _MODEL in body:
            service.default_model = service.card(_name(body[_MODEL])).name
        return {"ignored": sorted(set(body) - {_MODEL})}

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
        return [{"name": name, "label": _SCHEDULERS[name], "aliases": [name], **_NO_RHO} for name in GRIDS]

    @api.get("/upscalers", summary="Ways to enlarge")
    async def upscalers() -> list[dict[str, Any]]:
        own = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
        return [{"name": name, **own} for name in UPSCALERS]

    @api.get("/latent-upscale-modes", summary="Ways to enlarge latents")
    async def latent_upscale_modes() -> list[dict[str, str]]:
        return [{"name": _LATENT}]

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


_NO_RHO = {"default_rho": -1.0, "need_inner_model": False}


async def _asked(body: Mapping[str, Any], service: Service, *, from_picture: bool) -> Asked:
    """A body in our words; what has no meaning here is named, not refused."""
    given = {name: value for name, value in body.items() if value is not None}
    prompt, loras, lost = _without_loras(str(given.get("prompt", "")), service.loras)
    options: dict[str, Any] = {ours: given[theirs] for theirs, ours in _PLAIN.items() if theirs in given}
    options |= {"prompts": prompt, "prompt_syntax": "weighted", **_counts(given), **_sampler(given)}
    for name in ("guidance_scale", "variation_strength", "eta"):
        if isinstance(options.get(name), int):
            options[name] = float(options[name])
    if not SAMPLERS.get(str(options.get("sampler", "ddim")), SAMPLERS["euler"]).takes_eta:
        options.pop("eta", None)  # clients send it with every sampler, and A1111 does nothing with it there either
    options["seed"] = _seed(given.get("seed", -1))
    if not options.get("variation_strength"):
        options.pop("variation_strength", None)
    else:
        options["variation_seed"] = _seed(given.get("subseed", -1))
    if given.get("tiling"):
        options["seamless"] = "xy"
    for name in ("mask_feather", "mask_padding"):
        options.pop(name, None)
    if from_picture:
        options |= await _picture_options(given, service)
    elif given.get("enable_hr"):
        options |= {"hires": float(given.get("hr_scale", 2.0)), "hires_strength": given.get("denoising_strength", 0.5)}
        options["hires_upscaler"] = "latent" if _LATENT in str(given.get("hr_upscaler", "")) else "picture"
    override = given.get("override_settings")
    override = dict(override) if isinstance(override, dict) else {}
    model = _name(override.pop(_MODEL)) if override.get(_MODEL) else None
    ignored = {name: value for name, value in given.items() if _is_unknown(name, value)} | lost
    upscaler = given.get("hr_upscaler", "None")
    if "hires" in options and options["hires_upscaler"] == "picture" and upscaler not in _SMOOTH:
        ignored["hr_upscaler"] = upscaler
    ignored |= {f"override_settings.{name}": value for name, value in override.items()}
    return Asked(
        options=options,
        model=model,
        loras=loras,
        is_saved=bool(given.get("save_images", True)),
        sends=bool(given.get("send_images", True)),
        ignored=ignored,
    )


def _is_unknown(name: str, value: object) -> bool:
    """Whether a field asks for something that is not done here."""
    if name in _PLAIN or name in _READ:
        return False
    usual = _USUAL.get(name, _WITHOUT_EFFECT)
    return value not in (usual if isinstance(usual, tuple) else (usual, *_WITHOUT_EFFECT))


def _without_loras(prompt: str, known: Sequence[str]) -> tuple[str, list[Lora], dict[str, Any]]:
    """A prompt without its ``<lora:name:strength>``, these LoRAs, and those that are not here."""
    found, lost = list[Lora](), dict[str, Any]()
    for match in _LORA.finditer(prompt):
        try:
            strength = float(match[2] or 1)
        except ValueError:
            lost[match[0]] = "no number"
            continue
        if match[1] in known:
            found.append((match[1], strength))
        else:
            lost[match[0]] = "not on this server"
    return _LORA.sub("", prompt), found, lost


def _counts(given: Mapping[str, Any]) -> dict[str, Any]:
    at_once, times = given.get("batch_size", 1), given.get("n_iter", 1)
    if type(at_once) is not int or type(times) is not int or at_once < 1 or times < 1:
        raise InvalidRequestError("batch_size", at_once, "expected whole numbers from 1 on for batch_size and n_iter")
    return {"images_per_prompt": at_once * times, "batch_size": at_once}


def _sampler(given: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler and grid; a schedule of which there is none leaves the sampler's own."""
    name = given.get("sampler_name") or given.get("sampler_index")
    options: dict[str, Any] = {}
    if name:
        found = find_sampler(str(name))
        options["sampler"] = found[0] if found else str(name)
        if found and found[1]:
            options["grid"] = found[1]
    wanted = str(given.get("scheduler") or "").casefold()
    for grid, label in _SCHEDULERS.items():
        if wanted in (grid, label.casefold()) and grid != "flagai":
            options["grid"] = grid
    return options


def _seed(value: object) -> int:
    if type(value) is not int:
        raise InvalidRequestError("seed", value, f"expected a whole number from -1 to {MAX_SEED}")
    return -1 if value < 0 else value


async def _picture_options(given: Mapping[str, Any], service: Service) -> dict[str, Any]:
    pictures = given.get("init_images")
    if not isinstance(pictures, list) or not pictures:
        raise InvalidRequestError("init_images", pictures, "expected a list with a picture as base64")
    begun = await picture(pictures[0], "init_images", service.settings)
    mode = given.get("resize_mode", 0)
    if mode not in _FIT:
        raise InvalidRequestError("resize_mode", mode, f"expected 0 to {len(FITS)}")
    options: dict[str, Any] = {
        "init_image": begun,
        "fit": _FIT[mode],
        "strength": given.get("denoising_strength", 0.75),
    }
    if given.get("mask"):
        mask = await picture(given["mask"], "mask", service.settings)
        if given.get("inpainting_mask_invert"):
            mask = Picture(mask.image.convert("L").point(lambda value: 255 - value).convert("RGB"))
        options["mask_image"] = mask
        if (blur := given.get("mask_blur", given.get("mask_blur_x", 4))) and type(blur) is int:
            options["mask_feather"] = 2 * blur
        if given.get("inpaint_full_res"):
            options |= {"mask_full_resolution": True, "mask_padding": given.get("inpaint_full_res_padding", 32)}
    return options


def _info(job: Job, pngs: Sequence[bytes], asked: Asked) -> dict[str, Any]:
    """What A1111's clients read of a drawing."""
    request, images = job.task.request, job.images
    seeds = [image.seed for image in images]
    varied = request.variation_seed or 0
    width, height = request.final_size
    return {
        "prompt": request.prompts[0],
        "all_prompts": [image.prompt for image in images],
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(images),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": varied,
        "all_subseeds": [varied + image.index for image in images],
        "subseed_strength": request.variation_strength or 0,
        "width": width,
        "height": height,
        "sampler_name": SAMPLERS[request.sampler].title,
        "cfg_scale": request.guidance_scale,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": job.task.model,
        "sd_model_hash": "",
        "denoising_strength": request.strength,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [texts_of(png, "image").get("parameters", "") for png in pngs],
        "styles": [],
        "job_timestamp": str(int(job.created)),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "notes": job.notes,
        "ignored": asked.ignored,
    }


def _parameters(texts: Mapping[str, str]) -> dict[str, Any]:
    """A1111's text as pairs."""
    lines = texts.get("parameters", "").splitlines()
    pairs = re.findall(r'\s*([^:,]+):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)', lines[-1]) if lines else []
    return {key.strip(): value.strip() for key, value in pairs}


def _model(card: ModelCard) -> dict[str, Any]:
    known = find_model(card.name)
    title = known.name if known else card.name
    return {"title": title, "model_name": title, "hash": None, "sha256": None, "filename": title, "config": None}


def _name(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(_MODEL, value, "expected the name of a model; GET /sdapi/v1/sd-models lists them")
    return value
