"""What a PNG remembers of its making: A1111's ``parameters`` text, and an unambiguous JSON record beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flagai_altdiff import __version__
from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import read_texts
from flagai_altdiff.models import AddedLora
from flagai_altdiff.pipeline import Sample
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling import SAMPLERS

RECORD_KEY = "flagai_altdiff"
"""Key of the JSON record."""

_MAX_CHARACTERS = 20_000


def png_texts(
    sample: Sample, request: ResolvedRequest, model_name: str, run: str, loras: Sequence[AddedLora] = ()
) -> dict[str, str]:
    """Texts to keep in an image's PNG.

    Args:
        sample: The image.
        request: The request that it answers.
        model_name: Name of the model.
        run: Id of the run that it belongs to.
        loras: What was added to the model.

    Returns:
        Key -> text. A prompt may contain anything, so programs should read the record, not ``parameters``.
    """
    prompt = _shortened(sample.prompt)
    model_name = _text(model_name)
    loras = [replace(lora, name=_text(lora.name)) for lora in loras]
    request = replace(request, negative_prompt=_shortened(request.negative_prompt))
    return {
        "parameters": _parameters(prompt, sample, request, model_name, loras),
        RECORD_KEY: _record(prompt, sample, request, model_name, run, loras),
    }


def grid_texts(
    first: Sample, request: ResolvedRequest, model_name: str, run: str, loras: Sequence[AddedLora] = ()
) -> dict[str, str]:
    """Texts to keep in a grid's PNG: those of its first image, as A1111 does, with a record that says it is a grid."""
    texts = png_texts(first, request, model_name, run, loras)
    record = {k: v for k, v in json.loads(texts[RECORD_KEY]).items() if k not in ("index", "safety", "fit")}
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


def _text(name: str) -> str:
    """The name of a file or folder, which may be no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _quoted(text: str) -> str:
    """A value of ``parameters``, as A1111 writes it."""
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _parameters(
    prompt: str, sample: Sample, request: ResolvedRequest, model_name: str, loras: Sequence[AddedLora]
) -> str:
    pairs = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": sample.seed,
        "Size": f"{request.width}x{request.height}",
        "Model": _quoted(model_name),
        "Version": f"flagai_altdiff {__version__}",
    }
    if request.eta:
        pairs["Eta"] = f"{request.eta:g}"
    if loras:
        pairs["Lora hashes"] = _quoted(", ".join(f"{lora.name}: {lora.sha256}" for lora in loras))
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in pairs.items())


def _record(
    prompt: str,
    sample: Sample,
    request: ResolvedRequest,
    model_name: str,
    run: str,
    loras: Sequence[AddedLora],
) -> str:
    settings = {name: value for name, value in request.as_json().items() if name != "prompts"}
    own = {
        "version": __version__,
        "model": model_name,
        **({"loras": [asdict(lora) for lora in loras]} if loras else {}),
        "prompt": prompt,
        **settings,
        "seed": sample.seed,
        "request_seed": request.seed,
        "run": run,
        "index": sample.index,
        "safety": sample.safety,
        **({"fit": asdict(sample.fit)} if sample.fit else {}),
    }
    return json.dumps(own, ensure_ascii=False)
