"""Samplers: functions that walk a latent from noise to image. No model, no files; torch is needed only to call them.

A sampler is a generator ``name(eps, x, schedule, *, noise, ...)`` that yields one :class:`Step` per step. ``eps(x, t)``
is the (guided) noise prediction; ``noise()`` draws a standard normal of the latent's shape. To add one, write its
module and a line in ``SAMPLERS``: requests, the command line and the images' records follow.
"""

from __future__ import annotations

from flagai_altdiff.sampling.ddim import ddim
from flagai_altdiff.sampling.dpm_solver import dpm2, dpmpp_2m, dpmpp_2m_sde, dpmpp_sde
from flagai_altdiff.sampling.euler import euler, euler_ancestral, heun
from flagai_altdiff.sampling.lcm import lcm
from flagai_altdiff.sampling.plms import plms
from flagai_altdiff.sampling.step import GRIDS, EpsFunction, NoiseFunction, Sampler, SamplerSpec, Step
from flagai_altdiff.sampling.unipc import unipc

SAMPLERS: dict[str, SamplerSpec] = {
    "ddim": SamplerSpec(ddim, "DDIM", takes_eta=True),
    "plms": SamplerSpec(plms, "PLMS", order=2),
    "euler": SamplerSpec(euler, "Euler"),
    "euler_ancestral": SamplerSpec(euler_ancestral, "Euler a", is_random=True),
    "heun": SamplerSpec(heun, "Heun", order=2),
    "dpm2": SamplerSpec(dpm2, "DPM2", order=2),
    "dpmpp_2m": SamplerSpec(dpmpp_2m, "DPM++ 2M", order=2),
    "dpmpp_sde": SamplerSpec(dpmpp_sde, "DPM++ SDE", is_random=True),
    "dpmpp_2m_sde": SamplerSpec(dpmpp_2m_sde, "DPM++ 2M SDE", is_random=True),
    "unipc": SamplerSpec(unipc, "UniPC", order=2),
    "lcm": SamplerSpec(lcm, "LCM", is_random=True, order=0),
}
"""Every sampler by its name in requests."""

_OTHER_NAMES = {
    "uni_pc": "unipc",
    "uni_pc_bh2": "unipc",
    "dpm_2": "dpm2",
    "euler a": "euler_ancestral",
    "euler_a": "euler_ancestral",
    "dpmpp_2m_sde_gpu": "dpmpp_2m_sde",
    "dpmpp_sde_gpu": "dpmpp_sde",
}


def find_sampler(name: str) -> tuple[str, str | None] | None:
    """Our names of a sampler and of the grid that its name may end with; ``None`` for a sampler that is not here.

    Args:
        name: Ours, A1111's, ComfyUI's or InvokeAI's, as in ``"DPM++ 2M Karras"`` or ``"k_euler_a"``.
    """
    plain = " ".join(name.split()).casefold()
    known = {key: key for key in SAMPLERS} | {spec.title.casefold(): key for key, spec in SAMPLERS.items()}
    for grid in (None, *GRIDS):
        own = plain if grid is None else plain.removesuffix(f" {grid}").removesuffix(f"_{grid}")
        own = own.removeprefix("k_")
        is_named = grid is None or own != plain.removeprefix("k_")
        if is_named and (found := known.get(own) or _OTHER_NAMES.get(own)):
            return found, grid
    return None


__all__ = ["GRIDS", "SAMPLERS", "EpsFunction", "NoiseFunction", "Sampler", "SamplerSpec", "Step", "find_sampler"]
