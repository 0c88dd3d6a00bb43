"""A picture as the beginning of a drawing: its latent, what of it is drawn anew, and how the result is put back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from flagai_altdiff.engine import Engine
from flagai_altdiff.engine.tiles import encode_in_tiles
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.pictures import area_around, composed, extended, fitted, margins_of, mask_of, on_ground, softened
from flagai_altdiff.request import ResolvedRequest
from flagai_altdiff.sampling.levels import NoiseLevels
from flagai_altdiff.sampling.masked import masked
from flagai_altdiff.sampling.schedule import add_noise
from flagai_altdiff.sampling.step import EpsFunction


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A picture at the size of a drawing, and its place in the finished image.

    Args:
        near: What the drawing begins with, at its size.
        mask: Of the same size, white where something new is drawn; ``None`` where that is everywhere.
        given: The picture around what is drawn, at the size of a finished image; ``None`` where nothing of it stays.
        share: How much of each pixel of the drawn part is new, (H, W).
        box: Left, top, right and bottom of the drawn part in the picture.
    """

    near: Image.Image
    mask: Image.Image | None = None
    given: Image.Image | None = None
    share: NDArray[np.float32] | None = None
    box: tuple[int, int, int, int] | None = None

    def finish(self, drawn: Image.Image) -> Image.Image:
        """A drawn image within the picture; outside the mask its pixels are the picture's."""
        if self.given is None or self.share is None or self.box is None:
            return drawn
        left, top, right, bottom = self.box
        wanted = (right - left, bottom - top)
        if drawn.size != wanted:
            larger = drawn.width >= wanted[0] and drawn.height >= wanted[1] and self.box == (0, 0, *self.given.size)
            drawn = drawn.crop((0, 0, *wanted)) if larger else drawn.resize(wanted, Image.Resampling.LANCZOS)
        whole = self.given.copy()
        whole.paste(composed(self.given.crop(self.box), drawn, self.share), (left, top))
        return whole


@lru_cache(maxsize=2)
def make_frame(request: ResolvedRequest) -> Frame | None:
    """The frame of a request; ``None`` where it begins with noise alone. Made once for the checks and the drawing.

    Raises:
        InvalidRequestError: Of the mask nothing is left at this size, or within its soft edge.
    """
    if request.init_image is None:
        return None
    picture, mask = _picture(request)
    size = (request.width, request.height)
    if mask is None:
        return Frame(near=fitted(picture, size, request.fit, request.ground))
    if request.mask_full_resolution:
        box = area_around(mask, request.mask_padding, request.width / request.height)
        near, near_mask = (image.crop(box).resize(size, Image.Resampling.LANCZOS) for image in (picture, mask))
        share = softened(mask, request.mask_feather)[box[1] : box[3], box[0] : box[2]]
        given = picture
    elif request.final_size == picture.size:  # drawn with a margin, or smaller: what stays is the picture's own
        near, near_mask = (_at(image, size) for image in (picture, mask))
        share, given, box = softened(mask, request.mask_feather), picture, (0, 0, *picture.size)
    else:
        near, near_mask = (fitted(image, size, request.fit, request.ground) for image in (picture, mask))
        share, given, box = softened(near_mask, request.mask_feather), near, (0, 0, *size)
    if not np.asarray(near_mask).any():
        raise InvalidRequestError("mask_image", request.mask_image, f"nothing of it is left at {size[0]}x{size[1]} px")
    if not share.any():
        raise InvalidRequestError("mask_feather", request.mask_feather, "less: the mask is narrower than its soft edge")
    return Frame(near=near, mask=near_mask, given=given, share=share, box=box)


def _at(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture or mask at the size of a drawing: with a margin that goes on with its edges, or smaller."""
    wider, higher = size[0] - image.width, size[1] - image.height
    if wider < 0 or higher < 0:
        return image.resize(size, Image.Resampling.LANCZOS if image.mode == "RGB" else Image.Resampling.BOX)
    if image.mode == "RGB":
        return extended(image, (0, 0, wider, higher))[0]
    whole = Image.new(image.mode, size)
    whole.paste(image)
    return whole


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


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What a call begins with instead of noise.

    Args:
        clean: (1, C, h, w), the picture's latent.
        mask: (1, 1, h, w), 1 where something new is drawn; ``None`` where that is everywhere.
        frame: Where the picture comes from, and where the drawing goes.
    """

    clean: Tensor
    mask: Tensor | None = None
    frame: Frame | None = None

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
        """A drawn image where it belongs."""
        return self.frame.finish(drawn) if self.frame else drawn


def make_canvas(engine: Engine, request: ResolvedRequest) -> Canvas | None:
    """The canvas of a request; ``None`` where it begins with noise alone. Errors as of :func:`make_frame`.

    Args:
        engine: Encodes the picture.
        request: What is drawn.
    """
    frame = make_frame(request)
    if frame is None:
        return None
    pixels = torch.from_numpy(np.array(frame.near)).to(engine.device)
    clean = encoded(engine, request, pixels.permute(2, 0, 1)[None].float() / 127.5 - 1)
    return Canvas(clean=clean, mask=_cells(frame.mask, clean) if frame.mask else None, frame=frame)


def encoded(engine: Engine, request: ResolvedRequest, images: Tensor) -> Tensor:
    """Latents of images, in tiles where they are drawn in windows: (B, 3, H, W) -> (B, C, h, w)."""
    tile = request.window or 0
    if not tile or tile >= max(images.shape[2:]):
        return engine.encode_image(images)
    return encode_in_tiles(engine.encode_image, images, tile=tile // engine.cell, factor=engine.cell)


def _cells(mask: Image.Image, clean: Tensor) -> Tensor:
    """The mask by latent cells: 1 where any pixel of a cell is drawn anew."""
    drawn = torch.from_numpy(np.array(mask)).to(clean.device)[None, None] > 0
    return F.adaptive_max_pool2d(drawn.float(), clean.shape[2:])
