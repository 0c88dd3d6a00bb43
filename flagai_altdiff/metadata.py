"""What a PNG remembers of its making: A1111's ``parameters`` text, and an unambiguous JSON record beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff import __version__
from flagai_altdiff.added import Added, AddedLora, AddedPart
from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import read_texts
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling import SAMPLERS

if TYPE_CHECKING:
    from flagai_altdiff.pipeline import Sample

RECORD_KEY = "flagai_altdiff"
"""Key of the JSON record."""

_MAX_CHARACTERS = 20_000


def png_texts(
    sample: Sample, request: ResolvedRequest, model_name: str, run: str, added: Sequence[Added] = ()
) -> dict[str, str]:
    """Texts to keep in an image's PNG.

    Args:
        sample: The image.
        request: The request that it answers.
        model_name: Name of the model.
        run: Id of the run that it belongs to.
        added: What was added to the model.

    Returns:
        Key -> text. A prompt may contain anything, so programs should read the record, not ``parameters``.
    """
    prompt = _shortened(sample.prompt)
    is_shortened = prompt != sample.prompt or _shortened(request.negative_prompt) != request.negative_prompt
    model_name = _text(model_name)
    added = [replace(part, name=_text(part.name)) for part in added]
    count = len(request.prompts)  # the others may be ten thousand, and this is done for each of them
    request = replace(request, prompts=("",), negative_prompt=_shortened(request.negative_prompt))
    return {
        "parameters": _parameters(prompt, sample, request, model_name, added),
        RECORD_KEY: _record(prompt, sample, request, model_name, run, added, count, is_shortened=is_shortened),
    }


def grid_texts(
    first: Sample, request: ResolvedRequest, model_name: str, run: str, added: Sequence[Added] = ()
) -> dict[str, str]:
    """Texts to keep in a grid's PNG: those of its first image, as A1111 does, with a record that says it is a grid."""
    texts = png_texts(first, request, model_name, run, added)
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


def _parameters(prompt: str, sample: Sample, request: ResolvedRequest, model_name: str, added: Sequence[Added]) -> str:
    pairs = {
        "Steps": request.steps,
        "Sampler": SAMPLERS[request.sampler].title,
        **({} if request.grid == "flagai" else {"Schedule type": request.grid.title()}),
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": sample.seed,
        "Size": "x".join(map(str, request.final_size)),
        "Model": _quoted(model_name),
        "Version": f"flagai_altdiff {__version__}",
    }
    if request.prompt_syntax != "plain":
        pairs["Prompt syntax"] = request.prompt_syntax
    if request.init_image is not None:
        pairs["Denoising strength"] = f"{request.strength:g}"
    if request.hires is not None:
        pairs["Size"] = f"{request.width}x{request.height}"
        pairs |= {"Hires upscale": f"{request.hires:g}", "Denoising strength": f"{request.hires_strength:g}"}
    if request.variation_strength:
        pairs["Variation seed"] = (request.variation_seed or 0) + sample.index
        pairs["Variation seed strength"] = f"{request.variation_strength:g}"
    if request.token_merging:
        pairs["Token merging ratio"] = f"{request.token_merging:g}"
    if request.eta:
        pairs["Eta"] = f"{request.eta:g}"
    if loras := [part for part in added if isinstance(part, AddedLora)]:
        pairs["Lora hashes"] = _quoted(", ".join(f"{lora.name}: {lora.sha256}" for lora in loras))
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return f"{prompt}{negative}\n" + ", ".join(f"{k}: {v}" for k, v in pairs.items())


def _listed(added: Sequence[Added], kind: type[Added]) -> list[dict[str, Any]]:
    return [asdict(part) for part in added if isinstance(part, kind)]


def _record(
    prompt: str,
    sample: Sample,
    request: ResolvedRequest,
    model_name: str,
    run: str,
    added: Sequence[Added],
    prompt_count: int,
    *,
    is_shortened: bool,
) -> str:
    settings = {name: value for name, value in request.as_json().items() if name != "prompts"}
    own = {
        "version": __version__,
        "model": model_name,
        **({"loras": loras} if (loras := _listed(added, AddedLora)) else {}),
        **({"parts": parts} if (parts := _listed(added, AddedPart)) else {}),
        "prompt": prompt,
        **settings,
        "seed": sample.seed,
        "request_seed": request.seed,
        "run": run,
        **({"shortened": True} if is_shortened else {}),
        **({"prompt_count": prompt_count} if prompt_count > 1 else {}),
        "index": sample.index,
        "safety": sample.safety,
        **({"fit": asdict(sample.fit)} if sample.fit else {}),
    }
    return json.dumps(own, ensure_ascii=False)
