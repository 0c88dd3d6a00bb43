"""Drawing into a picture: what is outside the mask stays on its way to the picture, whatever the sampler does.

**Source**: Lugmayr et al. 2022 (arXiv 2201.09865) for keeping the known part; here in the prediction, not in the
latent, so that every sampler can do it, those with fresh noise too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flagai_altdiff.sampling.step import EpsFunction

if TYPE_CHECKING:
    from torch import Tensor

    from flagai_altdiff.sampling.levels import NoiseLevels


def masked(eps: EpsFunction, clean: Tensor, mask: Tensor, levels: NoiseLevels) -> EpsFunction:
    """A noise prediction that leads to the picture outside a mask.

    Args:
        eps: The model's prediction.
        clean: (1, C, h, w), the picture's latent.
        mask: (1, 1, h, w), 1 where something new is drawn, 0 where the picture stays.
        levels: Of the model.
    """

    def predict(x: Tensor, t: float) -> Tensor:
        alpha = levels.alpha(t)
        known = (x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
        return mask * eps(x, t) + (1 - mask) * known

    return predict
