"""One step of the UNet with guidance; one picture of the decoder."""

from __future__ import annotations

from functools import partial

import torch

from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.models import LatentDiffusion
from tests.benchmarks.frame import Row, compare
from tests.benchmarks.sides import SIDES, engines
from tests.counting import flop


def unet_step(model: LatentDiffusion, name: str, side_px: int, rounds: int, sides: tuple[str, ...] = SIDES) -> Row:
    """A step of one picture: the text's keys and values are there already, as in all steps but the first.

    Args:
        model: What is run.
        name: Key of the row.
        side_px: Height and width of the picture.
        rounds: That count.
        sides: Who takes part.
    """
    plain = EagerEngine(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, *plain.latent_shape(side_px, side_px), generator=generator)
    t, cond = torch.tensor([500]), torch.randn(2, 77, model.config.unet.context_dim, generator=generator)
    works = {side: partial(engine.denoise, x, t, cond) for side, engine in engines(model, sides).items()}
    what = f"UNet step with guidance, {side_px} px"
    return compare(name, what, works, rounds=rounds, flop=flop(partial(plain.denoise, x, t, cond)))


def decoding(model: LatentDiffusion, name: str, side_px: int, rounds: int, sides: tuple[str, ...] = SIDES) -> Row:
    """A latent as a picture. Arguments as above."""
    plain = EagerEngine(model)
    latents = torch.randn(1, *plain.latent_shape(side_px, side_px), generator=torch.Generator().manual_seed(1))
    works = {side: partial(engine.decode, latents) for side, engine in engines(model, sides).items()}
    return compare(name, f"decoding to {side_px} px", works, rounds=rounds, flop=flop(partial(plain.decode, latents)))
