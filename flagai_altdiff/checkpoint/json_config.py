"""JSON configs as data: fields fetched with their type and size checked, and nothing in them ever run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from flagai_altdiff.errors import ConfigError, printable, shown
from flagai_altdiff.plain_data import parse_json, read_config

P = ParamSpec("P")
T = TypeVar("T")

_MAX_JSON_BYTES = 1 << 20
MAX_SIZE = 1_000_000
"""No width or count in a config of this family comes near."""
_MAX_LEVELS = 16
_CODE_FIELDS = ("auto_map", "trust_remote_code", "custom_pipelines", "_target_")
"""Fields by which a config asks for code from its own folder or from elsewhere."""


@dataclass(frozen=True)
class ConfigFile:
    """The fields of a JSON file, fetched with their type checked.

    Args:
        path: The file, for errors.
        fields: Its object.
    """

    path: Path
    fields: Mapping[str, object]

    def error(self, field: str, expected: str) -> ConfigError:
        """What to raise for a field that is not as expected."""
        return ConfigError(f"{self.path}: {printable(field, 80)}={shown(self.fields.get(field))}: expected {expected}.")

    def integer(self, field: str, default: int) -> int:
        """A whole number from 1 to ``MAX_SIZE``."""
        value = self.fields.get(field, default)
        if not _is_size(value):
            raise self.error(field, f"an integer from 1 to {MAX_SIZE}")
        return value  # type: ignore[return-value]

    def integers(self, field: str, default: Sequence[int]) -> tuple[int, ...]:
        """A short list of such numbers."""
        value = self.fields.get(field, default)
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= _MAX_LEVELS or not all(map(_is_size, value)):
            raise self.error(field, f"1 to {_MAX_LEVELS} integers from 1 to {MAX_SIZE}")
        return tuple(value)

    def uniform(self, field: str, default: int) -> int:
        """An integer, or a list of equal ones."""
        if not isinstance(self.fields.get(field), list):
            return self.integer(field, default)
        values = set(self.integers(field, ()))
        if len(values) != 1:
            raise self.error(field, "the same number at every level")
        return values.pop()

    def number(self, field: str, default: float) -> float:
        """A positive number."""
        value = self.fields.get(field, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_SIZE:
            raise self.error(field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        value = self.fields.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "true or false")
        return value

    def choice(self, field: str, values: Mapping[str, str], default: str) -> str:
        """One of the keys of ``values``; gives its value."""
        value = self.fields.get(field, default)
        if not isinstance(value, str) or value not in values:
            raise self.error(field, " or ".join(values))
        return values[value]

    def check(self, expected: Mapping[str, object], known: Iterable[str] | None = None) -> None:
        """Refuse a field with another value than the expected one; and, given ``known`` ones, any other that is set."""
        for field, value in self.fields.items():
            if field in expected and value != expected[field]:
                raise self.error(field, json.dumps(expected[field]))
            is_set = value is not None and value is not False
            if (
                known is not None
                and is_set
                and field not in expected
                and field not in known
                and not field.startswith("_")
            ):
                raise self.error(field, "it unset, because AltDiffusion's models have nothing like it")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def load_json(path: Path) -> ConfigFile:
    """Read a JSON object.

    Raises:
        ConfigError: Unreadable, too long, no JSON object, or one that asks for code.
    """
    fields = read_config(path, _MAX_JSON_BYTES, parse_json, "JSON")
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(fields).__name__}.")
    asked = [field for field in _CODE_FIELDS if fields.get(field)]
    if asked:
        raise ConfigError(
            f"{path} is refused: {asked[0]} asks for code, and configs are only read here. Remove it from the file."
        )
    return ConfigFile(path, fields)


def build(path: Path, kind: Callable[P, T], *args: P.args, **fields: P.kwargs) -> T:
    """``kind(**fields)``, with the path in front of what it refuses."""
    try:
        return kind(*args, **fields)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
