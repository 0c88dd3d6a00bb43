"""What a PNG remembers of its making: A1111's ``parameters`` text, and an unambiguous JSON record beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from flagai_altdiff import __version__
from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import read_texts
from flagai_altdiff.pipeline import Sample
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling import SAMPLERS

RECORD_KEY = "flagai_altdiff"
"""Key of the JSON record."""

_MAX_CHARACTERS = 20_000


def png_texts(sample: Sample, request: ResolvedRequest, model_name: str, run: str) -> dict[str, str]:
    """Texts to keep in an image's PNG.

    Args:
        sample: The image.
        request: The request that it answers.
        model_name: Name of the model.
        run: Id of the run that it belongs to.

    Returns:
        Key -> text. A prompt may contain anything, so programs should read the record, not ``parameters``.
    """
    prompt = _shortened(sample.prompt)
    model_name = model_name.encode("utf-8", "backslashreplace").decode()  # a folder's name may be no text
    request = replace(request, negative_prompt=_shortened(request.negative_prompt))
    return {
        "parameters": _parameters(prompt, sample, request, model_name),
        RECORD_KEY: _record(prompt, sample, request, model_name, run),
    }


def grid_texts(first: Sample, request: ResolvedRequest, model_name: str, run: str) -> dict[str, str]:
    """Texts to keep in a grid's PNG: those of its first image, as A1111 does, with a record that says it is a grid."""
    texts = png_texts(first, request, model_name, run)
    record = {k: v for k, v in json.loads(texts[RECORD_KEY]).items() if k not in ("index", "safety")}
    return {**texts, RECORD_KEY: json.dumps({"grid": True, **record}, ensure_ascii=False)}


def read_record(path: Path, size: tuple[int, int] | None = None) -> dict[str, Any]:
    """The JSON record of an image; empty where there is none that can be read.

    Args:
        path: Any file. Texts of more than a mebibyte are not looked at.
        size: Width and height that it must have.
    """
    try:
        record = json.loads(read_texts(path, size).get(RECORD_KEY, "{}"))
    except (ImageError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _shortened(text: str) -> str:
    """``text``, or its beginning and its length: readers of PNG refuse texts of more than a mebibyte."""
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}… ({len(text)} characters)"


def _parameters(prompt: str, sample: Sample, request: ResolvedRequest, model_name: str) -> str:
    pairs = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": sample.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": json.dumps(model_name, ensure_ascii=False) if set(model_name) & set(",:\n") else model_name,
        "Version": f"flagai_altdiff {__version__}",
    }
    if request.eta:
        pairs["Eta"] = f"{request.eta:g}"
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in pairs.items())


def _record(prompt: str, sample: Sample, request: ResolvedRequest, model_name: str, run: str) -> str:
    settings = {name: value for name, value in request.as_json().items() if name != "prompts"}
    own = {
        "version": __version__,
        "model": model_name,
        "prompt": prompt,
        **settings,
        "seed": sample.seed,
        "request_seed": request.seed,
        "run": run,
        "index": sample.index,
        "safety": sample.safety,
    }
    return json.dumps(own, ensure_ascii=False)
