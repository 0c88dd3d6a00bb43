"""Samplers: functions that walk a latent from noise to image. No model, no files; torch is needed only to call them.

A sampler is a generator ``name(eps, x, schedule, *, noise, ...)`` that yields one :class:`Step` per step. ``eps(x, t)``
is the (guided) noise prediction; ``noise()`` draws a standard normal of the latent's shape. To add one, write its
module and a line in ``SAMPLERS``: requests, the command line and the images' records follow.
"""

from __future__ import annotations

from flagai_altdiff.sampling.ddim import ddim
from flagai_altdiff.sampling.dpm_solver import dpmpp_2m
from flagai_altdiff.sampling.euler import euler_ancestral
from flagai_altdiff.sampling.plms import plms
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Sampler, SamplerSpec, Step

SAMPLERS: dict[str, SamplerSpec] = {
    "ddim": SamplerSpec(ddim, "DDIM", takes_eta=True),
    "plms": SamplerSpec(plms, "PLMS"),
    "dpmpp_2m": SamplerSpec(dpmpp_2m, "DPM++ 2M"),
    "euler_ancestral": SamplerSpec(euler_ancestral, "Euler a"),
}
"""Every sampler by its name in requests."""

__all__ = ["SAMPLERS", "EpsFunction", "NoiseFunction", "Sampler", "SamplerSpec", "Step"]
