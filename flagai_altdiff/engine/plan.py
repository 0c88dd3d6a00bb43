"""How much memory drawing takes, told beforehand: weights where they work, and the feature maps that live at once.

Bytes are counted as torch takes them without gradients: for each layer its input, its output, what it makes in
between, and on a processor the copies that oneDNN lays out for a convolution. Python and torch themselves are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import nn

from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.engine.eager import images_at_once
from flagai_altdiff.engine.sparing import INNER_BYTES
from flagai_altdiff.engine.strips import STRIP_BYTES
from flagai_altdiff.machine import MEMORY_MODES
from flagai_altdiff.memory import Planning, free_memory
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.attention import SpatialTransformer
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.layers import Upsample
from flagai_altdiff.models.unet import ResBlock, UNetModel
from flagai_altdiff.placement import layers_of, parts_of
from flagai_altdiff.request import ResolvedRequest

_FULL = torch.float32.itemsize
_STRIPS_AT_WORK = 6
"""Strips that a layer holds beside its maps: with neighbours, normed, padded twice, laid out, and what comes out."""
_HOLES = 1.1
"""How many times their own size the strips of a map take: strips of other sizes do not fit into what they leave."""
_TOKENS = 77


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is drawn at once.

    Args:
        height: Of an image, px.
        width: Of an image, px.
        batch: Images.
        guided: Whether each is looked at with and without its prompt.
    """

    height: int
    width: int
    batch: int = 1
    guided: bool = True


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that a part takes while it works.

    Args:
        weights: On the device; on a CPU those that lie in memory of the process's own, not those that are mapped.
        working: Feature maps and what is made in between.
    """

    weights: int
    working: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.working


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What each part takes while it works.

    Args:
        text: The text encoder.
        unet: The UNet.
        vae: The decoder.
    """

    text: Need
    unet: Need
    vae: Need

    @property
    def peak(self) -> int:
        """Bytes that are taken at the worst moment."""
        return max(part.total for part in (self.text, self.unet, self.vae))


def plan_memory(
    config: LatentDiffusionConfig,
    size: Size,
    mode: str = "normal",
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    model: LatentDiffusion | None = None,
) -> MemoryPlan:
    """What drawing takes.

    Args:
        config: Sizes of the model.
        size: What is drawn at once.
        mode: ``"normal"`` (with weights of the program's own that are not laid out anew), ``"low"`` or ``"lowest"``.
        device: Type of the device.
        dtype: Half precision that a GPU computes in; ``None`` is float32.
        model: Just built from the config, where one is at hand; it may be without weights.
    """
    model = model or _skeleton(config)
    held = _weights(model, mode, device, dtype)
    counted = _Counted(model=model, size=size, spares=mode != "normal", on_cpu=device == "cpu")
    itemsize = dtype.itemsize if dtype else _FULL
    working = (counted.text(), counted.unet(itemsize), counted.decoder(itemsize))
    text, unet, vae = (Need(weights=w, working=int(x)) for w, x in zip(held, working, strict=True))
    return MemoryPlan(text=text, unet=unet, vae=vae)


def planning_of(model: LatentDiffusion) -> Planning:
    """What requests will take of the device that a model draws on."""
    return Planning(batch=partial(bytes_to_come, model), otherwise=partial(_otherwise, model))


def _otherwise(model: LatentDiffusion, request: ResolvedRequest) -> dict[str, int]:
    """Bytes of the same request with little memory, and drawn in windows of the model's own size."""
    modes = MEMORY_MODES[1:][MEMORY_MODES[1:].index(model.memory) + 1 :]
    ways = {f"memory={mode!r}": bytes_to_come(model, request, mode) for mode in modes}
    window = max(model.spec.width, model.spec.height)
    if request.window is None and window < max(request.width, request.height, *request.final_size):
        ways[f"window={window}"] = bytes_to_come(model, replace(request, window=window))
    return ways


def bytes_to_come(model: LatentDiffusion, request: ResolvedRequest, mode: str = "") -> int:
    """What a batch of a request will take of the device that a model draws on, beside what is there already.

    Args:
        model: The model.
        request: The request.
        mode: As if the model had been loaded with that ``memory=``; as it is, unless given.
    """
    mode = mode or model.memory
    wide, high = request.final_size if request.hires else (request.width, request.height)
    window = request.window or max(wide, high)
    guided = any(request.scale_of(index) != 1.0 for index in range(request.batch_size))
    size = Size(height=min(high, window), width=min(wide, window), batch=request.batch_size, guided=guided)
    kind = model.device.type
    plan = plan_memory(model.config, size, mode, kind, model.autocast_dtype if kind == "cuda" else None)
    return plan.peak - (plan.text.weights if mode == "normal" else 0)


def choose_mode(
    config: LatentDiffusionConfig,
    size: Size,
    device: torch.device,
    dtype: torch.dtype | None,
    model: LatentDiffusion | None = None,
) -> str:
    """The mode of most memory that fits into what is free; ``"normal"`` where nobody knows that."""
    free = free_memory(device)
    for mode in MEMORY_MODES[1:]:
        plan = plan_memory(config, size, mode, device.type, working_dtype(mode, device, dtype), model)
        if not plan.peak > free:
            return mode
    return MEMORY_MODES[-1]


def working_dtype(mode: str, device: torch.device, asked: torch.dtype | None) -> torch.dtype | None:
    """The half precision that a mode computes in, if any: on a GPU with little memory, unless float32 is asked for."""
    if asked is torch.float32:
        return None
    return torch.float16 if asked is None and mode in ("low", "lowest") and device.type == "cuda" else asked


@lru_cache(maxsize=8)
def _skeleton(config: LatentDiffusionConfig) -> LatentDiffusion:
    """A model without weights."""
    with torch.device("meta"):
        return build_model(config)


def _weights(model: LatentDiffusion, mode: str, device: str, dtype: torch.dtype | None) -> tuple[int, int, int]:
    """Bytes of weights that are there while text encoder, UNet and decoder work."""
    half = dtype.itemsize if dtype else _FULL
    counts = {name: _count(modules) for name, (modules, _) in parts_of(model).items()}
    if mode == "normal":
        whole = _FULL * sum(counts.values())
        return whole, whole + (half * counts["unet"] if dtype else 0), whole  # autocast keeps the halves that it made
    if device == "cpu":
        return 0, 0, 0
    if mode == "lowest":
        layers = [(name, _count(modules)) for name, modules, _ in layers_of(model)]
        counts = {name: max(count for part, count in layers if part == name) for name in counts}
    return _FULL * counts["text"], half * counts["unet"], _FULL * counts["vae"]


def _count(modules: list[nn.Module]) -> int:
    return sum(weight.numel() for module in modules for weight in module.parameters())


@dataclass(frozen=True, kw_only=True)
class _Counted:
    """Feature maps, layer by layer. Numbers are of the working precision, by cell of a map."""

    model: LatentDiffusion
    size: Size
    spares: bool
    on_cpu: bool

    def text(self) -> int:
        sizes = self.model.config.cond_stage
        return _FULL * _TOKENS * (8 * sizes.hidden_size + 3 * sizes.intermediate_size)

    def unet(self, itemsize: int) -> float:
        """Of all layers the worst: what the way up still needs, and the layer itself."""
        unet: UNetModel = self.model.model.diffusion_model
        rows = self.size.batch * (2 if self.size.guided else 1)
        cells = rows * (self.size.height // self._cell) * (self.size.width // self._cell)
        skips: list[float] = []
        worst, channels = 0.0, self.model.config.unet.in_channels
        up = [(block, True) for block in unet.output_blocks]
        for block, is_up in [*((block, False) for block in (*unet.input_blocks, unet.middle_block)), *up]:
            before = channels * cells
            if is_up:
                channels += int(skips.pop() / cells)
            for layer in block:
                transient, out = self._layer(layer, channels, cells, itemsize)
                worst = max(worst, itemsize * (sum(skips) + before) + transient)
                cells *= {"Downsample": 0.25, "Upsample": 4}.get(type(layer).__name__, 1)  # type: ignore[assignment]
                channels = out
            if not is_up and block is not unet.middle_block:
                skips.append(channels * cells)
        return worst

    def decoder(self, itemsize: int) -> float:
        """Of all layers the worst, with the images that come out."""
        vae: AutoencoderKL = self.model.first_stage_model
        size = self.size
        pictures = _FULL * 3 * size.height * size.width * size.batch
        cells = (size.height // self._cell) * (size.width // self._cell)
        together = images_at_once(vae.config, cells) if self.on_cpu else size.batch
        batch = 1 if self.spares else min(together, size.batch)
        worst, cells = 0.0, batch * cells
        for kind, given, made, scale in _decoder_layers(vae):
            cells *= scale
            whole = itemsize * cells * (_block(given, made, self.on_cpu) if kind == "block" else 4.25 * made)
            if kind == "attention":  # as the model itself has it, torch holds all scores, twice
                scores = 0 if self.spares else 2 * cells * cells / batch
                whole = itemsize * (cells * 9 * made + scores)
            elif self.spares:
                maps = itemsize * cells * (max(given, 2 * made) if kind == "block" else made)
                whole = min(whole, _HOLES * maps + _STRIPS_AT_WORK * STRIP_BYTES)
            worst = max(worst, whole + self._laid_out(9 * given * made))
        return worst + 2 * pictures

    @property
    def _cell(self) -> int:
        return self.model.config.first_stage.downsampling

    def _laid_out(self, numbers: int) -> int:
        """Weights of a convolution, as oneDNN lays them out for the one call."""
        return _FULL * numbers if self.on_cpu else 0

    def _layer(self, layer: nn.Module, channels: int, cells: float, itemsize: int) -> tuple[float, int]:
        """Bytes that a layer of the UNet takes, with its input, and the channels that it gives."""
        if isinstance(layer, ResBlock):
            first, second = layer.in_layers[-1], layer.out_layers[-1]
            made = int(second.out_channels)  # type: ignore[arg-type]
            whole = itemsize * cells * _block(channels, made, self.on_cpu)
            return whole + self._laid_out(first.weight.numel()), made  # type: ignore[operator]
        if isinstance(layer, SpatialTransformer):
            if not self.spares:
                return itemsize * cells * 19 * channels, channels
            return max(itemsize * cells * 9 * channels, itemsize * cells * 5 * channels + INNER_BYTES), channels
        made = next(int(conv.out_channels) for conv in layer.modules() if isinstance(conv, nn.Conv2d))
        scale = 4.0 if isinstance(layer, Upsample) else 1.0
        return itemsize * cells * scale * 4.25 * max(channels, made), made


def _block(given: int, made: int, on_cpu: bool) -> int:
    """Maps that a residual block holds at its worst moment, in channels."""
    laid_out = 1 if on_cpu else 0
    first = given + (1 + laid_out) * (given + made)
    second = given + (made if given != made else 0) + made + (1 + laid_out) * 2 * made
    return max(first, second)


def _decoder_layers(vae: AutoencoderKL) -> Iterator[tuple[str, int, int, int]]:
    """Kind, channels in and out, and by how much each has more cells than the one before."""
    config = vae.config
    widths = [config.ch * mult for mult in config.ch_mult]
    channels = widths[-1]
    yield "block", channels, channels, 1
    yield "attention", channels, channels, 1
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(config.num_res_blocks + 1):
            yield "block", channels, width, 1
            channels = width
        if level:
            yield "upsample", channels, channels, 4
