"""AltDiffusion: multilingual text to image, in FlagAI's calls or in these:

    from flagai_altdiff import generate, load_model

    model = load_model("AltDiffusion-mini")
    result = generate(model, "a cat on a red background", seed=7)
    result.images[0].show()

Importing the package loads no torch; the names below are imported when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flagai_altdiff.auto_loader import AutoLoader
    from flagai_altdiff.diffusers_bridge import from_diffusers, to_diffusers
    from flagai_altdiff.errors import FlagAIAltDiffError
    from flagai_altdiff.loading import load_model
    from flagai_altdiff.lora import add_lora, remove_loras
    from flagai_altdiff.models import LatentDiffusion
    from flagai_altdiff.output import draw_to_folder
    from flagai_altdiff.parts import add_embedding, use_vae
    from flagai_altdiff.pipeline import GenerationResult, Sample, generate, stream
    from flagai_altdiff.predictor import Predictor
    from flagai_altdiff.quantizing import quantize_model
    from flagai_altdiff.registry import MODELS
    from flagai_altdiff.request import GenerationRequest, Output
    from flagai_altdiff.sampling import SAMPLERS, Step

_HOMES = {
    "MODELS": "registry",
    "SAMPLERS": "sampling",
    "AutoLoader": "auto_loader",
    "FlagAIAltDiffError": "errors",
    "GenerationRequest": "request",
    "GenerationResult": "pipeline",
    "LatentDiffusion": "models",
    "Output": "request",
    "Predictor": "predictor",
    "Sample": "pipeline",
    "Step": "sampling",
    "add_embedding": "parts",
    "add_lora": "lora",
    "draw_to_folder": "output",
    "from_diffusers": "diffusers_bridge",
    "generate": "pipeline",
    "load_model": "loading",
    "quantize_model": "quantizing",
    "remove_loras": "lora",
    "stream": "pipeline",
    "to_diffusers": "diffusers_bridge",
    "use_vae": "parts",
}
"""Public name -> the module that has it."""

__all__ = [
    "MODELS",
    "SAMPLERS",
    "AutoLoader",
    "FlagAIAltDiffError",
    "GenerationRequest",
    "GenerationResult",
    "LatentDiffusion",
    "Output",
    "Predictor",
    "Sample",
    "Step",
    "add_embedding",
    "add_lora",
    "draw_to_folder",
    "from_diffusers",
    "generate",
    "load_model",
    "quantize_model",
    "remove_loras",
    "stream",
    "to_diffusers",
    "use_vae",
]


_FOR_DIFFUSERS = ("MultilingualRobertaEncoder", "PreTrainedModel")
"""What diffusers asks this package for when it opens a folder whose text encoder is from here."""


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> object:
    if name in _FOR_DIFFUSERS:
        return getattr(import_module(f"{__name__}.diffusers_bridge"), name)
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
