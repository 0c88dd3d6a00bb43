"""What to draw and where to: every option once. A resolved request has nothing left open. No torch."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationInfo, field_validator, model_validator
from pydantic.dataclasses import dataclass

from flagai_altdiff.errors import InvalidRequestError, UnknownSamplerError
from flagai_altdiff.options import Number, SpanField, Whole, option, options_of, span_of, with_our_errors
from flagai_altdiff.pictures import (
    FITS,
    MarginsField,
    MaskField,
    Picture,
    PictureField,
    is_colour,
    mask_of,
    with_margins,
)
from flagai_altdiff.prompt_syntax import SYNTAXES
from flagai_altdiff.sampling import GRIDS, SAMPLERS, find_sampler

ENGINES = ("auto", "eager", "packed", "openvino", "compile")
"""What computes."""

SeedMode = Literal["batch", "per_image"]
MAX_SEED = 2**32 - 1
MAX_SIDE = 8192
_STRICT = ConfigDict(extra="forbid")
_USUAL_STRENGTH = 0.75
_LARGER = 2.25
"""How many times the model's own area a picture may have before it is drawn smaller."""


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
        "ddim",
        "Algorithm from noise to image; other programs' names of them are understood.",
        flagai="sampler",
        flags=("--sampler",),
        choices=tuple(SAMPLERS),
        metavar="NAME",
    )
    grid: str = option(
        "flagai",
        "Where the steps lie: FlagAI's grid, or one that ends without noise.",
        flagai="grid",
        flags=("--grid",),
        choices=GRIDS,
        quiet=True,
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

    variation_seed: Whole | None = option(
        None,
        "Noise to mix in, for images that are near each other; image k has this seed + k, and all have one seed.",
        flagai="variation_seed",
        flags=("--variation-seed",),
        at_least=-1,
        at_most=MAX_SEED,
        quiet=True,
    )
    variation_strength: Number | None = option(
        None,
        "How much of that noise; 1 is another image altogether.",
        flagai="variation_strength",
        flags=("--variation-strength",),
        at_least=0,
        at_most=1,
        quiet=True,
    )
    prompt_syntax: str = option(
        "plain",
        "How prompts are read: as they stand, or with weights as in (word:1.3), [word] and BREAK, of any length.",
        flagai="prompt_syntax",
        flags=("--prompt-syntax",),
        choices=SYNTAXES,
        quiet=True,
    )
    init_image: PictureField = option(
        None, "Picture to begin with.", flagai="init_image", flags=("--init-image", "-i"), metavar="FILE", quiet=True
    )
    strength: Number | None = option(
        None,
        "How far to go away from the picture; 1 is all the way. Unless given 0.75, and 1 for what is added around it.",
        flagai="strength",
        flags=("--strength",),
        at_least=0,
        at_most=1,
        quiet=True,
    )
    full_steps: bool = option(
        False,
        "Take all steps on the way that the strength leaves, instead of a share of them.",
        flagai="full_steps",
        flags=("--full-steps",),
        quiet=True,
    )
    fit: str = option(
        "crop",
        "How a picture of other proportions is made to fit.",
        flagai="fit",
        flags=("--fit",),
        choices=FITS,
        quiet=True,
    )
    ground: str = option(
        "white",
        "Colour behind what is transparent, and around what is padded: a name, or #rrggbb.",
        flagai="ground",
        flags=("--ground",),
        metavar="COLOUR",
        quiet=True,
    )
    mask_image: MaskField = option(
        None,
        "What of the picture is drawn anew: a picture of its size, white where it is; left,top,right,bottom; or alpha.",
        flagai="mask_image",
        flags=("--mask",),
        metavar="FILE|BOX|alpha",
        quiet=True,
    )
    mask_feather: Whole = option(
        0,
        "Width of the soft edge inside the mask.",
        flagai="mask_feather",
        flags=("--mask-feather",),
        unit="px",
        at_least=0,
        at_most=1024,
        quiet=True,
    )
    mask_full_resolution: bool = option(
        False,
        "Draw the masked area alone, as large as an image, and put it back.",
        flagai="mask_full_resolution",
        flags=("--mask-full-resolution",),
        quiet=True,
    )
    mask_padding: Whole = option(
        32,
        "What of the picture around the mask is drawn along then.",
        flagai="mask_padding",
        flags=("--mask-padding",),
        unit="px",
        at_least=0,
        at_most=1024,
        quiet=True,
    )
    outpaint: MarginsField = option(
        "",
        "Pixels to draw around the picture, as in left=128,right=64.",
        flagai="outpaint",
        flags=("--outpaint",),
        metavar="SIDE=PX,…",
        quiet=True,
    )
    window: Whole | None = option(
        None,
        "Draw in overlapping windows of this side, for images larger than the model is good at.",
        flagai="window",
        flags=("--window",),
        unit="px",
        at_least=8,
        at_most=MAX_SIDE,
        quiet=True,
    )
    window_overlap: Whole | None = option(
        None,
        "How far neighbouring windows overlap; half of them unless given.",
        flagai="window_overlap",
        flags=("--window-overlap",),
        unit="px",
        at_least=0,
        at_most=MAX_SIDE - 8,
        quiet=True,
    )
    stretches: bool = option(
        False,
        "Read | in a prompt as the border between parts of the image, from left to right; needs windows.",
        flagai="stretches",
        flags=("--stretches",),
        quiet=True,
    )
    seamless: str = option(
        "none",
        "Which edges go on at the opposite ones.",
        flagai="seamless",
        flags=("--seamless",),
        choices=("none", "x", "y", "xy"),
        quiet=True,
    )
    hires: Number | None = option(
        None,
        "Draw, enlarge so many times, and refine.",
        flagai="hires",
        flags=("--hires",),
        at_least=1,
        at_most=8,
        quiet=True,
    )
    hires_strength: Number = option(
        0.5,
        "How far the refinement goes away from what was enlarged.",
        flagai="hires_strength",
        flags=("--hires-strength",),
        at_least=0,
        at_most=1,
        quiet=True,
    )
    hires_upscaler: str = option(
        "picture",
        "What is enlarged: the picture, or its latent, which needs more strength.",
        flagai="hires_upscaler",
        flags=("--hires-upscaler",),
        choices=("picture", "latent"),
        quiet=True,
    )
    cache_interval: Whole = option(
        1,
        "Compute the inner half of the UNet in one of so many steps only: sooner, and another picture.",
        flagai="cache_interval",
        flags=("--cache-interval",),
        at_least=1,
        at_most=1000,
        quiet=True,
    )
    guidance_interval: SpanField = option(
        "",
        "Part of the way from noise (0) to image (1) with guidance, as in 0.1-0.8: elsewhere half of the work.",
        flagai="guidance_interval",
        flags=("--guidance-interval",),
        metavar="FROM-TO",
        quiet=True,
    )
    token_merging: Number = option(
        0.0,
        "Share of the tokens of the largest maps that self-attention takes together; pays for large images.",
        flagai="token_merging",
        flags=("--token-merging",),
        at_least=0,
        at_most=0.75,
        quiet=True,
    )

    engine: str = option(
        "auto",
        "What computes: the model itself, its weights laid out for the processor, OpenVINO, or torch's compiler: the "
        "same image but for rounding.",
        flagai="engine",
        flags=("--engine",),
        choices=ENGINES,
        quiet=True,
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

    @field_validator("grid", "prompt_syntax", "fit", "seamless", "hires_upscaler", "engine", mode="before")
    @classmethod
    def _one_of_the_choices(cls, value: object, info: ValidationInfo) -> object:
        choices = OPTIONS[str(info.field_name)].choices
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    @field_validator("ground")
    @classmethod
    def _known_colour(cls, value: str) -> str:
        if not is_colour(value):
            raise ValueError("expected a colour, as white or #ff8800")
        return value

    @model_validator(mode="after")
    def _eta_has_a_meaning(self) -> GenerationRequest:
        if self.eta and not SAMPLERS[self.sampler].takes_eta:
            able = " and ".join(spec.title for spec in SAMPLERS.values() if spec.takes_eta)
            expected = f"eta must be 0 for {self.sampler.upper()}; only {able} takes another value"
            raise InvalidRequestError("eta", self.eta, expected)
        return self

    @model_validator(mode="after")
    def _nothing_is_without_effect(self) -> GenerationRequest:
        def given(name: str) -> bool:
            return bool(getattr(self, name) != OPTIONS[name].default)

        for name, needed in _NEEDS.items():
            value = getattr(self, name)
            if given(name) and not any(given(other) for other in needed):
                raise InvalidRequestError(name, value, f"it has no effect without {' or '.join(needed)}")
        return self

    @model_validator(mode="after")
    def _guidance_has_a_part(self) -> GenerationRequest:
        if self.guidance_interval and self.guidance_scale == 1:
            expected = "it has no effect with a guidance scale of 1, which is none"
            raise InvalidRequestError("guidance_interval", self.guidance_interval, expected)
        return self

    @model_validator(mode="after")
    def _options_of_pictures(self) -> GenerationRequest:
        if self.init_image is None:
            return self
        if self.hires is not None:
            raise InvalidRequestError("hires", self.hires, "it is for images from nothing; with init_image give a size")
        if self.mask_image is not None:
            try:
                mask_of(self.init_image, self.mask_image)
            except ValueError as error:
                raise InvalidRequestError("mask_image", self.mask_image, str(error)) from None
        return self

    @model_validator(mode="after")
    def _options_of_windows(self) -> GenerationRequest:
        if self.window is not None and self.window_overlap is not None and self.window_overlap >= self.window:
            raise InvalidRequestError("window_overlap", self.window_overlap, f"less than the window's {self.window} px")
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
        given = {f.name: getattr(self, f.name) for f in fields(GenerationRequest)}  # type: ignore[arg-type]
        unit = downsampling * 2**halvings
        like = self._size_of_picture((width, height), unit)
        width, height = like or (self.width or width, self.height or height)
        width, height = (
            _fitted("width", width, downsampling, halvings),
            _fitted("height", height, downsampling, halvings),
        )
        filled = {
            "height": height,
            "width": width,
            "steps": self.steps or steps,
            "guidance_scale": guidance_scale if self.guidance_scale is None else self.guidance_scale,
            "seed": _drawn(self.seed),
            "batch_size": self.batch_size or self.images_per_prompt,
        }
        if self.variation_strength:
            filled["variation_seed"] = _drawn(self.variation_seed)
        if self.init_image is not None and self.strength is None:
            filled["strength"] = 1.0 if self.outpaint else _USUAL_STRENGTH
        if self.window is not None:
            filled["window"] = _fitted("window", self.window, downsampling, halvings)
            overlap = filled["window"] // 2 if self.window_overlap is None else self.window_overlap
            filled["window_overlap"] = overlap // downsampling * downsampling
        final = self.final_size if isinstance(self, ResolvedRequest) else self._final_size(width, height, unit)
        return ResolvedRequest(**(given | filled), final_size=final)

    def _size_of_picture(self, usual: tuple[int, int], unit: int) -> tuple[int, int] | None:
        """Width and height that a picture asks for, near its own; ``None`` where they are given, or there is none."""
        own = self.picture_size
        if own is None or self.mask_full_resolution or (self.width and self.height):
            return None
        most = _LARGER * usual[0] * usual[1]
        if self.width or self.height:
            scale = self.width / own[0] if self.width else (self.height or 1) / own[1]
        else:
            fits = self.window is not None or own[0] * own[1] <= most
            scale = 1.0 if fits else (usual[0] * usual[1] / (own[0] * own[1])) ** 0.5
        if scale == 1 and self._keeps_pixels:  # it gets a margin, which is cut off again
            return math.ceil(own[0] / unit) * unit, math.ceil(own[1] / unit) * unit
        width, height = _near(own[0] * scale, own[1] * scale, unit)
        return self.width or width, self.height or height

    @property
    def picture_size(self) -> tuple[int, int] | None:
        """Width and height of the picture that it begins with, and of what is drawn around it."""
        return None if self.init_image is None else with_margins(self.init_image.image.size, self.outpaint)

    @property
    def _keeps_pixels(self) -> bool:
        """Whether a part of the picture stays as it is, at its own size."""
        return bool(self.mask_image is not None or self.outpaint) and not (self.width or self.height)

    def _final_size(self, width: int, height: int, unit: int) -> tuple[int, int]:
        """Width and height of a finished image."""
        if (own := self.picture_size) and (self.mask_full_resolution or self._keeps_pixels):
            return own
        if self.hires is None:
            return width, height
        wider, higher = (max(unit, round(side * self.hires / unit) * unit) for side in (width, height))
        if max(wider, higher) > MAX_SIDE:
            raise InvalidRequestError(
                "hires", self.hires, f"{wider}x{higher} px; no side may have more than {MAX_SIDE}"
            )
        return wider, higher

    def as_json(self) -> dict[str, Any]:
        """Options as plain JSON values, which the constructor takes back; many are left out at their defaults."""
        values = TypeAdapter(type(self)).dump_python(self, mode="json")
        return {
            name: value
            for name, value in values.items()
            if name in OPTIONS and not (OPTIONS[name].quiet and value == OPTIONS[name].default)
        }


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
    final_size: tuple[int, int]
    """Width and height of a finished image, which may be another than that of what is drawn."""

    def other_sizes(self, asked: GenerationRequest) -> Iterator[Note]:
        """Where sizes are others than was asked for, as a model's latents are made of whole cells."""
        size, final = (asked.width or self.width, asked.height or self.height), self.final_size
        if size != (self.width, self.height) and asked.init_image is None:
            drawn = f"drawing {self.width}x{self.height} (width x height)"
            yield Note("floored size", f"{size[0]}x{size[1]} is not a whole number of latent cells: {drawn}")
        if (own := asked.picture_size) and final != own:
            text = f"the picture is {own[0]}x{own[1]} px, the image will be {final[0]}x{final[1]} (width x height)"
            yield Note("floored size", text)
        if asked.mask_image is not None and self.width < final[0] and not asked.mask_full_resolution:
            drawn = f"drawn at {self.width}x{self.height} and enlarged to {final[0]}x{final[1]}"
            yield Note("floored size", f"{drawn}; mask_full_resolution draws just what is near the mask")
        if asked.window not in (None, self.window):
            yield Note("floored size", f"window={asked.window} is not a whole number of latent cells: {self.window}")

    def without_pixels(self) -> ResolvedRequest:
        """The same to be told of and no more to be drawn: of its pictures only what :meth:`as_json` says is kept."""
        told = copy.copy(self)
        for name in ("init_image", "mask_image"):
            if isinstance(picture := getattr(self, name), Picture):
                object.__setattr__(told, name, picture.as_json())
        return told

    def seed_of(self, index: int) -> int:
        """Seed of an image: its own where seeds are per image, else that of the whole request."""
        own = self.seed_mode == "per_image" and not self.variation_strength
        return (self.seed + index) % (MAX_SEED + 1) if own else self.seed

    def negative_of(self, index: int) -> str:
        """Negative prompt of an image."""
        return self.negative_prompt

    def scale_of(self, index: int) -> float:
        """Guidance scale of an image."""
        return self.guidance_scale

    @property
    def guided_part(self) -> tuple[float, float]:
        """From where to where on the way from noise (0) to image (1) there is guidance."""
        return span_of(self.guidance_interval) if self.guidance_interval else (0.0, 1.0)

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
        metavar="DIR",
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
        if request.variation_strength and request.variation_seed in (None, -1):
            expected = "resume needs the variation seed of the interrupted run, from the records of its images"
            raise InvalidRequestError("variation_seed", request.variation_seed, expected)


_NEEDS = {
    "strength": ("init_image",),
    "full_steps": ("init_image",),
    "fit": ("init_image",),
    "ground": ("init_image",),
    "mask_image": ("init_image",),
    "outpaint": ("init_image",),
    "mask_feather": ("mask_image", "outpaint"),
    "mask_full_resolution": ("mask_image",),
    "mask_padding": ("mask_full_resolution",),
    "window_overlap": ("window",),
    "stretches": ("window",),
    "hires_strength": ("hires",),
    "hires_upscaler": ("hires",),
    "variation_seed": ("variation_strength",),
}
"""Option -> those without any of which it has no effect."""


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

    kind: Literal[
        "cut prompt",
        "floored size",
        "changed steps",
        "prompt syntax",
        "precision",
        "flagged",
        "grid",
        "not saved",
        "skipped",
        "unknown",
    ]
    text: str


def _drawn(seed: int | None) -> int:
    """A seed that was given, or one by chance."""
    return secrets.randbelow(MAX_SEED + 1) if seed in (None, -1) else seed


def _near(width: float, height: float, unit: int) -> tuple[int, int]:
    """Width and height in whole units: nearly of these proportions, and nearly as large."""
    downs, acrosses = ({math.floor(side / unit), math.ceil(side / unit)} - {0} or {1} for side in (height, width))

    def misfit(size: tuple[int, int]) -> float:
        proportions = math.log(size[0] / size[1] * height / width)
        return 4 * abs(proportions) + abs(math.log(size[0] * size[1] / (width * height)))

    return min(((across * unit, down * unit) for across in sorted(acrosses) for down in sorted(downs)), key=misfit)


def _fitted(name: str, size: int, downsampling: int, halvings: int) -> int:
    """A side floored to the latent grid, as the original does."""
    if size > MAX_SIDE:
        raise InvalidRequestError(name, size, f"at most {MAX_SIDE} px")
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
