"""LoRA: small additions to weights, read from the files that other programs write, added to a model, and trained.

**Source**: Hu et al. 2022 (arXiv 2106.09685). The file that is written here has kohya's names, which both A1111 and
diffusers read. It is not built on peft, whose adapters rename the weights of the model that they are put into: a
parametrization of torch does the same in a few lines, and a model with one still loads and saves under its own names.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flagai_altdiff.added import AddedLora
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.checkpoint.layouts import detect
from flagai_altdiff.checkpoint.layouts import read as read_layout
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, InvalidRequestError, printable
from flagai_altdiff.files import new_file, short_hash
from flagai_altdiff.model_files import is_weight
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.quantizing import refuse_quantized

TRANSFORMERS = (
    r"model\.diffusion_model\..*\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2)|proj_in|proj_out)\.weight"
)
"""The weights that kohya's trainer adds to as well: the UNet's transformers, with their projections in and out."""
_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
_ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_OTHERS = {
    "hada_w": "LoHa",
    "lokr_w": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "lora_mid": "a Tucker LoRA",
}
_OF_CLIP = re.compile(r"lora_te\d?_text_model_|text_encoder\.text_model\.|^text_model\.encoder\.layers\.")
"""Keys for the text encoder that AltDiffusion does without."""
_ADAPTER_CONFIG = "adapter_config.json"
"""What peft writes beside a LoRA: its alpha, for one."""
_ADAPTER_METADATA = "lora_adapter_metadata"
"""Where diffusers writes the same: as a JSON text in the file's header."""
_MAX_ADAPTER_BYTES = 1 << 20
_MAX_STRENGTH = 10.0
Shape = tuple[int, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Addition:
    """What is added to one weight: ``scale * up @ down``.

    Args:
        up: (out, rank).
        down: (rank, in).
        scale: alpha / rank.
    """

    up: Tensor = field(repr=False)
    down: Tensor = field(repr=False)
    scale: float

    def times(self, strength: float) -> Tensor:
        """The whole of it, (out, in), ``strength`` times as strong."""
        return strength * self.scale * (self.up.float() @ self.down.float())


def _whose(keys: Iterable[str]) -> str:
    """What a file without a place here may be, in a sentence."""
    keys = list(keys)
    if any("lora_te2_" in key or "text_encoder_2" in key for key in keys):
        return " It is for Stable Diffusion XL."
    if any("attn1" in key or "attn2" in key for key in keys):
        return " LoRAs of Stable Diffusion 1.x fit AltDiffusion and AltDiffusion-m9, those of 2.x AltDiffusion-m18."
    return ""


def read_lora(path: Path, config: LatentDiffusionConfig) -> dict[str, Addition]:
    """The additions of a file, under LDM's names of the weights.

    Args:
        path: safetensors or a pickle, with the names of kohya, diffusers or peft.
        config: Of the model that it is for.

    Raises:
        CheckpointError: It is no LoRA, one of another kind, or for another model.
    """
    tensors = read_tensors(path)
    for mark, kind in _OTHERS.items():
        if any(mark in key for key in tensors):
            raise CheckpointError(f"{path} is {kind}, which is not supported; only plain LoRAs are.")
    names, shapes = _names(config)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, part = _place(key, names)
        if name is None:
            unknown.append(key)
        else:
            parts.setdefault(name, {})[part] = tensor
    if not parts:
        first = ", ".join(printable(key, 80) for key in sorted(tensors)[:3])
        raise CheckpointError(f"{path} is no LoRA for this model: its keys are {first}.{_whose(tensors)}")
    clip = [key for key in unknown if _OF_CLIP.search(key)]
    if others := sorted(set(unknown) - set(clip)):
        first = ", ".join(printable(key, 80) for key in others[:3])
        raise CheckpointError(f"{path} has {len(others)} keys that this model has no place for: {first}.")
    if clip:
        first = printable(min(clip), 80)
        logger.warning(
            "%s: %d keys are left out, %s for one: they are for CLIP, the text encoder of Stable Diffusion, in whose "
            "place this model has XLM-R. What the LoRA adds to the UNet is used.",
            printable(str(path)),
            len(clip),
            first,
        )
    scale = None if any("alpha" in found for found in parts.values()) else _adapter_scale(path)
    return {name: _addition(path, name, found, shapes[name], scale) for name, found in parts.items()}


def add_lora(model: LatentDiffusion, path: str | Path, strength: float = 1.0, *, removable: bool = False) -> None:
    """Add a LoRA to a model's weights; ``model.loras`` says which ones have been.

    Args:
        model: Changed in place.
        path: See :func:`read_lora`.
        strength: How strong, from -10 to 10; 0 changes nothing, negative ones take away.
        removable: Keep the weights as they were, on the CPU, for :func:`remove_loras`; otherwise it is for good.

    Raises:
        CheckpointError: See :func:`read_lora`; nothing was changed.
        InvalidRequestError: ``strength`` is out of range, or the model is quantized.
    """
    path = Path(path)
    check_strength(strength)
    refuse_quantized(model, "lora", str(path))
    additions = read_lora(path, model.config)
    digest = short_hash(path)
    if removable is not bool(model.before_loras) and model.loras:
        raise InvalidRequestError("removable", removable, "the same for all LoRAs of a model")
    parameters = _weights_at_home(model)
    with torch.no_grad():
        for name, addition in additions.items():
            weight = parameters[name]
            if removable:
                model.before_loras.setdefault(name, weight.detach().to("cpu", copy=True))
            weight.add_(addition.times(strength).view(weight.shape).to(weight))
    model.loras = (*model.loras, AddedLora(name=path.stem, strength=float(strength), sha256=digest))


def remove_loras(model: LatentDiffusion) -> None:
    """Give a model the very weights that it had before its LoRAs.

    Raises:
        InvalidRequestError: They were added for good.
    """
    if model.loras and not model.before_loras:
        raise InvalidRequestError("removable", False, "LoRAs that are to be taken off are added with removable=True")
    parameters = _weights_at_home(model)
    with torch.no_grad():
        for name, before in model.before_loras.items():
            parameters[name].copy_(before)
    model.loras, model.before_loras = (), {}


def _weights_at_home(model: LatentDiffusion) -> dict[str, nn.Parameter]:
    """The weights by name, none of them a copy elsewhere."""
    if model.keeper:
        model.keeper.send_home()
    return dict(model.named_parameters())


def check_strength(strength: float) -> None:
    """InvalidRequestError unless a LoRA can be added as strongly as that."""
    if not math.isfinite(strength) or abs(strength) > _MAX_STRENGTH:
        expected = f"a number from {-_MAX_STRENGTH:g} to {_MAX_STRENGTH:g}, usually 0.5 to 1"
        raise InvalidRequestError("lora_strength", strength, expected)


def check_loras(loras: Sequence[tuple[Path, float]], model: Path) -> None:
    """Find out whether LoRAs fit a model, before its weights are read.

    Args:
        loras: Files and strengths.
        model: Place of the model; nothing is said of one that is not all there.

    Raises:
        CheckpointError: See :func:`read_lora`.
        InvalidRequestError: A strength is out of range.
    """
    for _, strength in loras:
        check_strength(strength)
    layout = detect(model) if loras else None
    if layout and not layout.missing:
        config = read_layout(layout)[0]
        for path, _ in loras:
            read_lora(path, config)


def lora_files(path: str | Path) -> list[Path]:
    """The LoRAs at a path: the file itself, or all files of weights in a folder.

    Args:
        path: File or folder.

    Raises:
        CheckpointError: There are none.
    """
    path = Path(path)
    found = sorted(file for file in path.iterdir() if is_weight(file.name)) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise CheckpointError(f"{path} is no LoRA: expected a file of weights, or a folder with some.")
    return found


class LowRank(nn.Module):
    """A parametrization that adds ``alpha / rank * up @ down`` to a weight; it begins as nothing.

    Args:
        weight: What it is added to.
        rank: Columns of ``up``.
        alpha: See above.
        generator: Draws the first values of ``down``.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        out, into = weight.flatten(1).shape
        first = torch.randn(rank, into, generator=generator) / rank
        self.down = nn.Parameter(first.to(weight))
        self.up = nn.Parameter(torch.zeros(out, rank).to(weight))
        self.alpha = alpha

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the addition."""
        return weight + (self.alpha / self.down.shape[0] * (self.up @ self.down)).view(weight.shape)


def make_trainable(
    model: LatentDiffusion, *, rank: int, alpha: float, generator: torch.Generator, pattern: str = TRANSFORMERS
) -> list[str]:
    """Put a trainable LoRA onto weights of a model; the names of these weights.

    Args:
        model: Changed in place: its weights stay, and :func:`finished` takes the additions off again.
        rank: Of the additions.
        alpha: Their scale, times the rank.
        generator: Draws their first values.
        pattern: Of the names of the weights.
    """
    names = [name for name, weight in model.named_parameters() if re.fullmatch(pattern, name) and weight.ndim >= 2]
    for name in names:
        module, weight = model.get_submodule(name.rpartition(".")[0]), model.get_parameter(name)
        parametrize.register_parametrization(module, "weight", LowRank(weight, rank, alpha, generator))
    return names


def finished(model: LatentDiffusion, *, merge: bool = False) -> dict[str, Addition]:
    """Take a trained LoRA off a model.

    Args:
        model: Changed in place.
        merge: Whether its weights keep what was added.

    Returns:
        The additions, under the names of the weights.
    """
    found: dict[str, Addition] = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        low_rank = module.parametrizations["weight"][0]  # type: ignore[index,union-attr]
        assert isinstance(low_rank, LowRank)
        scale = low_rank.alpha / low_rank.down.shape[0]
        found[f"{name}.weight"] = Addition(low_rank.up.detach().cpu(), low_rank.down.detach().cpu(), scale)
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=merge)
    return found


def save_lora(path: Path, additions: Mapping[str, Addition], config: LatentDiffusionConfig, **notes: str) -> None:
    """Write a LoRA that A1111 and diffusers read.

    Args:
        path: A ``.safetensors`` file; replaced if it exists.
        additions: From :func:`finished`.
        config: Of the model.
        notes: Texts to keep in the file.
    """
    shapes = _shapes(config)
    names = {ours: (part, theirs) for part, ours, theirs in _spellings(shapes, config)}
    tensors = {}
    for name, addition in additions.items():
        part, theirs = names[name]
        key = _KOHYA[part] + theirs.removesuffix(".weight").replace(".", "_")
        rank, (out, *rest) = addition.down.shape[0], shapes[name]
        # The matrices of a convolution are written as convolutions, as others expect them.
        tensors[f"{key}.lora_down.weight"] = addition.down.reshape(rank, *rest).contiguous()
        tensors[f"{key}.lora_up.weight"] = addition.up.reshape(out, rank, *(1 for _ in rest[1:])).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(addition.scale * rank)
    ranks = {addition.down.shape[0] for addition in additions.values()}
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)), "format": "pt", **notes}
    with new_file(path, replace=True) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def _spellings(shapes: Mapping[str, Shape], config: LatentDiffusionConfig) -> list[tuple[str, str, str]]:
    """(part, LDM's name, diffusers' name) of every weight that a LoRA may be for."""
    marks = {name: torch.empty(0, device="meta") for name in shapes}
    ours = {id(mark): name for name, mark in marks.items()}
    parts = to_diffusers(marks, config)
    return [(part, ours[id(mark)], theirs) for part in _KOHYA for theirs, mark in parts[part].items()]


def _shapes(config: LatentDiffusionConfig) -> dict[str, Shape]:
    """Weights that can be added to."""
    with torch.device("meta"):
        model = build_model(config)
    return {name: tuple(weight.shape) for name, weight in model.named_parameters() if weight.ndim >= 2}


@functools.lru_cache(maxsize=4)
def _names(config: LatentDiffusionConfig) -> tuple[dict[str, str], dict[str, Shape]]:
    """What files call the modules, with dots and with underscores for them -> LDM's name of the weight; its shape."""
    shapes = _shapes(config)
    found: dict[str, str] = {}
    for part, ours, theirs in _spellings(shapes, config):
        module, own = theirs.removesuffix(".weight"), ours.removesuffix(".weight").split(".", 1)[1]
        own = own.removeprefix("diffusion_model.")
        found |= {f"{part}.{module}": ours, module: ours}
        for name in (module, own):
            found[_KOHYA[part] + name.replace(".", "_")] = ours
    return found, shapes


def _place(key: str, weights: Mapping[str, str]) -> tuple[str | None, str]:
    """The weight that a key of a file is for, and which part of its addition it is."""
    for end, part in _ENDS.items():
        if key.endswith(end):
            module = key.removesuffix(end)
            if end.startswith("_"):  # of diffusers' first years: <attention>.processor.to_q_lora.down.weight
                module = module.replace(".processor.", ".").replace(".to_out", ".to_out.0")
            return weights.get(module.removeprefix("base_model.model.")), part
    return None, ""


def _adapter_scale(path: Path) -> float | None:
    """alpha / rank where the file has no alphas, but peft's or diffusers' settings go with it; ``None`` without any.

    Raises:
        CheckpointError: These settings ask for something else than one scale for all weights.
    """
    settings = {key.rpartition(".")[2]: value for key, value in _adapter_settings(path).items()}
    odd = [name for name in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if settings.get(name)]
    if odd:
        raise CheckpointError(f"{path} is a LoRA with {', '.join(odd)}, which is not supported; only plain LoRAs are.")
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int) or rank < 1:
        return None
    return alpha / rank


def _adapter_settings(path: Path) -> dict[str, Any]:
    beside = path.with_name(_ADAPTER_CONFIG)
    try:
        if beside.is_file() and path.stem == "adapter_model":
            text = beside.read_bytes()[:_MAX_ADAPTER_BYTES].decode("utf-8")
        else:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_ADAPTER_METADATA, "{}")
        settings = json.loads(text)
    except SafetensorError:  # a pickle, as read_tensors has read it
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the settings of {path} cannot be read: {error}.") from error
    return settings if isinstance(settings, dict) else {}


def _addition(path: Path, name: str, found: Mapping[str, Tensor], shape: Shape, scale: float | None) -> Addition:
    if not found.keys() >= {"up", "down"}:
        raise CheckpointError(f"{path} is a truncated LoRA: of {name} it has only {', '.join(found)}.")
    if found["up"].ndim < 2 or found["down"].ndim < 2 or found.get("alpha", torch.zeros(1)).numel() != 1:
        raise CheckpointError(f"{path} is no LoRA: of {name} its up and down must be matrices, its alpha a number.")
    up, down = found["up"].flatten(1), found["down"].flatten(1)
    if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != (shape[0], math.prod(shape[1:])):
        has = f"{list(found['up'].shape)} and {list(found['down'].shape)}"
        raise CheckpointError(
            f"{path} is a LoRA for another model: its {name} is {has}, but the weight is {list(shape)}."
        )
    if "alpha" in found:
        scale = float(found["alpha"]) / down.shape[0]
    if not (up.float().isfinite().all() and down.float().isfinite().all() and math.isfinite(scale or 0)):
        raise CheckpointError(f"{path} is broken: {name} has NaN or infinity in it. Fetch or train it again.")
    return Addition(up, down, 1.0 if scale is None else scale)
