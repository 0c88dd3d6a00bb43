"""How an image looks before it is finished: latents → a small picture, by a fit instead of the decoder."""

from __future__ import annotations

import io

import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.models import LatentDiffusion

_PATCHES, _CELLS = 8, 4
"""Colours in a row of the chart, and the latent cells that each is wide."""
_SIDE = 192
_QUALITY = 80


class Previewer:
    """Shows latents of a model; a thousandth of the decoder's work, and as coarse as latents are.

    A cell's colour is close to a quadratic function of its latent. It is fitted when the model is loaded, to a chart of
    colours that the model encodes.

    Args:
        model: The model.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        engine = EagerEngine(model)
        colours = (torch.rand(1, 3, _PATCHES, _PATCHES, generator=torch.Generator().manual_seed(0)) * 3 - 1.5).clamp(
            -1, 1
        )
        cells = colours.repeat_interleave(_CELLS, 2).repeat_interleave(_CELLS, 3)
        chart = cells.repeat_interleave(engine.cell, 2).repeat_interleave(engine.cell, 3)
        with torch.no_grad():
            found = _terms(engine.encode_image(chart.to(engine.device)).cpu())
        self._matrix = torch.linalg.lstsq(found.flatten(0, 2), cells.movedim(1, -1).flatten(0, 2)).solution

    def jpeg(self, latents: Tensor) -> bytes:
        """Latents, (B, C, h, w), as pictures side by side in one JPEG."""
        colours = _terms(latents.detach().float().cpu()) @ self._matrix
        rows = ((colours + 1) * 127.5).clamp(0, 255).byte()
        image = Image.fromarray(torch.cat(list(rows), 1).numpy())
        larger = max(1, _SIDE // rows.shape[1])
        image = image.resize((image.width * larger, image.height * larger), Image.Resampling.BICUBIC)
        written = io.BytesIO()
        image.save(written, "JPEG", quality=_QUALITY)
        return written.getvalue()


def _terms(latents: Tensor) -> Tensor:
    """(B, C, h, w) → (B, h, w, 1 + C + C²): the terms of a quadratic function."""
    x = latents.movedim(1, -1)
    return torch.cat([torch.ones_like(x[..., :1]), x, (x[..., None] * x[..., None, :]).flatten(-2)], -1)
