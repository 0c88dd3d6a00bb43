"""The model itself, module by module: the reference for every other engine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from flagai_altdiff.config import AutoencoderConfig
from flagai_altdiff.errors import NotFiniteError
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.latent_diffusion import dtype_of
from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from flagai_altdiff.sampling.schedule import Schedule, make_betas, schedule_buffers

MAP_BYTES = 32 << 20
"""Of the decoder's maps on a processor: more at once takes memory, and no less time."""

logger = logging.getLogger(__name__)


class EagerEngine:
    """Runs a model where and as it is; on a GPU in its ``autocast_dtype``, if it has one.

    Args:
        model: The model.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        config = model.config
        betas = make_betas(
            config.beta_schedule, config.timesteps, config.linear_start, config.linear_end, config.cosine_s
        )
        # Not the model's buffers: model.half() rounds them.
        self.alphas_cumprod = schedule_buffers(betas)["alphas_cumprod"]
        self.parameterization = model.parameterization
        self.device = model.device
        self.cell = config.first_stage.downsampling

    def schedule(self, steps: int, grid: str = "flagai") -> Schedule:
        """A walk along a grid of timesteps."""
        return Schedule.make(self.alphas_cumprod, steps, grid)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of an image's latent, from its size in px."""
        return self.model.channels, height // self.cell, width // self.cell

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        return self.model.cond_stage_model(token_ids).float()

    def denoise(self, x: Tensor, t: Tensor, cond: Tensor, shortcuts: Shortcuts = NONE) -> Tensor:
        """(B, C, h, w), (B,), (n B, L, D) -> (n B, C, h, w)."""
        times = len(cond) // len(x)
        with self._autocast():
            return self.model.apply_model(x.repeat(times, 1, 1, 1), t.repeat(times), cond, *shortcuts.arguments).float()

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, h, w)."""
        with self._autocast():
            return self.model.get_first_stage_encoding(self.model.encode_first_stage(images).mode()).float()

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, 3, H, W); once more in float32 where half precision overflows."""
        images = self._in_parts(self._decoded, latents)
        if self._decodes_in_half() and not images.isfinite().all():
            logger.warning("half precision overflowed in decoding: decoding again in float32")
            images = self._decoded_in_full(latents)
        if not images.isfinite().all():
            raise NotFiniteError(
                "decoding gave NaN or infinite values. Are the autoencoder's weights whole? "
                "In half precision, try float32."
            )
        return images.float()

    def _decoded(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self.model.decode_first_stage(latents)

    def _decodes_in_half(self) -> bool:
        is_cast = torch.is_autocast_enabled(self.device.type) or (
            self.model.autocast_dtype and self.device.type == "cuda"
        )
        return bool(is_cast) or dtype_of(self.model.first_stage_model) != torch.float32

    def _decoded_in_full(self, latents: Tensor) -> Tensor:
        part, scale = self.model.first_stage_model, self.model.scale_factor
        if dtype_of(part) != torch.float32 and self.model.memory == "normal":
            part = copy.deepcopy(part).float()
        with torch.autocast(self.device.type, enabled=False):
            return self._in_parts(lambda some: part.decode((some.float() / scale).to(dtype_of(part))), latents)

    def _in_parts(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        """As many images at once as memory is planned for."""
        count, _, height, width = latents.shape
        sizes = self.model.first_stage_model.config
        at_once = images_at_once(sizes, height * width) if self.device.type == "cpu" else count
        return torch.cat([decode(some) for some in torch.split(latents, at_once)])

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self.model.autocast_dtype
        return torch.autocast("cuda", dtype) if dtype and self.device.type == "cuda" else nullcontext()


def images_at_once(sizes: AutoencoderConfig, cells: int) -> int:
    """How many images a processor decodes together.

    Args:
        sizes: Of the decoder.
        cells: Of an image's latent.
    """
    widest = torch.float32.itemsize * sizes.ch * max(sizes.ch_mult[:2]) * cells * sizes.downsampling**2
    return max(MAP_BYTES // widest, 1)
