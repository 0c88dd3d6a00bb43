"""What a PNG remembers of its making: A1111's ``parameters`` text, and an unambiguous JSON record beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image

from flagai_altdiff import __version__
from flagai_altdiff.pipeline import Picture
from flagai_altdiff.request import GenerationRequest

RECORD_KEY = "flagai_altdiff"
"""Key of the JSON record."""

_MAX_CHARACTERS = 20_000

_SAMPLER_TITLES = {"ddim": "DDIM", "plms": "PLMS", "dpmpp_2m": "DPM++ 2M", "euler_ancestral": "Euler a"}


def png_texts(picture: Picture, request: GenerationRequest, model_name: str, run: str) -> dict[str, str]:
    """Texts to keep in a picture's PNG.

    Args:
        picture: The picture.
        request: The request it answers, as it was carried out.
        model_name: Name of the model.
        run: Id of the run that it belongs to.

    Returns:
        Key -> text. A prompt may contain anything, so programs should read the record, not ``parameters``.
    """
    picture = replace(picture, prompt=_shortened(picture.prompt))
    request = replace(request, negative_prompt=_shortened(request.negative_prompt))
    return {"parameters": _parameters(picture, request, model_name), RECORD_KEY: _record(picture, request, model_name, run)}


def grid_texts(first: Picture, request: GenerationRequest, model_name: str, run: str) -> dict[str, str]:
    """Texts to keep in a grid's PNG: those of its first picture, as A1111 does, with a record that says it is a grid."""
    texts = png_texts(first, request, model_name, run)
    record = {k: v for k, v in json.loads(texts[RECORD_KEY]).items() if k not in ("index", "safety")}
    return {**texts, RECORD_KEY: json.dumps({"grid": True, **record}, ensure_ascii=False)}


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a picture; empty where there is none that can be read.

    Args:
        path: Any file. Texts of more than a mebibyte and pictures of absurd size are not looked at.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            record = json.loads(image.info.get(RECORD_KEY, "{}"))
    except (OSError, ValueError, SyntaxError, TypeError, RecursionError, Image.DecompressionBombError):
        return {}
    return record if isinstance(record, dict) else {}


def _shortened(text: str) -> str:
    """``text``, or its beginning and its length: readers of PNG refuse texts of more than a mebibyte."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}… ({len(text)} characters)"


def _parameters(picture: Picture, request: GenerationRequest, model_name: str) -> str:
    pairs = {
        "Steps": request.steps,
        "Sampler": _SAMPLER_TITLES[request.sampler],
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": picture.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": json.dumps(model_name, ensure_ascii=False) if set(model_name) & set(",:\n") else model_name,
        "Version": f"flagai_altdiff {__version__}",
    }
    if request.eta:
        pairs["Eta"] = f"{request.eta:g}"
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{picture.prompt}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in pairs.items())


def _record(picture: Picture, request: GenerationRequest, model_name: str, run: str) -> str:
    settings = asdict(request)
    settings.pop("prompts")
    return json.dumps(
        {
            "version": __version__,
            "model": model_name,
            "prompt": picture.prompt,
            **settings,
            "seed": picture.seed,
            "request_seed": request.seed,
            "run": run,
            "index": picture.index,
            "safety": picture.safety,
        },
        ensure_ascii=False,
    )
