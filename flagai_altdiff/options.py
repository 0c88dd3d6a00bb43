"""Options declared once: a pydantic dataclass whose fields carry help, limits, unit and the names that people type.

Checks, JSON Schema, flags of the command line and FlagAI's argument names are all read from such a declaration.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError

T = TypeVar("T")


def _plain(value: object) -> object:
    """Numbers of numpy and torch, 0-d arrays among them, as Python's own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


Whole = Annotated[int, Field(strict=True)]
"""A whole number; texts and truth values are none."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number."""


def span_of(text: str) -> tuple[float, float]:
    """Both ends of a span, as in ``0.1-0.8``.

    Raises:
        ValueError: It is none.
    """
    first, _, last = text.replace(" ", "").partition("-")
    try:
        ends = float(first), float(last)
    except ValueError:
        ends = (1.0, 0.0)
    if not 0 <= ends[0] < ends[1] <= 1:
        raise ValueError("expected two numbers from 0 to 1, the smaller one first, as in 0.1-0.8")
    return ends


def _as_span(value: object) -> object:
    """A span in the one way that it is written; nothing where it is all there is."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = "-".join(map(str, value))
    if not isinstance(value, str) or not value:
        return "" if value is None else value
    ends = span_of(value)
    return "" if ends == (0, 1) else "-".join(f"{end:g}" for end in ends)


SpanField = Annotated[str, BeforeValidator(_as_span)]
"""A part of a way, as a text; empty for all of it."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a user interface must know of an option.

    Args:
        name: Its field.
        help: One sentence.
        default: Its value unless given.
        flagai: FlagAI's name of it.
        flags: Its flags on the command line, the usual one first; none where it has no flag of its own.
        unit: Unit of its value, if it has one.
        choices: Valid names; empty where any text is valid.
        minimum: Smallest value; ``None`` where it is no number.
        maximum: Largest value.
        whole: Whether the number must be whole.
        quiet: Whether records leave it out while it has its default.
        metavar: What stands for its value in help; empty where it follows from the others.
    """

    name: str
    help: str
    default: Any
    flagai: str
    flags: tuple[str, ...]
    unit: str
    choices: tuple[str, ...]
    minimum: float | None
    maximum: float | None
    whole: bool
    quiet: bool
    metavar: str

    @property
    def limits(self) -> str:
        """Smallest and largest value in words; empty where it is no number."""
        return "" if self.minimum is None else f"{self.minimum:,} to {self.maximum:,} {self.unit}".rstrip()


def option(
    default: Any,
    help: str,
    *,
    flagai: str,
    flags: tuple[str, ...] = (),
    unit: str = "",
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
    quiet: bool = False,
    metavar: str = "",
) -> Any:
    """A field that is an option; arguments as the attributes of :class:`Option`."""
    extra: dict[str, Any] = {"flagai": flagai, "flags": list(flags), "unit": unit, "quiet": quiet, "metavar": metavar}
    if choices:
        extra["enum"] = list(choices)
    return Field(default=default, description=help, json_schema_extra=extra, ge=at_least, le=at_most)


def options_of(cls: type) -> dict[str, Option]:
    """Every option that a pydantic dataclass declares, by its field."""
    declared: Mapping[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return {name: _option(name, field) for name, field in declared.items() if field.json_schema_extra}


def _option(name: str, field: FieldInfo) -> Option:
    extra: Mapping[str, Any] = field.json_schema_extra  # type: ignore[assignment]
    limits = {key: getattr(part, key) for part in field.metadata for key in ("ge", "le") if hasattr(part, key)}
    return Option(
        name=name,
        help=str(field.description),
        default=field.default,
        flagai=extra["flagai"],
        flags=tuple(extra["flags"]),
        unit=extra["unit"],
        choices=tuple(extra.get("enum", ())),
        minimum=limits.get("ge"),
        maximum=limits.get("le"),
        whole="int" in str(field.annotation),
        quiet=extra["quiet"],
        metavar=extra["metavar"],
    )


def with_our_errors(cls: type[T]) -> type[T]:
    """Class decorator: a pydantic dataclass that takes any library's numbers and raises InvalidRequestError."""
    validate: Callable[..., None] = cls.__init__

    @functools.wraps(validate)
    def __init__(self: T, **values: Any) -> None:
        try:
            validate(self, **{name: _plain(value) for name, value in values.items()})
        except ValidationError as error:
            problems = error.errors(include_url=False)
            unknown = [problem for problem in problems if problem["type"] == "unexpected_keyword_argument"]
            raise _translated(cls, (unknown or problems)[0]) from None

    cls.__init__ = __init__  # type: ignore[assignment]
    return cls


def other_names(options: Mapping[str, Option]) -> dict[str, str]:
    """FlagAI's name of an option, and its flags without hyphens -> its own name."""
    flags = {flag.lstrip("-").replace("-", "_"): own for own, option in options.items() for flag in option.flags}
    return flags | {option.flagai: own for own, option in reversed([*options.items()])}


def _translated(cls: type, problem: ErrorDetails) -> Exception:
    reason = problem.get("ctx", {}).get("error")
    if isinstance(reason, FlagAIAltDiffError):
        return reason
    name, value = str(problem["loc"][0]), problem["input"]
    known = [f.name for f in fields(cls)]
    if name not in known:
        others = other_names(options_of(cls))
        near = [others[name]] if name in others else difflib.get_close_matches(name, known, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        return InvalidRequestError(name, value, f"there is no such option; {guess}known: {', '.join(known)}")
    if problem["type"] == "missing":
        return InvalidRequestError(name, None, "it must be given")
    return InvalidRequestError(name, value, str(reason) if reason else _expected(options_of(cls).get(name), value))


def _expected(option: Option | None, value: object) -> str:
    if option is None:
        return "expected another kind of value"
    if option.choices:
        return f"expected one of {', '.join(option.choices)}"
    if option.minimum is None or option.maximum is None:
        kinds = {bool: "True or False", PurePath: "a path"}
        return f"expected {next((text for kind, text in kinds.items() if isinstance(option.default, kind)), 'text')}"
    limits = f"{'a whole number' if option.whole else 'a number'} from {option.minimum} to {option.maximum}"
    value = _plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        nearest = min(max(value, option.minimum), option.maximum)
        if value == value and nearest != value:
            limits += f"; the nearest is {nearest}"
    return f"expected {limits}"
