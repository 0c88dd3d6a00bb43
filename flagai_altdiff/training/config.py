"""A training run as a YAML file: what is trained, on what, in which stages, on which machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo

from flagai_altdiff import plain_data
from flagai_altdiff.errors import ConfigError, shown
from flagai_altdiff.training.stages import STAGES, TRAINABLE, Stage

_STRICT = ConfigDict(extra="forbid")
_MAX_BYTES = 64 << 10
_EXAMPLE = STAGES["quality"]
Count = Annotated[int, Field(strict=True, ge=1, le=1 << 40)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Rate = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _of(default: Any, help: str) -> Any:
    return Field(default=default, description=help)


def _named(value: object) -> object:
    """A stage given by nothing but its name."""
    return {"stage": value} if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class StageConfig:
    """A stage with what is to be other than its row in ``STAGES`` says."""

    stage: str = _of(_EXAMPLE.name, f"one of {', '.join(STAGES)}")
    steps: Count | None = _of(None, "optimizer steps")
    batch_size: Count | None = _of(None, "samples of a step, over all processes and accumulated batches")
    accumulate: Count = _of(1, "batches whose gradients are added up for a step")
    side: Count | None = _of(None, "height and width of the images, in px")
    trainable: str | None = _of(None, f"what learns: {', '.join(TRAINABLE)}, or a pattern of parameter names")
    optimizer: Literal["adamw", "muon"] = _of("adamw", "adamw, or muon: fewer samples for small networks")
    learning_rate: Rate | None = _of(None, "the optimizer's, after the warm-up")
    warmup_steps: CountOrZero | None = _of(None, "steps in which it rises from 1e-9")
    decay: Literal["constant", "cosine"] = _of("constant", "what it does then, to the last step: constant, cosine")
    final_rate: Share = _of(0.0, "share of it that is left at the end of a cosine")
    beta2: Annotated[float, Field(ge=0, lt=1)] = _of(0.999, "AdamW's, of the squared gradients")
    weight_decay: Rate | None = _of(None, "AdamW's")
    clip_norm: Rate = _of(1.0, "limit of the gradients' norm; 0: none")
    ema_decay: Share | None = _of(None, "averaged weights: min(this, (1 + n) / (10 + n)); 0: none")
    text_drop: Share | None = _of(None, "share of the texts that are replaced by the empty one")
    min_snr_gamma: Annotated[float, Field(ge=0, le=1000)] = _of(
        0.0, "min-SNR weighting of timesteps, usually 5; 0: none"
    )
    noise_offset: Share = _of(0.0, "noise added to whole channels, usually 0.1; 0: none")
    loss: Literal["mse", "cosine", "contrastive"] = _of("mse", "of the teacher stage: mse, cosine, contrastive")
    rank: CountOrZero | None = _of(None, "of a LoRA; 0: the weights themselves learn")
    prior_weight: Annotated[float, Field(ge=0, le=1000)] = _of(1.0, "how much the images of data.prior count")

    def settings(self, model_side: int) -> StageSettings:
        """What holds in the end.

        Args:
            model_side: The model's own resolution, in px.

        Raises:
            ConfigError: Something else than a LoRA is to learn beside it.
        """
        given = {name: getattr(self, name) for name in _ROW_FIELDS if getattr(self, name) is not None}
        row = replace(STAGES[self.stage], **given)
        if row.rank and self.trainable not in (None, "lora"):
            raise ConfigError(f"trainable={self.trainable!r}: with a rank nothing but the LoRA learns; leave one out.")
        return StageSettings(
            row=replace(row, trainable="lora") if row.rank else row,
            side=self.side or int(model_side * row.side) // 64 * 64 or model_side,
            accumulate=self.accumulate,
            optimizer=self.optimizer,
            decay=self.decay,
            final_rate=self.final_rate,
            beta2=self.beta2,
            clip_norm=self.clip_norm,
            min_snr_gamma=self.min_snr_gamma,
            noise_offset=self.noise_offset,
            loss=self.loss,
            prior_weight=self.prior_weight,
        )

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"there is no stage {self.stage!r}; known: {', '.join(STAGES)}")


_ROW_FIELDS = (
    "steps",
    "batch_size",
    "trainable",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "ema_decay",
    "text_drop",
    "rank",
)


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """A stage as it is carried out: its row, changed as the config says, and what no row has.

    Args:
        row: See :class:`Stage`.
        side: Of the images, in px.
        accumulate: Batches of a step.
        optimizer: ``"adamw"``, or ``"muon"`` (see :class:`~flagai_altdiff.training.muon.Muon`).
        decay: Of the learning rate.
        final_rate: Share of it that is left at the end of a cosine.
        beta2: AdamW's.
        clip_norm: Limit of the gradients' norm; 0 is none.
        min_snr_gamma: See ``denoising_losses``.
        noise_offset: Share of noise that is one number for a whole channel.
        loss: Of the teacher stage.
        prior_weight: How much the images count that show what the model knew before.
    """

    row: Stage
    side: int
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    decay: Literal["constant", "cosine"] = "constant"
    final_rate: float = 0.0
    beta2: float = 0.999
    clip_norm: float = 1.0
    min_snr_gamma: float = 0.0
    noise_offset: float = 0.0
    loss: Literal["mse", "cosine", "contrastive"] = "mse"
    prior_weight: float = 1.0

    @property
    def pattern(self) -> str:
        """Pattern of the names of the parameters that learn."""
        return TRAINABLE.get(self.row.trainable, self.row.trainable)


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Where the samples come from, and which are taken."""

    source: str | tuple[str, ...] = _of("images", "folder of images with .txt, metadata.jsonl or parquet; or shards")
    caption: str | None = _of(None, "of images that have none")
    prior: str | None = _of(None, "folder of images of what the model knew before, to keep it; drawn if it is missing")
    prior_caption: str | tuple[str, ...] | None = _of(
        None, "of these: the class of the thing, as in 'a cat'; or several, drawn in turn"
    )
    prior_count: Count = _of(50, "how many are drawn")
    languages: tuple[str, ...] = _of((), "only captions of these; all of them if empty")
    min_side: Count | None = _of(None, "leave out images with a smaller side, in px")
    min_aesthetic: float | None = _of(None, "leave out images with a lower aesthetic score, or without one")
    min_text: CountOrZero | None = _of(None, "leave out captions with fewer characters")
    max_text: CountOrZero | None = _of(None, "leave out captions with more characters")
    skip_shards: bool = _of(False, "leave out shards that cannot be had; they end the run otherwise")
    fetched: Path | None = _of(None, "folder for shards of servers; ~/.cache/flagai_altdiff/data if left out")
    crop: Literal["random", "centre"] = _of("random", "which square of an image is taken: random, centre")
    flip: bool = _of(False, "mirror every other image")
    cache: bool = _of(False, "keep latents and text states on disk: faster, but always the same crop")
    workers: CountOrZero = _of(0, "further processes that read images")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SheetConfig:
    """Images drawn on the way, to see what was learnt."""

    every: CountOrZero = _of(500, "steps between two sheets; 0: none")
    prompts: tuple[str, ...] = _of((), "what they show, in any languages; the first captions of the data if empty")
    seed: CountOrZero = _of(7, "of each of them")
    steps: Count | None = _of(None, "sampler steps; the model's own if left out")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MachineConfig:
    """What it runs on; under torchrun and SLURM, devices and nodes must be what was started there."""

    accelerator: str = _of("auto", "auto, cpu, gpu, mps")
    devices: Count = _of(1, "processes on each node")
    nodes: Count = _of(1, "machines")
    strategy: str = _of("auto", "auto, ddp; fsdp: what learns in pieces, for memory")
    precision: Literal["32", "bf16", "16"] = _of("32", "of the computation; the weights stay float32")
    checkpoint_activations: bool = _of(False, "compute activations twice, for a fraction of the memory")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """A whole run."""

    model: str = _of("AltDiffusion-mini", "what is trained: a name, or the path of a folder or file")
    teacher: str | None = _of(None, "for the teacher stage: folder of a CLIP model of transformers")
    student: str | None = _of(None, "for the teacher stage, in place of model: folder of an XLM-R of transformers")
    output: Path = _of(Path("runs/my-model"), "folder of states, log, sheets, and the finished models")
    stages: tuple[Annotated[StageConfig, BeforeValidator(_named)], ...] = _of((), "in their order, names or mappings")
    data: DataConfig = Field(default_factory=DataConfig)
    seed: CountOrZero = _of(1, "of all random numbers")
    save_every: Count = _of(500, "steps between two saved states")
    tensorboard: bool = _of(False, "write the log for TensorBoard as well: tensorboard --logdir OUTPUT")
    sheets: SheetConfig = Field(default_factory=SheetConfig)
    machine: MachineConfig = Field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(f"stages is empty; expected some of {', '.join(STAGES)}")
        if self.machine.strategy == "fsdp" and any(stage.optimizer == "muon" for stage in self.stages):
            raise ValueError("optimizer: muon needs whole matrices, which strategy: fsdp cuts; leave one of them out")


def read_config(path: Path) -> TrainConfig:
    """Read a config.

    Args:
        path: YAML.

    Raises:
        ConfigError: It cannot be read, or says something that cannot be; the message names the field.
    """
    from flagai_altdiff.checkpoint.plain_yaml import parse_yaml

    data = plain_data.read_config(path, _MAX_BYTES, parse_yaml, "YAML")
    return parse_config(data, str(path))


def parse_config(data: object, where: str = "config") -> TrainConfig:
    """The data of a config, checked; errors as of :func:`read_config`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected a mapping. altdiff train --example prints one.")
    try:
        return TypeAdapter(TrainConfig).validate_python(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-")) or "config"
        reason = problem.get("ctx", {}).get("error") or problem["msg"]
        if problem["type"] == "unexpected_keyword_argument":
            reason = "there is no such field"
        value = "" if isinstance(problem["input"], Mapping) else f"={shown(problem['input'])}"
        raise ConfigError(f"{where}: {place}{value}: {reason}. altdiff train --example prints a config.") from None


def example() -> str:
    """A commented config, with every field and its default; those of its stage have a # in front, as stages differ."""
    head = "# Training of flagai_altdiff: altdiff train THIS.yaml. What is left out has the value that stands here.\n"
    return head + "\n".join(_lines(TrainConfig, ""))


def _lines(cls: type, indent: str) -> Iterator[str]:
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    for name, field in fields.items():
        if name == "stages":
            yield f"{indent}stages:  # {field.description}"
            first, *rest = _lines(StageConfig, f"{indent}    ")
            yield f"{indent}  - {first.strip()}"
            yield from rest
        elif field.default_factory is not None:
            kind: type = field.default_factory  # type: ignore[assignment]
            yield f"\n{indent}{name}:  # {(kind.__doc__ or '').splitlines()[0]}"
            yield from _lines(kind, f"{indent}  ")
        else:
            of_stage = getattr(_EXAMPLE, name) if cls is StageConfig and name in _ROW_FIELDS else None
            yield f"{indent}{_line(name, field.default, of_stage, field.description)}"


def _line(name: str, default: object, of_stage: object, help: str | None) -> str:
    if default is None:
        return f"# {name}: {'' if of_stage is None else of_stage}".rstrip() + f"  # {help}"
    value = {True: "true", False: "false"}.get(default, default) if isinstance(default, bool) else default
    value = "[]" if default == () else f'"{default}"' if name == "precision" else value
    return f"{name}: {value}  # {help}"
