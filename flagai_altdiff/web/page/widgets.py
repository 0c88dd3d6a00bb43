"""A widget for each option, made from its one definition."""

from __future__ import annotations

from typing import Any

import gradio as gr

from flagai_altdiff.options import Option, options_of
from flagai_altdiff.registry import ModelSpec
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.web.page.texts import option_help, option_label

_ELSEWHERE = ("prompts", "init_image", "mask_image", "batch_size")
"""Options with a place of their own on the page; the last one the server chooses."""
FIRST = ("negative_prompt", "images_per_prompt", "steps", "width", "height", "guidance_scale", "seed", "sampler")
"""What is seen at first."""
BESIDE_PICTURE = ("strength", "mask_feather", "outpaint")
"""What is seen beside a picture."""

SHOWN = {name: option for name, option in options_of(GenerationRequest).items() if name not in _ELSEWHERE}
"""Options that have a widget."""
MODELS_OWN = ("steps", "width", "height", "guidance_scale", "seed")
"""Numbers that are never left empty: they begin as the model's own, and the seed as -1."""
MORE = tuple(name for name in SHOWN if name not in (*FIRST, *BESIDE_PICTURE))


def widget(option: Option, language: str, spec: ModelSpec) -> gr.components.Component:
    """The widget of an option, as it stands until something is typed.

    Limits are the request's to check, in its own words.

    Args:
        option: The option.
        language: Of its label.
        spec: The model whose numbers it begins with.
    """
    common: dict[str, Any] = {
        "label": option_label(option.name, language),
        "info": option_help(option.name, language),
        "elem_id": f"option-{option.name}",
    }
    if isinstance(option.default, bool):
        return gr.Checkbox(value=option.default, **common)
    if option.choices:
        return gr.Dropdown(list(option.choices), value=option.default, **common)
    if option.minimum is None or (option.default is None and option.name not in MODELS_OWN):
        return gr.Textbox(value=option.default or "", lines=1, max_length=20_000, min_width=120, **common)
    return gr.Number(
        value=getattr(spec, option.name, -1) if option.name in MODELS_OWN else option.default,
        precision=0 if option.whole else None,
        min_width=120,
        **common,
    )


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Options that differ from their defaults; texts of numbers as numbers."""
    read = {name: _number(SHOWN[name], value) for name, value in values.items()}
    return {name: value for name, value in read.items() if value not in (None, "", SHOWN[name].default)}


def _number(option: Option, value: Any) -> Any:
    """A number that was typed; what is none stays a text, and is refused with the option's own words."""
    if option.minimum is None or not isinstance(value, str):
        return value
    try:
        return int(value) if option.whole else float(value)
    except ValueError:
        return value.strip()
