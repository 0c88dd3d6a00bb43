"""What a run needs, before hours are spent: parameters, memory, work, time and data of each stage.

A step is carried out with tensors that have sizes but no content; what is alive is counted after every operation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from flagai_altdiff.checkpoint import altclip_folder, layouts
from flagai_altdiff.config import RELEASED, AltCLIPConfig, LatentDiffusionConfig
from flagai_altdiff.errors import ConfigError
from flagai_altdiff.lora import make_trainable
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation
from flagai_altdiff.registry import find_model, locate
from flagai_altdiff.training.checkpointing import computed_twice
from flagai_altdiff.training.config import StageSettings, TrainConfig
from flagai_altdiff.training.module import choose_trainable
from flagai_altdiff.training.objectives import text_learns
from flagai_altdiff.training.stages import STAGES

SHARD = 10_000
"""Samples of a shard as img2dataset writes them."""
TOKENS = 77
_GIB = 2**30
_WORK: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **more: sdpa_flop_count(  # type: ignore[no-untyped-call]
        q.shape, k.shape, v.shape
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **more: (
        sdpa_backward_flop_count(  # type: ignore[no-untyped-call]
            grad.shape, q.shape, k.shape, v.shape
        )
    ),
}
"""Operation -> what it costs; torch's table, which has no attention of CPUs."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs; memory in bytes and for each process.

    Args:
        settings: Of the stage.
        processes: How many share a step.
        at_once: Samples that a process has at once.
        parameters: All of them.
        trainable: Those that learn.
        activations: What else is alive at the worst moment of a step.
        activations_twice: The same with ``machine.checkpoint_activations``.
        flop: Work of a step of all processes, without what is computed twice.
        flop_twice: The same with ``machine.checkpoint_activations``.
        checkpointed: Whether that is set.
        pieces: Into how many the optimizer's moments and the averages are cut.
    """

    settings: StageSettings
    processes: int
    at_once: int
    parameters: int
    trainable: int
    activations: int
    activations_twice: int
    flop: float
    flop_twice: float
    checkpointed: bool
    pieces: int = 1

    @property
    def weights(self) -> int:
        """Memory of all parameters, as float32."""
        return 4 * self.parameters

    @property
    def gradients(self) -> int:
        """Memory of the gradients."""
        return 4 * self.trainable

    @property
    def optimizer(self) -> int:
        """Memory of AdamW's two moments."""
        return 8 * self.trainable // self.pieces

    @property
    def averages(self) -> int:
        """Memory of the averaged weights, if there are any."""
        return 4 * self.trainable // self.pieces if self.settings.row.ema_decay else 0

    @property
    def lasting(self) -> int:
        """What is there all the time."""
        return self.weights + self.gradients + self.optimizer + self.averages

    @property
    def memory(self) -> int:
        """Of a process, at the worst moment of a step."""
        return self.lasting + (self.activations_twice if self.checkpointed else self.activations)

    @property
    def work(self) -> float:
        """Of a step of all processes, in floating-point operations."""
        return self.flop_twice if self.checkpointed else self.flop


def plan(config: TrainConfig, *, tflops: float | None = None) -> str:
    """What a run needs, as text.

    Args:
        config: The run. Its model need not be there if it is a released one; data are not looked at.
        tflops: What a process's device really reaches, in 10^12 operations a second, to tell times.

    Raises:
        ConfigError: Nothing is known of the model.
    """
    return "\n".join(_told(number, stage, tflops) for number, stage in enumerate(plan_stages(config), 1))


def plan_stages(config: TrainConfig) -> list[StagePlan]:
    """What each stage of a run needs; arguments and errors as of :func:`plan`."""
    sizes = _sizes(config)
    if isinstance(sizes, LatentDiffusionConfig):
        side = sizes.image_size * sizes.first_stage.downsampling
    else:
        side = sizes.vision.image_size
    found = []
    for stage in config.stages:
        settings = stage.settings(side)
        if isinstance(sizes, AltCLIPConfig):
            settings = replace(settings, side=side)
        if (STAGES[stage.stage].kind == "diffusion") is isinstance(sizes, AltCLIPConfig):
            raise ConfigError(f"{config.model} is no model for the stage {stage.stage}.")
        found.append(_plan_stage(config, settings, sizes))
    return found


def _sizes(config: TrainConfig) -> LatentDiffusionConfig | AltCLIPConfig:
    spec, path = (None, Path(config.model)) if Path(config.model).exists() else locate(config.model)
    name = spec.name if spec else ""
    if not path.exists() and name in RELEASED:
        return RELEASED[name]
    if spec is None and (path / altclip_folder.CONFIG).is_file() and not (path / "model_index.json").exists():
        return altclip_folder.read(path)[0]
    found = find_model(name)
    if found is not None and found.name.startswith("AltCLIP"):
        return altclip_folder.read(path)[0]
    return layouts.read(layouts.detect(path))[0]


def _plan_stage(
    config: TrainConfig, settings: StageSettings, sizes: LatentDiffusionConfig | AltCLIPConfig
) -> StagePlan:
    processes = config.machine.devices * config.machine.nodes
    at_once = -(-settings.row.batch_size // (processes * settings.accumulate))
    autocast = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}[config.machine.precision]
    with FakeTensorMode(), torch.device("cpu"):
        model: nn.Module = LatentDiffusion(sizes) if isinstance(sizes, LatentDiffusionConfig) else AltCLIP(sizes)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if settings.row.rank and isinstance(model, LatentDiffusion):
            make_trainable(model, rank=settings.row.rank, alpha=1.0, generator=torch.Generator())
        trainable = choose_trainable(model, settings.pattern)
        learns = sum(parameter.numel() for parameter in trainable.values())
        for parameter in trainable.values():  # as when they are accumulated, or DDP's
            parameter.grad = torch.empty_like(parameter)
        steps = []
        for twice in (False, True):
            with computed_twice(model, twice), _Watch() as step:
                _step(model, settings, at_once, autocast, cached=config.data.cache)
            steps.append(step)
        once, again = steps
    samples = settings.row.batch_size / at_once
    return StagePlan(
        settings=settings,
        processes=processes,
        at_once=at_once,
        parameters=parameters,
        trainable=learns,
        activations=once.peak,
        activations_twice=again.peak,
        flop=once.work * samples,
        flop_twice=again.work * samples,
        checkpointed=config.machine.checkpoint_activations,
        pieces=processes if config.machine.strategy == "fsdp" else 1,
    )


def _step(model: nn.Module, settings: StageSettings, batch: int, autocast: torch.dtype | None, *, cached: bool) -> None:
    """Forward and backward pass of so many samples."""
    mixed = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    ids = torch.zeros(batch, TOKENS, dtype=torch.long)
    with mixed:
        if isinstance(model, LatentDiffusion):
            side = settings.side // model.config.first_stage.downsampling
            latents = torch.zeros(batch, model.config.unet.in_channels, side, side)
            cond = torch.zeros(batch, TOKENS, model.config.unet.context_dim)
            if not cached:
                with torch.no_grad():
                    model.encode_first_stage(torch.zeros(batch, 3, settings.side, settings.side))
                with torch.set_grad_enabled(text_learns(settings)):
                    cond = _states(model.cond_stage_model, ids)
            found = model.model(latents, torch.zeros(batch, dtype=torch.long), [cond])
        else:
            assert isinstance(model, AltCLIP)
            if settings.row.kind == "contrastive":
                with torch.no_grad():
                    model.get_image_features(torch.zeros(batch, 3, settings.side, settings.side))
            found = model.get_text_features(ids, torch.ones_like(ids))
        loss = found.float().square().mean()
    loss.backward()


def _states(encoder: RobertaSeriesModelWithTransformation, ids: Tensor) -> Tensor:
    """As the encoder gives them; its own way looks at the numbers of the ids, and here there are none."""
    config = encoder.config
    hidden = encoder.roberta(ids, config.num_hidden_layers - config.has_pre_transformation, torch.ones_like(ids))
    return (
        encoder.transformation_pre(encoder.pre_LN(hidden))
        if config.has_pre_transformation
        else encoder.transformation(hidden)
    )


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches all operations.

    Attributes:
        peak: Most bytes alive at any time, of what was made since it was entered.
        work: Floating-point operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.work = self._now = 0
        self._holders = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Carry out an operation, and count what it gives."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func.overloadpacket in _WORK:
            self.work += _WORK[func.overloadpacket](*args, **kwargs, out_val=found)
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._hold(tensor, given)
        self.peak = max(self.peak, self._now)
        return found

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place in given and place not in self._holders:
            return  # a view of something older
        if not self._holders[place]:
            self._now += size
        self._holders[place] += 1
        weakref.finalize(tensor, self._release, place, size)

    def _release(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self._now -= size


def _told(number: int, stage: StagePlan, tflops: float | None) -> str:
    settings, row = stage.settings, stage.settings.row
    once, twice = (stage.lasting + work for work in (stage.activations, stage.activations_twice))
    samples = row.steps * row.batch_size
    each = f"{stage.at_once} at once" + (f", {settings.accumulate} times a step" if settings.accumulate > 1 else "")
    lines = [
        f"stage {number}, {row.name}: {row.help}",
        f"  a step           {row.batch_size:,} samples"
        + (f" of {settings.side} px" if row.kind != "teacher" else "")
        + f", on {stage.processes:,} processes with {each}",
        f"  parameters       {stage.parameters / 1e6:,.1f} million, of which {stage.trainable / 1e6:,.1f} learn",
        "  memory of a process",
        *(f"    {name:<14} {_size(size)}" for name, size in _parts(stage)),
        f"    {'together':<14} {_size(once)}",
        f"    {'or':<14} {_size(twice)} with checkpoint_activations: true "
        f"(activations {_size(stage.activations_twice).strip()})",
        f"  work of a step   {_short(stage.flop / 1e12)} TFLOP, or {_short(stage.flop_twice / 1e12)} with it",
        f"  data             {samples:,} samples in {row.steps:,} steps: {-(-samples // SHARD):,} shards of {SHARD:,}",
    ]
    if tflops:
        speed = tflops * 1e12 * stage.processes / stage.work
        days = row.steps / speed / 86_400
        lines.insert(
            -1, f"  time             {_short(speed)} steps/s at {tflops:g} TFLOP/s a process: {_short(days)} days"
        )
    return "\n".join(lines) + "\n"


def _parts(stage: StagePlan) -> list[tuple[str, int]]:
    return [
        ("weights", stage.weights),
        ("gradients", stage.gradients),
        ("optimizer", stage.optimizer),
        ("averages", stage.averages),
        ("activations", stage.activations),
    ]


def _size(size: int) -> str:
    return f"{size / _GIB:8.2f} GiB" if size >= _GIB / 20 else f"{size / 2**20:8.2f} MiB"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
