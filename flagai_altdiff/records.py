"""What a picture's file says of its making, whichever program wrote it: read, and turned into a request. No torch.

Programs write it into a PNG's texts: A1111 under ``parameters``, ComfyUI its graph under ``prompt``, InvokeAI under
``invokeai_metadata``, and we under a key of our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import ImageError
from flagai_altdiff.images import read_texts
from flagai_altdiff.metadata import RECORD_KEY
from flagai_altdiff.prompt_syntax import LORA
from flagai_altdiff.request import MAX_SEED, OPTIONS
from flagai_altdiff.sampling import GRIDS, find_sampler

_SETTINGS = re.compile(r"^Steps: \d+, ", re.MULTILINE)
_PAIR = re.compile(r'(?:\A|(?<=,))([^:,]+):\s*+("(?:\\.|[^"\\])*"|[^,]*)(?:,|\Z)')
_LORA = re.compile(rf"\s?{LORA}")
_MOST = 1_000_000
"""Images of a call that are believed."""
_SIZE = re.compile(r"(\d+)x(\d+)")
_KSAMPLERS = ("KSampler", "KSamplerAdvanced")
_NEGATIVE = "\nNegative prompt: "
_USUAL = "ddim"
_LDM = ("ddim", "plms", "unipc")
"""Samplers whose steps A1111 places as FlagAI does, unless a schedule is named; the others are k-diffusion's."""
_MEANINGLESS = ("Model hash", "VAE hash", "Version", "Lora hashes", "Model", "RNG", "Prompt syntax")
"""What A1111 says besides, and what changes nothing here or is told elsewhere."""
_COMPEL = re.compile(
    r"((?<!\\)\((?:[^()\\]|\\.)*\)|(?<![^\s(),.+-])[^\s(),.+-]+(?=[+-]))(\++|-+|\d+(?:\.\d*)?|\.\d+)(?=[\s),.]|$)"
)
"""A bracket of InvokeAI's prompts with its weight, or a word with signs for one."""
_COMPEL_STEP = {"+": 1.1, "-": 0.9}


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a picture's making.

    Args:
        program: Who wrote it.
        options: Options of a request, with the prompts.
        model: Name of the model, as it was written; empty if nothing was.
        own: All of it, where it is our own record.
        lost: What it says that cannot be carried over, in words.
    """

    program: str
    options: Mapping[str, Any]
    model: str = ""
    own: Mapping[str, Any] = field(default_factory=dict)
    lost: tuple[str, ...] = ()


def read_any(path: Path) -> Record:
    """The record of a picture.

    Raises:
        ImageError: It is no PNG that can be read, or has no record that says enough.
    """
    texts = read_texts(path)
    for read in (_ours, _invokeai, _comfyui, _a1111):
        try:
            found = read(texts)
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None
        except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError):
            continue
        if found is not None:
            return found
    raise ImageError(
        f"{path} does not say how it was made; records of flagai_altdiff, A1111, ComfyUI and InvokeAI are understood."
    )


def pairs_of(text: str) -> dict[str, str]:
    """A1111's pairs, as in ``Steps: 20, Model: "a, b"``; what is quoted stays so."""
    return {key.strip(): value.strip() for key, value in _PAIR.findall(text)}


def _ours(texts: Mapping[str, str]) -> Record | None:
    if RECORD_KEY not in texts:
        return None
    own = json.loads(texts[RECORD_KEY])
    if own.get("grid") is True:
        raise ImageError("it is a grid of several images; name one of them, as samples/00000.png.")
    if own.get("shortened"):
        raise ImageError("its prompt was too long to be recorded whole.")
    places = own.get("index", 0), own.get("prompt_count", 1), own.get("images_per_prompt", 1), own.get("iterations", 1)
    if not all(type(number) is int and 0 <= number <= _MOST for number in places):
        raise ValueError("numbers of images beyond belief")
    options = {name: own[name] for name in OPTIONS if name in own and name != "prompts"}
    options |= {"prompts": [own["prompt"]], "seed": own["request_seed"]}
    return Record(
        program=f"flagai_altdiff {own.get('version', '')}".strip(), options=options, model=own["model"], own=own
    )


def _a1111(texts: Mapping[str, str]) -> Record | None:
    text = texts.get("parameters", "")
    if not (start := _SETTINGS.search(text)):
        return None
    prompt, _, negative = text[: start.start()].rstrip("\n").partition(_NEGATIVE)
    said = {key: _unquoted(value) for key, value in pairs_of(text[start.start() :]).items()}
    options: dict[str, Any] = {
        "prompts": [prompt],
        "negative_prompt": negative,
        "steps": int(said.pop("Steps")),
        "seed": int(said.pop("Seed")),
        "guidance_scale": float(said.pop("CFG scale")),
        "prompt_syntax": "weighted",
    }
    own = said.get("Version", "").startswith("flagai_altdiff")
    if own:
        options["prompt_syntax"] = said.get("Prompt syntax", "plain")
    lost = list(
        _sampler(options, said.pop("Sampler", ""), said.pop("Schedule type", ""), plain="flagai" if own else "")
    )
    lost += ["what a program has removed from our record: its place in a batch, pictures, windows"] if own else []
    lost += [found.strip() for found in _LORA.findall(prompt)]
    options["prompts"] = [_LORA.sub("", prompt)]
    if size := _SIZE.fullmatch(said.pop("Size", "")):
        options |= {"width": int(size[1]), "height": int(size[2])}
    if "Variation seed strength" in said:
        options["variation_strength"] = float(said.pop("Variation seed strength"))
        options["variation_seed"] = int(said.pop("Variation seed"))
    if "Hires upscale" in said:
        options["hires"] = float(said.pop("Hires upscale"))
        options["hires_strength"] = float(said.pop("Denoising strength", 0.5))
        if said.get("Hires upscaler", "").startswith("Latent"):
            options["hires_upscaler"] = "latent"
            del said["Hires upscaler"]
    if 0 <= float(said.get("Token merging ratio", -1)) <= (OPTIONS["token_merging"].maximum or 0):
        options["token_merging"] = float(said.pop("Token merging ratio"))
    model = said.get("Model", "")
    lost += [f"{key}: {value}" for key, value in said.items() if key not in _MEANINGLESS]
    return Record(program="A1111", options=options, model=model, lost=tuple(lost))


def _sampler(options: dict[str, Any], name: str, schedule: str, *, plain: str = "") -> Iterator[str]:
    """Put sampler and grid into the options; what there is none for is lost.

    Args:
        options: Get them.
        name: Of the sampler.
        schedule: Of the grid, if one is named.
        plain: The grid where none is named, if that does not hang on the sampler.
    """
    found = find_sampler(f"{name} {schedule}".strip()) or find_sampler(name)
    if found is None:
        yield f"Sampler: {name} ({_USUAL} in its place)"
    options["sampler"], grid = found or (_USUAL, None)
    wanted = schedule.casefold().replace("_", " ").replace("sgm uniform", "trailing").replace("normal", "uniform")
    grid = grid or (wanted if wanted in GRIDS else None)
    if grid is None and wanted in ("", "automatic", "simple"):
        grid = plain or _usual_grid(options["sampler"])
    if grid:
        options["grid"] = grid
    elif wanted != "ddim":
        yield f"Schedule type: {schedule}"


def _usual_grid(sampler: str) -> str:
    return "flagai" if sampler in _LDM else "karras" if "dpmpp" in sampler else "uniform"


def _unquoted(value: str) -> str:
    return str(json.loads(value)) if value.startswith('"') else value


def _comfyui(texts: Mapping[str, str]) -> Record | None:
    if "prompt" not in texts:
        return None
    graph = json.loads(texts["prompt"])
    (node, *_) = [node["inputs"] for node in graph.values() if node["class_type"] in _KSAMPLERS]
    seed = int(node["seed" if "seed" in node else "noise_seed"])
    options: dict[str, Any] = {
        "prompts": [_text_of(graph, node["positive"])],
        "negative_prompt": _text_of(graph, node["negative"]),
        "steps": int(node["steps"]),
        "guidance_scale": float(node["cfg"]),
        "seed": seed % (MAX_SEED + 1),
        "prompt_syntax": "weighted",
    }
    lost = list(_sampler(options, str(node["sampler_name"]), str(node.get("scheduler", ""))))
    lost += [f"seed: {seed}"] if seed > MAX_SEED else []
    lost += [
        f"{node['inputs']['lora_name']}: {node['inputs'].get('strength_model', 1)}"
        for node in graph.values()
        if "lora_name" in node.get("inputs", {})
    ]
    if "denoise" in node and float(node["denoise"]) < 1:
        lost.append(f"denoise: {node['denoise']}")
    latent = graph[node["latent_image"][0]]["inputs"]
    if {"width", "height"} <= latent.keys():
        options |= {"width": int(latent["width"]), "height": int(latent["height"])}
    named = (n["inputs"].get("ckpt_name") for n in graph.values() if "CheckpointLoader" in n["class_type"])
    return Record(program="ComfyUI", options=options, model=str(next(named, "") or ""), lost=tuple(lost))


def _text_of(graph: Mapping[str, Any], link: list[Any]) -> str:
    """The text that a node's input comes from, through nodes that pass it on."""
    for _ in graph:
        inputs = graph[link[0]]["inputs"]
        if isinstance(inputs.get("text"), str):
            return str(inputs["text"])
        link = inputs.get("text") or inputs.get("conditioning") or inputs["conditioning_1"]
    raise ValueError("the graph goes round in circles")


def _invokeai(texts: Mapping[str, str]) -> Record | None:
    if "invokeai_metadata" not in texts:
        return None
    own = json.loads(texts["invokeai_metadata"])
    options: dict[str, Any] = {
        "prompts": [own["positive_prompt"]],
        "negative_prompt": own.get("negative_prompt") or "",
        "prompt_syntax": "plain",
        "steps": int(own["steps"]),
        "guidance_scale": float(own["cfg_scale"]),
        "seed": int(own["seed"]),
        "width": int(own["width"]),
        "height": int(own["height"]),
    }
    if any(_COMPEL.search(text) for text in (*options["prompts"], options["negative_prompt"])):
        options["prompts"], options["prompt_syntax"] = [_weighted(text) for text in options["prompts"]], "weighted"
        options["negative_prompt"] = _weighted(options["negative_prompt"])
    scheduler = str(own.get("scheduler", ""))
    lost = list(_sampler(options, scheduler.removesuffix("_k"), "karras" if scheduler.endswith("_k") else ""))
    lost += [
        f"LoRA: {_name_of(lora.get('model', lora.get('lora')))}: {lora.get('weight', 1)}"
        for lora in own.get("loras") or ()
    ]
    return Record(program="InvokeAI", options=options, model=_name_of(own.get("model")), lost=tuple(lost))


def _name_of(model: Any) -> str:
    return str(model.get("name") or model.get("model_name") or "") if isinstance(model, dict) else str(model or "")


def _weighted(text: str) -> str:
    """InvokeAI's weights, ``word++`` and ``(some words)1.2``, as A1111's; its other brackets say nothing."""
    parts, place = [], 0
    for found in _COMPEL.finditer(text):
        what, how = found[1].removeprefix("(").removesuffix(")"), found[2]
        weight = _COMPEL_STEP[how[0]] ** len(how) if how[0] in _COMPEL_STEP else float(how)
        parts += [_escaped(text[place : found.start()]), f"({_escaped(what)}:{weight:.3g})"]
        place = found.end()
    return "".join([*parts, _escaped(text[place:])])


def _escaped(text: str) -> str:
    return re.sub(r"(?<!\\)([()\[\]])", r"\\\1", text)
