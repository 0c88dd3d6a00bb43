"""Pictures on a GPU: ours as it is and compiled, beside diffusers as it is and compiled, on one card in one run.

    python -m tests.benchmarks.gpu                        512 px, 50 DDIM steps, guidance; one picture and eight
    python -m tests.benchmarks.gpu --device cpu --tiny    the same program in seconds, without a card

First it counts what a step must compute and move and measures what the card can do, so that seconds can be judged. The
text's states are given on both sides. diffusers compiled has the settings that its documentation gives for speed:
channels last, fused projections, max-autotune over the whole graph, and the inductor's options of that page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.engine import EagerEngine, Engine
from flagai_altdiff.engine.compiled import CompiledEngine
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.sampling import SAMPLERS
from flagai_altdiff.sampling.guidance import Guidance
from tests import tiny
from tests.benchmarks import models
from tests.benchmarks.frame import compare, save, table, timed
from tests.benchmarks.sides import Diffusers
from tests.counting import counted, flop, size_bytes

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 7.5
DIFFUSERS_OPTIONS = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "epilogue_fusion": False,
    "coordinate_descent_check_all_directions": True,
}
"""Of ``torch._inductor.config``, from diffusers' page on torch.compile."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, 64 px, two steps")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[*PRECISIONS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="pictures at once (default: 1 8)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --device cpu --tiny shows that the program runs")
    side_px, steps = (64, 2) if args.tiny else (512, 50)
    rows = []
    for precision in args.precisions:
        dtype = PRECISIONS[precision]
        model = (tiny.fresh_model("m18").eval() if args.tiny else models.full_size()).to(device, dtype)
        for batch in args.batches:
            name = f"gpu-{precision}-{batch}"
            about = {**card(device, dtype), **limits(model, batch, side_px)}
            works = sides(model, batch, side_px, steps, args.backend)
            row = compare(name, f"{batch} x {side_px} px, {steps} steps, {precision}", works, rounds=args.rounds)
            row.flop = steps * about["flop"]
            row.machine |= about
            rows.append(row)
            save([row], args.out)
    print(table(rows))
    for row in rows:
        floor = row.flop / row.machine["card_flops"]
        shares = ", ".join(f"{side} {floor / own.median:.0%}" for side, own in row.sides.items())
        print(f"{row.what}: {floor:.3f} s at the card's matrix rate; of it {shares}")
    return 0


def sides(
    model: LatentDiffusion, batch: int, side_px: int, steps: int, backend: str
) -> dict[str, Callable[[], Tensor]]:
    """Four ways to draw the same pictures."""
    device, generator = model.device, torch.Generator().manual_seed(1)
    shape = EagerEngine(model).latent_shape(side_px, side_px)
    noise = torch.randn(batch, *shape, generator=generator).to(device)
    states = torch.randn(2, batch, 77, model.config.unet.context_dim, generator=generator).to(device)
    plain, tuned = Diffusers(model), compiled_diffusers(model, backend)
    options = torch._inductor.config.patch(DIFFUSERS_OPTIONS)
    return {
        "eager": partial(ours, EagerEngine(model), noise, states, steps),
        "compile": partial(ours, CompiledEngine(model, backend), noise, states, steps),
        "diffusers": partial(theirs, plain, noise, states, steps, side_px, nullcontext()),
        "diffusers compiled": partial(theirs, tuned, noise, states, steps, side_px, options),
    }


def ours(engine: Engine, noise: Tensor, states: Tensor, steps: int) -> Tensor:
    """By DDIM, from noise to pictures."""
    uncond, cond = states
    guidance = Guidance(cond, uncond, SCALE, engine.alphas_cumprod, engine.parameterization)
    *_, last = SAMPLERS["ddim"].walk(
        partial(guidance.eps, engine.denoise),
        noise,
        engine.schedule(steps),
        noise=lambda: torch.zeros_like(noise),
        eta=0.0,
    )
    return _done(engine.decode(last.x).clamp(-1, 1))


def theirs(
    diffusers: Diffusers, noise: Tensor, states: Tensor, steps: int, side_px: int, options: AbstractContextManager[Any]
) -> Tensor:
    """The same by diffusers' pipeline."""
    dtype = diffusers.pipeline.unet.dtype
    with options:
        found = diffusers.pipeline(
            prompt_embeds=states[1].to(dtype), negative_prompt_embeds=states[0].to(dtype), latents=noise.to(dtype),
            height=side_px, width=side_px, num_inference_steps=steps, guidance_scale=SCALE, output_type="pt",
        ).images  # fmt: skip
    return _done(2 * found.float() - 1)


def compiled_diffusers(model: LatentDiffusion, backend: str) -> Diffusers:
    """With what its documentation recommends."""
    made = Diffusers(model)
    pipeline = made.pipeline
    pipeline.fuse_qkv_projections()
    settings: dict[str, Any] = {"mode": "max-autotune"} if backend == "inductor" and model.device.type == "cuda" else {}
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    pipeline.unet = torch.compile(pipeline.unet, fullgraph=True, backend=backend, **settings)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, fullgraph=True, backend=backend, **settings)
    return made


def limits(model: LatentDiffusion, batch: int, side_px: int) -> dict[str, float]:
    """What a step with guidance must do: operations, bytes of weights, and bytes if every operation went to memory."""
    from copy import deepcopy

    engine = EagerEngine(deepcopy(model).to("meta"))
    shape = engine.latent_shape(side_px, side_px)
    x, t = torch.zeros(batch, *shape, device="meta"), torch.zeros(batch, device="meta")
    cond = torch.zeros(2 * batch, 77, model.config.unet.context_dim, device="meta")
    work = partial(engine.denoise, x, t, cond)
    weights = sum(map(size_bytes, model.model.parameters()))
    return {"flop": float(flop(work)), "weight_bytes": float(weights), "moved_bytes": float(counted(work).moved_bytes)}


def card(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the card can do just now: matrix products of the precision, and bytes read and written."""
    size = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    copied = torch.empty(size * size * 4, dtype=torch.uint8, device=device)
    product_s = min(timed(lambda: _done(a @ b))[0] for _ in range(6))
    copy_s = min(timed(lambda: _done(copied.clone()))[0] for _ in range(6))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"card": name, "card_flops": 2 * size**3 / product_s, "card_bytes": 2 * copied.numel() / copy_s}


def _done(tensor: Tensor) -> Tensor:
    """The same, once the card has made it."""
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
    return tensor


if __name__ == "__main__":
    raise SystemExit(main())
