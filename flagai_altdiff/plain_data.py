"""What configs and tokenizers are written in, read as nothing but data: ordinary files, capped; each key once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from flagai_altdiff.errors import ConfigError, printable, shown
from flagai_altdiff.files import open_regular

T = TypeVar("T")

_MAX_DIGITS = 40
_MAY_BE_INFINITE = ("lambda_min_clipped",)
"""Keys that diffusers itself writes so, and that nothing here asks for."""


def read_capped(path: Path, limit_bytes: int) -> bytes:
    """The content of an ordinary file.

    Raises:
        ValueError: It is longer.
        OSError: It cannot be read, or is a pipe, a device or a folder.
    """
    with open_regular(path) as file:
        data = file.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise ValueError(f"it has more than {limit_bytes:,} bytes; is it another file?")
    return data


def read_config(path: Path, limit_bytes: int, parse: Callable[[bytes], T], form: str) -> T:
    """A config file as data.

    Args:
        path: The file.
        limit_bytes: Most bytes that such a file has.
        parse: Bytes to data; what it refuses is a ValueError or RecursionError.
        form: What it parses, for errors.

    Raises:
        ConfigError: The file cannot be read, or is something else.
    """
    try:
        return parse(read_capped(path, limit_bytes))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Was the download complete?") from error
    except RecursionError as error:
        raise ConfigError(f"{path} cannot be read as {form}: it is nested too deeply.") from error
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read as {form}: {printable(str(error), 400)}") from error


def parse_json(data: bytes) -> Any:
    """JSON as data.

    Raises:
        ValueError: It is none, a key stands twice in an object, or its value is no number that can be used.
        RecursionError: Nested too deeply.
    """
    return json.loads(data.decode("utf-8-sig"), object_pairs_hook=mapping, parse_int=integer, parse_float=float)


def mapping(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Keys and values as a dictionary.

    Raises:
        ValueError: A key stands twice, so which is meant cannot be told; or a value is NaN or infinity.
    """
    made: dict[Any, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {shown(key)} stands twice in one place; remove one of them.")
        if isinstance(value, float) and not math.isfinite(value) and key not in _MAY_BE_INFINITE:
            raise ValueError(f"{shown(key)} is no number that can be used, or one of very many digits.")
        made[key] = value
    return made


def integer(text: str) -> float:
    """A whole number; one of more digits than anything here can have is infinite."""
    return int(text) if len(text) <= _MAX_DIGITS else math.inf
