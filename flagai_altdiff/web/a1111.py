"""A1111's names and numbers: what its clients ask for in our words, and what was drawn in theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import FITS, Picture
from flagai_altdiff.records import pairs_of
from flagai_altdiff.request import MAX_SEED
from flagai_altdiff.sampling import SAMPLERS, find_sampler
from flagai_altdiff.web.bodies import as_float, picture
from flagai_altdiff.web.encoding import texts_of
from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.messages import Lora
from flagai_altdiff.web.service import Service

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
SCHEDULERS = {"flagai": "Automatic", "trailing": "SGM Uniform", "uniform": "Uniform", "karras": "Karras"}
SCHEDULERS |= {"exponential": "Exponential"}
LATENT, _SMOOTH = "Latent", ("None", "Lanczos")
"""Upscalers of a second pass: of latents, and what is near to how pictures are enlarged between two passes."""
MODEL = "sd_model_checkpoint"


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


async def read_drawing(body: Mapping[str, Any], service: Service, *, from_picture: bool) -> Asked:
    """A body in our words; what has no meaning here is named, not refused."""
    given = {name: value for name, value in body.items() if value is not None}
    prompt, loras, lost = _without_loras(str(given.get("prompt", "")), service.loras)
    options: dict[str, Any] = {ours: given[theirs] for theirs, ours in _PLAIN.items() if theirs in given}
    options |= {"prompts": prompt, "prompt_syntax": "weighted", **_counts(given), **_sampler(given)}
    for name in ("guidance_scale", "variation_strength", "eta"):
        if isinstance(options.get(name), int):
            options[name] = as_float(options[name], name)
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
        options |= {
            "hires": as_float(given.get("hr_scale", 2.0), "hires"),
            "hires_strength": given.get("denoising_strength", 0.5),
        }
        options["hires_upscaler"] = "latent" if LATENT in str(given.get("hr_upscaler", "")) else "picture"
    override = given.get("override_settings")
    override = dict(override) if isinstance(override, dict) else {}
    model = model_name(override.pop(MODEL)) if override.get(MODEL) else None
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
    for grid, label in SCHEDULERS.items():
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
    if mode not in tuple(_FIT):
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


def info_of(job: Job, pngs: Sequence[bytes], asked: Asked) -> dict[str, Any]:
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


def parameters_of(texts: Mapping[str, str]) -> dict[str, str]:
    """A1111's text as pairs."""
    lines = texts.get("parameters", "").splitlines()
    return pairs_of(lines[-1]) if lines else {}


def model_name(value: object) -> str:
    """The name of a model, of what was given as one."""
    if not isinstance(value, str):
        raise InvalidRequestError(MODEL, value, "expected the name of a model; GET /sdapi/v1/sd-models lists them")
    return value
