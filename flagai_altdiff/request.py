"""GenerationRequest: every knob of a generation once, with type, default, range, unit and help. No torch."""

from __future__ import annotations

import codecs
import re
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import PurePath
from typing import Any

from flagai_altdiff.errors import InvalidRequestError, UnknownSamplerError

SAMPLER_NAMES = ("ddim", "plms", "dpmpp_2m", "euler_ancestral")
"""Keys of ``sampling.SAMPLERS``, here so that a request can be checked without torch."""

SEED_MODES = ("batch", "per_image")
MAX_SEED = 2**32 - 1
MAX_SIDE = 8192


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a user interface must know of one knob.

    Args:
        help: One sentence.
        unit: Unit of the value, if it has one.
        minimum: Smallest valid value.
        maximum: Largest valid value.
        choices: Valid names; empty where any text is valid.
        legacy: FlagAI's name of the knob.
    """

    help: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    legacy: str = ""


def _option(default: Any, **kwargs: Any) -> Any:
    return field(default=default, metadata={"option": Option(**kwargs)})


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What to draw and how. ``None`` means: the model's own default. ``prompts`` may be given as one text or a list.

    Raises:
        InvalidRequestError: A value outside its range.
        UnknownSamplerError: A sampler that does not exist.
    """

    prompts: tuple[str, ...] = _option((), help="What the pictures show, in any language of the model.", legacy="prompt")
    negative_prompt: str = _option("", help="What the pictures must not show.", legacy="negative_prompt")
    height: int | None = _option(None, help="Height of a picture.", unit="px", minimum=8, maximum=MAX_SIDE, legacy="H")
    width: int | None = _option(None, help="Width of a picture.", unit="px", minimum=8, maximum=MAX_SIDE, legacy="W")
    steps: int | None = _option(
        None, help="Sampler steps; more is finer and slower.", minimum=1, maximum=1000, legacy="ddim_steps"
    )
    guidance_scale: float | None = _option(
        None, help="How closely to follow the prompt; 1 turns guidance off.", minimum=0, maximum=1000, legacy="scale"
    )
    sampler: str = _option(
        "ddim",
        help="Algorithm from noise to picture.",
        choices=SAMPLER_NAMES,
        legacy="sampler",
    )
    eta: float = _option(0.0, help="Share of fresh noise in DDIM.", minimum=0, maximum=1, legacy="ddim_eta")
    seed: int | None = _option(
        34234, help="Start of the random numbers; -1 draws one.", minimum=-1, maximum=MAX_SEED, legacy="seed"
    )
    seed_mode: str = _option(
        "batch",
        help="'batch': FlagAI's numbers. 'per_image': picture k has seed + k, whatever its batch.",
        choices=SEED_MODES,
        legacy="seed_mode",
    )
    images_per_prompt: int = _option(4, help="Pictures of each prompt.", minimum=1, maximum=10_000, legacy="n_samples")
    batch_size: int | None = _option(
        None, help="Pictures drawn at once; all of a prompt unless given.", minimum=1, maximum=10_000, legacy="n_samples"
    )
    iterations: int = _option(1, help="How often to go through all prompts.", minimum=1, maximum=100_000, legacy="n_iter")
    fixed_code: bool = _option(False, help="Start every batch from the same noise.", legacy="fixed_code")

    def __post_init__(self) -> None:
        prompts = (self.prompts,) if isinstance(self.prompts, str) else self.prompts
        if not isinstance(prompts, (list, tuple)):
            raise self._invalid("prompts", prompts, "expected a text or several")
        object.__setattr__(self, "prompts", tuple(prompts))
        if not self.prompts or not all(isinstance(p, str) for p in self.prompts):
            raise self._invalid("prompts", self.prompts, "expected at least one text, and texts only")
        if not isinstance(self.negative_prompt, str):
            raise self._invalid("negative_prompt", self.negative_prompt, "expected text")
        for name, text in [("prompts", p) for p in self.prompts] + [("negative_prompt", self.negative_prompt)]:
            if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                raise self._invalid(name, text, "the text has half of a surrogate pair; was it cut inside an emoji?")
        for f in fields(self):
            option: Option = f.metadata["option"]
            value = getattr(self, f.name)
            if option.minimum is not None and not (value is None and "None" in str(f.type)):
                self._check_number(f.name, value, option, integer=str(f.type).startswith("int"))
        if self.sampler not in SAMPLER_NAMES:
            raise UnknownSamplerError(self.sampler, SAMPLER_NAMES)
        if self.seed_mode not in SEED_MODES:
            raise self._invalid("seed_mode", self.seed_mode, f"expected one of {', '.join(SEED_MODES)}")
        if self.eta and self.sampler != "ddim":
            raise self._invalid("eta", self.eta, f"eta must be 0 for {self.sampler.upper()}; only DDIM takes another value")

    def _check_number(self, name: str, value: object, option: Option, integer: bool) -> None:
        kind = "a whole number" if integer else "a number"
        limits = f"{kind} from {_short(option.minimum)} to {_short(option.maximum)}"
        if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
            raise self._invalid(name, value, f"expected {limits}")
        assert option.minimum is not None and option.maximum is not None
        if not option.minimum <= value <= option.maximum:  # true of NaN as well
            nearest = "" if value != value else f"; the nearest is {_short(_clamp(value, option))}"
            raise self._invalid(name, value, f"expected {limits}{nearest}")

    def _invalid(self, name: str, value: object, expected: str) -> InvalidRequestError:
        return InvalidRequestError(name, value, expected)

    def with_defaults(self, *, height: int, width: int, steps: int, guidance_scale: float) -> GenerationRequest:
        """The request with a model's defaults where it had none, and a seed drawn where it asks for one."""
        return replace(
            self,
            height=height if self.height is None else self.height,
            width=width if self.width is None else self.width,
            steps=steps if self.steps is None else self.steps,
            guidance_scale=guidance_scale if self.guidance_scale is None else self.guidance_scale,
            seed=secrets.randbelow(MAX_SEED + 1) if self.seed in (None, -1) else self.seed,
        )

    def fitted(self, downsampling: int, halvings: int) -> GenerationRequest:
        """The request with height and width floored to the latent grid, as the original does.

        Args:
            downsampling: Pixels per latent cell (f).
            halvings: How often the UNet halves a latent.

        Raises:
            InvalidRequestError: The UNet cannot halve the size evenly; the message has the nearest sizes that work.
        """
        return replace(
            self,
            height=self._fit("height", self.height, downsampling, halvings),
            width=self._fit("width", self.width, downsampling, halvings),
        )

    def _fit(self, name: str, size: int | None, downsampling: int, halvings: int) -> int:
        assert size is not None
        cells, unit = size // downsampling, 2**halvings
        if cells and cells % unit == 0:
            return cells * downsampling
        below = cells // unit * unit * downsampling
        near = " or ".join(str(s) for s in (below, below + unit * downsampling) if s)
        raise self._invalid(name, size, f"this model draws multiples of {unit * downsampling} px; the nearest is {near}")

    @property
    def pictures_at_once(self) -> int:
        """Size of a full batch."""
        return self.batch_size or self.images_per_prompt

    def batches(self) -> Iterator[tuple[str, ...]]:
        """Prompts of each batch, in order, over all iterations; the last of an iteration may be short."""
        rows = [prompt for prompt in self.prompts for _ in range(self.images_per_prompt)]
        size = self.pictures_at_once
        for _ in range(self.iterations):
            for start in range(0, len(rows), size):
                yield tuple(rows[start : start + size])


def option_of(name: str) -> Option:
    """The option behind a field of :class:`GenerationRequest`."""
    return next(f.metadata["option"] for f in fields(GenerationRequest) if f.name == name)


def parse_prompt_file(data: bytes, name: str) -> list[str]:
    """The prompts of a text file: one per line, blank lines skipped.

    Args:
        data: UTF-8 (with or without a byte order mark) or UTF-16 with one, LF or CRLF.
        name: The file, for errors.

    Raises:
        InvalidRequestError: Another encoding (with the line), or no prompt in it.
    """
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidRequestError("from_file", name, f"line {line} is not UTF-8; {_reencoding(data, name)}") from error
    if "\0" in text:
        raise InvalidRequestError("from_file", name, f"it has NUL characters; {_reencoding(data, name)}")
    prompts = [line.strip("\r\n") for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InvalidRequestError("from_file", name, "the file has no prompt; expected one per line")
    return prompts


def _reencoding(data: bytes, name: str) -> str:
    """The command that makes a UTF-8 copy of a prompt file, with a guess at what it is now."""
    if b"\0" in data:
        guess = "UTF-16LE" if data.find(b"\0") % 2 else "UTF-16BE"
    else:  # letters of Chinese take two bytes each
        single = any(len(run) % 2 for run in re.findall(rb"[\x80-\xff]+", data))
        guess = "ISO-8859-1" if single else "GB18030"
    source, copy = shlex.quote(name), shlex.quote(str(PurePath(name).with_suffix(".utf8.txt")))
    return f"save it as UTF-8. If it is {guess}, as it seems: iconv -f {guess} -t UTF-8 {source} > {copy}"


def _clamp(value: float, option: Option) -> float:
    assert option.minimum is not None and option.maximum is not None
    return min(max(value, option.minimum), option.maximum)


def _short(value: float | None) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
