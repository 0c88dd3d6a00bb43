"""A picture as the beginning of a drawing: its latent, what of it is drawn anew, and how the result is put back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from flagai_altdiff.engine import Engine
from flagai_altdiff.pictures import area_around, composed, extended, fitted, margins_of, mask_of, on_ground, softened
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling.levels import NoiseLevels
from flagai_altdiff.sampling.masked import masked
from flagai_altdiff.sampling.schedule import add_noise
from flagai_altdiff.sampling.step import EpsFunction


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What a call begins with instead of noise.

    Args:
        clean: (1, C, h, w), the picture's latent.
        mask: (1, 1, h, w), 1 where something new is drawn; ``None`` where that is everywhere.
        given: The picture around what is drawn, at the size of a finished image; ``None`` where nothing of it stays.
        share: How much of each pixel of the drawn part is new, (H, W).
        box: Left, top, right and bottom of the drawn part in the picture.
    """

    clean: Tensor
    mask: Tensor | None = None
    given: Image.Image | None = None
    share: NDArray[np.float32] | None = None
    box: tuple[int, int, int, int] | None = None

    def begin(self, noise: Tensor, alpha: float, *, anew: bool) -> Tensor:
        """The picture under noise.

        Args:
            noise: (B, C, h, w).
            alpha: Signal power to begin with.
            anew: Whether nothing of the picture is to shimmer through where something new is drawn.
        """
        begun = add_noise(self.clean, noise, alpha)
        return torch.lerp(begun, noise, self.mask) if anew and self.mask is not None else begun

    def guide(self, eps: EpsFunction, levels: NoiseLevels) -> EpsFunction:
        """A prediction that leaves alone what is not drawn anew."""
        return eps if self.mask is None else masked(eps, self.clean, self.mask, levels)

    def finish(self, drawn: Image.Image) -> Image.Image:
        """A drawn image within the picture; outside the mask its pixels are the picture's."""
        if self.given is None or self.share is None or self.box is None:
            return drawn
        left, top, right, bottom = self.box
        if drawn.size != (right - left, bottom - top):
            drawn = drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole = self.given.copy()
        whole.paste(composed(self.given.crop(self.box), drawn, self.share), (left, top))
        return whole


def make_canvas(engine: Engine, request: ResolvedRequest) -> Canvas | None:
    """The canvas of a request; ``None`` where it begins with noise alone.

    Args:
        engine: Encodes the picture.
        request: What is drawn.
    """
    if request.init_image is None:
        return None
    picture, mask = _picture(request)
    size = (request.width, request.height)
    if mask is None:
        return Canvas(clean=_encoded(engine, fitted(picture, size, request.fit, request.ground)))
    if request.mask_full_resolution:
        box = area_around(mask, request.mask_padding, request.width / request.height)
        share = softened(mask, request.mask_feather)[box[1] : box[3], box[0] : box[2]]
        near, near_mask = (image.crop(box).resize(size, Image.Resampling.LANCZOS) for image in (picture, mask))
        given = picture
    else:
        given, near_mask = (fitted(image, size, request.fit, request.ground) for image in (picture, mask))
        share, near, box = softened(near_mask, request.mask_feather), given, (0, 0, *size)
    clean = _encoded(engine, near)
    return Canvas(clean=clean, mask=_cells(near_mask, clean), given=given, share=share, box=box)


def _picture(request: ResolvedRequest) -> tuple[Image.Image, Image.Image | None]:
    """The picture with its margins, and the mask of all that is drawn anew."""
    assert request.init_image is not None
    picture = on_ground(request.init_image, request.ground)
    mask = mask_of(request.init_image, request.mask_image) if request.mask_image is not None else None
    if not request.outpaint:
        return picture, mask
    margins = margins_of(request.outpaint)
    wider, around = extended(picture, margins)
    if mask is not None:
        inner = Image.new("L", wider.size)
        inner.paste(mask, margins[:2])
        around = ImageChops.lighter(around, inner)
    return wider, around


def _encoded(engine: Engine, image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).to(engine.device)
    return engine.encode_image(pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)


def _cells(mask: Image.Image, clean: Tensor) -> Tensor:
    """The mask by latent cells: 1 where any pixel of a cell is drawn anew."""
    hard = torch.from_numpy(np.array(mask)).to(clean.device)[None, None] > 127
    return F.adaptive_max_pool2d(hard.float(), clean.shape[2:])
