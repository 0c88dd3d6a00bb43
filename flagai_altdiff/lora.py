"""LoRA: small additions to weights, read from the files that other programs write, added to a model, and trained.

**Source**: Hu et al. 2022 (arXiv 2106.09685). The file that is written here has kohya's names, which both A1111 and
diffusers read. It is not built on peft, whose adapters rename the weights of the model that they are put into: a
parametrization of torch does the same in a few lines, and a model with one still loads and saves under its own names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, printable
from flagai_altdiff.files import new_file
from flagai_altdiff.models import LatentDiffusion, build_model

ATTENTION = r"model\.diffusion_model\..*\.attn[12]\.to_(q|k|v|out\.0)\.weight"
"""The weights that a LoRA is usually trained on: the UNet's attention."""
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
    weights = _weights(config)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        name, part = _place(key, weights)
        if name is None:
            unknown.append(key)
        else:
            parts.setdefault(name, {})[part] = tensor
    if not parts:
        first = ", ".join(printable(key, 80) for key in sorted(tensors)[:3])
        raise CheckpointError(f"{path} is no LoRA for AltDiffusion: its keys are {first}.")
    if unknown:
        first = ", ".join(printable(key, 80) for key in sorted(unknown)[:3])
        clip = (
            " It was made for Stable Diffusion's text encoder." if "lora_te" in first or "text_model" in first else ""
        )
        raise CheckpointError(f"{path} has {len(unknown)} keys that this model has no place for: {first}.{clip}")
    shapes = _shapes(config)
    return {name: _addition(path, name, found, shapes[name]) for name, found in parts.items()}


def add_lora(model: LatentDiffusion, path: Path, strength: float = 1.0) -> None:
    """Add a LoRA to a model's weights, for good.

    Args:
        model: Changed in place.
        path: See :func:`read_lora`.
        strength: How strong; 0 changes nothing, negative ones take away.

    Raises:
        CheckpointError: See :func:`read_lora`; nothing was changed.
    """
    additions = read_lora(path, model.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, addition in additions.items():
            weight = parameters[name]
            weight.add_(addition.times(strength).view(weight.shape).to(weight))


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
    model: LatentDiffusion, *, rank: int, alpha: float, generator: torch.Generator, pattern: str = ATTENTION
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
    names = {ours: (part, theirs) for part, ours, theirs in _names(config)}
    tensors = {}
    for name, addition in additions.items():
        part, theirs = names[name]
        key = _KOHYA[part] + theirs.removesuffix(".weight").replace(".", "_")
        rank = addition.down.shape[0]
        tensors[f"{key}.lora_down.weight"] = addition.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = addition.up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(addition.scale * rank)
    ranks = {addition.down.shape[0] for addition in additions.values()}
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)), "format": "pt", **notes}
    with new_file(path, replace=True) as unfinished:
        save_file(tensors, unfinished, metadata=metadata)


def _names(config: LatentDiffusionConfig) -> Iterator[tuple[str, str, str]]:
    """(part, LDM's name, diffusers' name) of every weight that a LoRA may be for."""
    for name in _shapes(config):
        for part, tensors in to_diffusers({name: torch.empty(0, 0)}, config).items():
            if part in _KOHYA:
                yield from ((part, name, theirs) for theirs in tensors)


def _shapes(config: LatentDiffusionConfig) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        model = build_model(config)
    weights = ((name, weight) for name, weight in model.named_parameters() if weight.ndim >= 2)
    return {name: (weight.shape[0], weight[0].numel()) for name, weight in weights}


def _weights(config: LatentDiffusionConfig) -> dict[str, str]:
    """What files call the modules, with dots and with underscores for them -> LDM's name of the weight."""
    found = {}
    for part, ours, theirs in _names(config):
        module, own = theirs.removesuffix(".weight"), ours.removesuffix(".weight").split(".", 1)[1]
        own = own.removeprefix("diffusion_model.")
        found[f"{part}.{module}"] = ours
        for name in (module, own):
            found[_KOHYA[part] + name.replace(".", "_")] = ours
    return found


def _place(key: str, weights: Mapping[str, str]) -> tuple[str | None, str]:
    """The weight that a key of a file is for, and which part of its addition it is."""
    for end, part in _ENDS.items():
        if key.endswith(end):
            module = key.removesuffix(end)
            if end.startswith("_"):  # of diffusers' first years: <attention>.processor.to_q_lora.down.weight
                module = module.replace(".processor.", ".").replace(".to_out", ".to_out.0")
            return weights.get(module.removeprefix("base_model.model.")), part
    return None, ""


def _addition(path: Path, name: str, found: Mapping[str, Tensor], shape: tuple[int, int]) -> Addition:
    if not found.keys() >= {"up", "down"}:
        raise CheckpointError(f"{path} is a truncated LoRA: of {name} it has only {', '.join(found)}.")
    up, down = found["up"].flatten(1), found["down"].flatten(1)
    if up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != shape:
        has = f"{list(found['up'].shape)} and {list(found['down'].shape)}"
        raise CheckpointError(
            f"{path} is a LoRA for another model: its {name} is {has}, but the weight is {list(shape)} (out, in)."
        )
    alpha = float(found["alpha"]) if "alpha" in found else float(down.shape[0])
    return Addition(up, down, alpha / down.shape[0])
