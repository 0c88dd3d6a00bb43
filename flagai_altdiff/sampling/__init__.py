"""Samplers: functions that walk a latent from noise to picture. torch only, no model, no files.

A sampler is a generator ``name(eps, x, schedule, *, noise, ...)`` that yields one :class:`Step` per step. ``eps(x, t)`` is the
(guided) noise prediction; ``noise()`` draws a standard normal of the latent's shape. To add one, write its module and a line
in ``SAMPLERS`` (and its name in ``request.SAMPLER_NAMES``).
"""

from __future__ import annotations

from flagai_altdiff.sampling.ddim import ddim
from flagai_altdiff.sampling.dpm_solver import dpmpp_2m
from flagai_altdiff.sampling.euler import euler_ancestral
from flagai_altdiff.sampling.plms import plms
from flagai_altdiff.sampling.step import EpsFunction, NoiseFunction, Sampler, Step

SAMPLERS: dict[str, Sampler] = {
    "ddim": ddim,
    "plms": plms,
    "dpmpp_2m": dpmpp_2m,
    "euler_ancestral": euler_ancestral,
}

__all__ = ["SAMPLERS", "EpsFunction", "NoiseFunction", "Sampler", "Step"]
