"""What clients send: read within bounds, and turned into options of a request. One definition of them, request.py's."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic import TypeAdapter

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import Picture, is_mask_in_words
from flagai_altdiff.request import OPTIONS, GenerationRequest
from flagai_altdiff.web.encoding import picture_from_base64
from flagai_altdiff.web.fetching import fetch_picture
from flagai_altdiff.web.messages import Lora
from flagai_altdiff.web.settings import Settings

PICTURES = ("init_image", "mask_image")
_OURS = {option.flagai: name for name, option in OPTIONS.items() if name != "batch_size"}
"""FlagAI's names of options → ours."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client asks for, beside the options of a request.

    Args:
        options: Of a request; pictures are pictures.
        model: Named model.
        loras: Names and strengths.
        is_saved: Whether the images are filed.
    """

    options: Mapping[str, Any]
    model: str | None = None
    loras: tuple[Lora, ...] = ()
    is_saved: bool = True


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        InvalidRequestError: It is none.
    """
    content = await request.body()
    if not content:
        return {}
    try:
        text = content.decode("utf-8-sig")
        found = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode()  # halves of surrogate pairs can be in no answer
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError("body", content[:40], f"expected JSON ({error})") from error
    if not isinstance(found, dict):
        raise InvalidRequestError("body", type(found).__name__, "expected a JSON object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is no number")
    return number


async def read_order(body: Mapping[str, Any], settings: Settings) -> Order:
    """An order in our own words: options under our names or FlagAI's, and ``model``, ``loras``, ``save``.

    Args:
        body: See ``ORDER_SCHEMA``.
        settings: Which pictures are taken.

    Raises:
        InvalidRequestError: Something in it is wrong.
    """
    options = {_OURS.get(name, name): value for name, value in body.items() if name not in ("model", "loras", "save")}
    for name in PICTURES:
        if options.get(name) not in (None, "") and not (name == "mask_image" and is_mask_in_words(options[name])):
            options[name] = await picture(options[name], name, settings)
    is_saved = body.get("save", True)
    if not isinstance(is_saved, bool):
        raise InvalidRequestError("save", is_saved, "expected true or false")
    return Order(options=options, model=model_of(body), loras=_loras(body.get("loras")), is_saved=is_saved)


def model_of(body: Mapping[str, Any]) -> str | None:
    """The name of the model that a body asks for, if it does.

    Raises:
        InvalidRequestError: It is no name.
    """
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise InvalidRequestError("model", model, "expected a name")
    return model


async def picture(value: object, field: str, settings: Settings) -> Picture:
    """A picture that a client named: base64, or an address where the server allows that.

    Raises:
        InvalidRequestError: It is none.
    """
    most = settings.limits.picture_pixels
    if isinstance(value, str) and value[:8].lower().startswith(("http://", "https://")):
        if not settings.access.picture_urls:
            raise InvalidRequestError(field, value, "this server fetches no pictures; send it as base64")
        return await fetch_picture(value, field, settings.limits)
    return await asyncio.to_thread(picture_from_base64, value, field, most)


def _loras(value: object) -> tuple[Lora, ...]:
    expected = 'expected a list as in [{"name": "robot", "strength": 0.8}]'
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(lora, dict) and "name" in lora for lora in value):
        raise InvalidRequestError("loras", value, expected)
    found = []
    for lora in value:
        strength = lora.get("strength", 1.0)
        if not isinstance(lora["name"], str) or isinstance(strength, bool) or not isinstance(strength, int | float):
            raise InvalidRequestError("loras", lora, expected)
        found.append((lora["name"], as_float(strength, "loras", expected)))
    return tuple(found)


def as_float(value: Any, field: str, expected: str = "expected a number") -> float:
    """A number that a client wrote in any way.

    Raises:
        InvalidRequestError: It is none, or no float is so large.
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(field, value, expected) from None


def order_schema() -> dict[str, Any]:
    """JSON Schema of an order, for the documentation."""
    schema = TypeAdapter(GenerationRequest).json_schema()
    for name in PICTURES:
        schema["properties"][name] |= {"description": OPTIONS[name].help + " As base64, or a data URL."}
    schema["properties"] |= {
        "prompt": {"type": "string", "description": "Short for one of `prompts`."},
        "model": {"type": "string", "description": "One of the server's models; its first unless given."},
        "loras": {
            "type": "array",
            "description": "Small additions to the model that the server has.",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "strength": {"type": "number", "default": 1}},
                "required": ["name"],
            },
        },
        "save": {"type": "boolean", "default": True, "description": "Whether the images are filed on the server."},
    }
    schema.pop("required", None)
    return schema
