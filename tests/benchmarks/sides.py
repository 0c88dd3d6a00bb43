"""Who is compared: our engines, and diffusers with the same weights in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.diffusers_bridge import to_diffusers
from flagai_altdiff.engine import EagerEngine, Engine, PackedEngine
from flagai_altdiff.engine.openvino import OpenVinoEngine
from flagai_altdiff.models import LatentDiffusion

ENGINES: dict[str, Callable[[LatentDiffusion], Engine]] = {
    "eager": EagerEngine,
    "packed": PackedEngine,
    "openvino": OpenVinoEngine,
}
"""OpenVINO runs our UNet and decoder; it makes the same graph of diffusers'."""
DIFFUSERS = "diffusers"
SIDES = (*ENGINES, DIFFUSERS)


class Diffusers:
    """diffusers' own modules as an engine: eager, with its default attention (PyTorch's fused one).

    Args:
        model: Whose weights they share.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.pipeline: Any = to_diffusers(model)
        # FlagAI's grid of timesteps: every so many, from the first one on.
        self.pipeline.scheduler.register_to_config(timestep_spacing="leading", steps_offset=1, set_alpha_to_one=False)
        self.pipeline.set_progress_bar_config(disable=True)
        self._scale_factor = model.scale_factor

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """As its pipeline does it: both halves of guidance in a batch."""
        times = len(cond) // len(x)
        found = self.pipeline.unet(torch.cat([x] * times), t[0], encoder_hidden_states=cond, return_dict=False)
        return found[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> images."""
        return self.pipeline.vae.decode(latents / self._scale_factor, return_dict=False)[0]


def engines(model: LatentDiffusion, names: tuple[str, ...] = SIDES) -> dict[str, Any]:
    """What runs a model, by name."""
    return {name: ENGINES[name](model) if name in ENGINES else Diffusers(model) for name in names}
