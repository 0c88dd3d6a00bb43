"""What to draw and where to: every option once. A resolved request has nothing left open. No torch."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, field_validator, model_validator
from pydantic.dataclasses import dataclass

from flagai_altdiff.errors import InvalidRequestError, UnknownSamplerError
from flagai_altdiff.options import Number, Whole, option, options_of, with_our_errors
from flagai_altdiff.sampling import GRIDS, SAMPLERS, find_sampler

SeedMode = Literal["batch", "per_image"]
MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
_STRICT = ConfigDict(extra="forbid")


@with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class GenerationRequest:
    """What to draw and how. ``None`` means: the model's own default. ``prompts`` may be given as one text or a list.

    Raises:
        InvalidRequestError: A value outside its range, or an option that does not exist.
        UnknownSamplerError: A sampler that does not exist.
    """

    prompts: tuple[str, ...] = option(..., "What the images show, in any language of the model.", flagai="prompt")
    negative_prompt: str = option(
        "", "What the images must not show.", flagai="negative_prompt", flags=("--negative-prompt",)
    )
    height: Whole | None = option(
        None,
        "Height of an image.",
        flagai="H",
        flags=("--H", "-H", "--height"),
        unit="px",
        at_least=8,
        at_most=MAX_SIDE,
    )
    width: Whole | None = option(
        None,
        "Width of an image.",
        flagai="W",
        flags=("--W", "-W", "--width"),
        unit="px",
        at_least=8,
        at_most=MAX_SIDE,
    )
    steps: Whole | None = option(
        None,
        "Sampler steps; more is finer and slower.",
        flagai="ddim_steps",
        flags=("--steps", "-s", "--ddim-steps"),
        at_least=1,
        at_most=1000,
    )
    guidance_scale: Number | None = option(
        None,
        "How closely to follow the prompt; 1 turns guidance off.",
        flagai="scale",
        flags=("--scale", "--guidance-scale", "--cfg-scale"),
        at_least=0,
        at_most=1000,
    )
    sampler: str = option(
        "ddim", "Algorithm from noise to image.", flagai="sampler", flags=("--sampler",), choices=tuple(SAMPLERS)
    )
    grid: str = option(
        "flagai",
        "Where the steps lie: FlagAI's grid, or one that ends without noise.",
        flagai="grid",
        flags=("--grid",),
        choices=GRIDS,
    )
    eta: Number = option(
        0.0, "Share of fresh noise in DDIM.", flagai="ddim_eta", flags=("--eta", "--ddim-eta"), at_least=0, at_most=1
    )
    seed: Whole | None = option(
        None,
        "Start of the random numbers; -1 draws one, which is recorded.",
        flagai="seed",
        flags=("--seed",),
        at_least=-1,
        at_most=MAX_SEED,
    )
    seed_mode: SeedMode = option(
        "per_image",
        "'batch': FlagAI's numbers. 'per_image': image k has seed + k, whatever its batch.",
        flagai="seed_mode",
        flags=("--seed-mode",),
        choices=("batch", "per_image"),
    )
    images_per_prompt: Whole = option(
        1, "Images of each prompt.", flagai="n_samples", flags=("--n-samples", "-n"), at_least=1, at_most=10_000
    )
    batch_size: Whole | None = option(
        None, "Images drawn at once; all of a prompt unless given.", flagai="n_samples", at_least=1, at_most=10_000
    )
    iterations: Whole = option(
        1, "How often to go through all prompts.", flagai="n_iter", flags=("--n-iter",), at_least=1, at_most=100_000
    )
    fixed_code: bool = option(
        False, "Start every batch from the same noise.", flagai="fixed_code", flags=("--fixed-code",)
    )

    @field_validator("prompts", mode="before")
    @classmethod
    def _several_texts(cls, value: object) -> object:
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("expected a text, or a list with at least one text and texts only")
        return tuple(texts)

    @field_validator("negative_prompt", mode="before")
    @classmethod
    def _none_is_empty(cls, value: object) -> object:
        return "" if value is None else value

    @field_validator("prompts", "negative_prompt")
    @classmethod
    def _whole_characters(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if any(
            "\ud800" <= char <= "\udfff" for text in ((value,) if isinstance(value, str) else value) for char in text
        ):
            raise ValueError("the text has half of a surrogate pair; was it cut inside an emoji?")
        return value

    @model_validator(mode="before")
    @classmethod
    def _samplers_of_others(cls, data: Any) -> Any:
        """Other programs' names of samplers, some of which name the grid as well."""
        given = data.kwargs
        name = given.get("sampler") if isinstance(given, dict) else None
        if not isinstance(name, str) or name in SAMPLERS or (found := find_sampler(name)) is None:
            return data
        sampler, grid = found
        if grid and given.get("grid", grid) != grid:
            raise InvalidRequestError("grid", given["grid"], f"contradicts sampler={name!r}; leave one of them out")
        return {**given, "sampler": sampler, **({"grid": grid} if grid else {})}

    @field_validator("sampler", mode="before")
    @classmethod
    def _known_sampler(cls, value: object) -> object:
        if value not in tuple(SAMPLERS):
            raise UnknownSamplerError(str(value), SAMPLERS)
        return value

    @field_validator("grid", mode="before")
    @classmethod
    def _known_grid(cls, value: object) -> object:
        if value not in GRIDS:
            raise ValueError(f"expected one of {', '.join(GRIDS)}")
        return value

    @model_validator(mode="after")
    def _eta_has_a_meaning(self) -> GenerationRequest:
        if self.eta and not SAMPLERS[self.sampler].takes_eta:
            able = " and ".join(spec.title for spec in SAMPLERS.values() if spec.takes_eta)
            expected = f"eta must be 0 for {self.sampler.upper()}; only {able} takes another value"
            raise InvalidRequestError("eta", self.eta, expected)
        return self

    def resolve(
        self, *, height: int, width: int, steps: int, guidance_scale: float, downsampling: int, halvings: int
    ) -> ResolvedRequest:
        """The request as a model will carry it out: its defaults filled in, a seed drawn, the size on its latent grid.

        Args:
            height: The model's default, in px; likewise ``width``, ``steps`` and ``guidance_scale``.
            width: See ``height``.
            steps: See ``height``.
            guidance_scale: See ``height``.
            downsampling: Pixels per latent cell (f).
            halvings: How often the UNet halves a latent.

        Raises:
            InvalidRequestError: The UNet cannot halve the size evenly; the message has the nearest sizes that work.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        filled = {
            "height": _fitted("height", self.height or height, downsampling, halvings),
            "width": _fitted("width", self.width or width, downsampling, halvings),
            "steps": self.steps or steps,
            "guidance_scale": guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "seed": secrets.randbelow(MAX_SEED + 1) if self.seed in (None, -1) else self.seed,
            "batch_size": self.batch_size or self.images_per_prompt,
        }
        return ResolvedRequest(**(given | filled))

    def as_json(self) -> dict[str, Any]:
        """All options as plain JSON values; the constructor takes them back."""
        return TypeAdapter(type(self)).dump_python(self, mode="json")


@with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ResolvedRequest(GenerationRequest):
    """A request that can be carried out as it is. From :meth:`GenerationRequest.resolve`."""

    height: int
    width: int
    steps: int
    guidance_scale: float
    seed: int
    batch_size: int

    def seed_of(self, index: int) -> int:
        """Seed of an image: its own where seeds are per image, else that of the whole request."""
        return (self.seed + index) % (MAX_SEED + 1) if self.seed_mode == "per_image" else self.seed

    def batches(self) -> Iterator[Batch]:
        """What is drawn together, in order, over all iterations; the last batch of an iteration may be short."""
        rows = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        for first in range(0, len(rows) * self.iterations, len(rows)):
            for start in range(0, len(rows), self.batch_size):
                yield Batch(first + start, tuple(rows[start : start + self.batch_size]))


@with_our_errors
@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Output:
    """Where the images of a request go.

    Raises:
        InvalidRequestError: A value of another kind, or an option that does not exist.
    """

    folder: Path = option(
        Path("AltDiffusionOutputs"),
        "Folder of the images: samples/00000.png …, grid-0000.png …",
        flagai="outpath",
        flags=("--outdir", "-o", "--outpath", "--out-path", "--output"),
    )
    columns: Whole = option(
        0,
        "Images per row of the grid; 0: as many as are drawn at once.",
        flagai="n_rows",
        flags=("--n-rows",),
        at_least=0,
        at_most=10_000,
    )
    skip_save: bool = option(False, "Save no single images.", flagai="skip_save", flags=("--skip-save",))
    skip_grid: bool = option(False, "Make no grid.", flagai="skip_grid", flags=("--skip-grid",))
    resume: bool = option(
        False,
        "Go on with the latest run of this very request in the folder: draw what it lacks.",
        flagai="resume",
        flags=("--resume",),
    )

    def check_resumable(self, request: GenerationRequest) -> None:
        """InvalidRequestError for a call that is to go on, but leaves nothing to go on with."""
        if not self.resume:
            return
        if self.skip_save:
            expected = "nothing is saved that resume could go on with; leave one of them out"
            raise InvalidRequestError("skip_save", True, expected)
        if request.seed in (None, -1):
            expected = "resume needs the seed of the interrupted run: request_seed in the records of its images"
            raise InvalidRequestError("seed", request.seed, expected)


@plain_dataclass(frozen=True)
class Batch:
    """Images that are drawn together.

    Args:
        first: Index of its first image within the request.
        prompts: One for each image.
    """

    first: int
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def indices(self) -> range:
        """Indices of its images."""
        return range(self.first, self.first + len(self))


@plain_dataclass(frozen=True)
class Note:
    """Something about a generation that the user should know; it stands in the log as well.

    Args:
        kind: What it is about.
        text: One or two sentences.
    """

    kind: Literal["cut prompt", "floored size", "changed steps", "precision", "flagged", "grid"]
    text: str


def _fitted(name: str, size: int, downsampling: int, halvings: int) -> int:
    """A side floored to the latent grid, as the original does."""
    cells, unit = size // downsampling, 2**halvings
    if cells and cells % unit == 0:
        return cells * downsampling
    below = cells // unit * unit * downsampling
    near = " or ".join(str(s) for s in (below, below + unit * downsampling) if s)
    expected = f"this model draws multiples of {unit * downsampling} px; the nearest is {near}"
    raise InvalidRequestError(name, size, expected)


OPTIONS = options_of(GenerationRequest) | options_of(Output)
"""Every option by its field in :class:`GenerationRequest` or :class:`Output`."""

FLAGAI_DEFAULTS: dict[str, Any] = {"images_per_prompt": 4, "seed": 34234, "seed_mode": "batch"}
"""Where FlagAI's call and the command line begin elsewhere than a request does."""
