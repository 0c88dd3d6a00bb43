"""nn.Modules whose attribute names are the keys of the released checkpoints.

Tensor letters: B batch, C channels, H W pixels, h w latent cells (H/f, W/f), L tokens (77), D width, T schedule length.
"""

from __future__ import annotations

from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.models.latent_diffusion import LatentDiffusion

__all__ = ["LatentDiffusion", "build_model"]


def build_model(config: LatentDiffusionConfig) -> LatentDiffusion:
    """A model with freshly initialised weights (build it under ``torch.device("meta")`` to have none).

    Args:
        config: Sizes and schedule.
    """
    return LatentDiffusion(config)
