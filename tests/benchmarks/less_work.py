"""What less work saves and costs: ``python -m tests.benchmarks.less_work``, or ``make bench-less``.

Draws with the embedded model in every way, in turn, and writes two tables into docs/performance.md: time, accuracy as
the project's own judge sees it and distance to the picture of 50 steps; and, counted for a released model at full size,
what is left of the multiplications and of the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from flagai_altdiff import generate, load_model
from flagai_altdiff.evaluation.intervals import estimate
from flagai_altdiff.mini.accuracy import Question, questions
from flagai_altdiff.mini.judge import SEEN, load_judge, looked_at, right_answers, see
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.attention import SpatialTransformer
from flagai_altdiff.models.quantized import PRECISIONS, fold
from flagai_altdiff.models.shortcuts import NONE, Shortcuts
from tests.benchmarks.models import M18
from tests.benchmarks.page import write_chapter

CHAPTER = "less work"
SEED = 7
LANGUAGES = ("en", "zh", "ar", "ru")
ASKED = ("ground", "size and place")
REPLICATES = 1000
MERGED = (0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to draw with less work.

    Args:
        label: What it is called.
        options: Of a request.
        quantize: As of ``load_model``.
        times_of: The way whose time it is compared with.
    """

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    times_of: str = "50 steps of DDIM"


WAYS = (
    Way(label="50 steps of DDIM"),
    Way(label="20 steps of DDIM", options={"steps": 20}),
    Way(label="DPM-Solver++ 2M, 20 steps", options={"sampler": "dpmpp_2m", "steps": 20}),
    Way(label="DPM-Solver++ 2M, 15 steps", options={"sampler": "dpmpp_2m", "steps": 15}),
    Way(label="`cache_interval=2`", options={"cache_interval": 2}),
    Way(label="`cache_interval=3`", options={"cache_interval": 3}),
    Way(label="`cache_interval=5`", options={"cache_interval": 5}),
    Way(label='`guidance_interval="0.1-0.8"`', options={"guidance_interval": "0.1-0.8"}),
    Way(label='`guidance_interval="0.2-0.9"`', options={"guidance_interval": "0.2-0.9"}),
    Way(label="`token_merging=0.25`", options={"token_merging": 0.25}),
    Way(label="`token_merging=0.5`", options={"token_merging": 0.5}),
    Way(
        label='2M, 20 steps, `cache_interval=2`, `guidance_interval="0.1-0.8"`',
        options={"sampler": "dpmpp_2m", "steps": 20, "cache_interval": 2, "guidance_interval": "0.1-0.8"},
    ),
    Way(label="the eager engine", options={"engine": "eager"}),
    Way(label="`int8`", options={"engine": "eager"}, quantize="int8", times_of="the eager engine"),
    Way(label="`int4`", options={"engine": "eager"}, quantize="int4", times_of="the eager engine"),
)


@cache
def model_of(quantize: str | None) -> LatentDiffusion:
    return load_model("AltDiffusion-mini", quantize=quantize)


def draw(way: Way, prompts: Sequence[str]) -> list[Any]:
    """The images of prompts."""
    options = {"steps": 50, "sampler": "ddim", "seed": SEED, "batch_size": min(len(prompts), 20), **way.options}
    return generate(model_of(way.quantize), prompts, **options).images


def times(rounds: int) -> dict[str, list[float]]:
    """Seconds of four images in each way, round by round, so that what else the machine does meets all of them."""
    prompts = [question.prompt for question in asked(4)][:4]
    for kind, engine in {(way.quantize, way.options.get("engine", "auto")) for way in WAYS}:
        draw(Way(label="", options={"engine": engine, "steps": 5}, quantize=kind), prompts)
    found: dict[str, list[float]] = {way.label: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            began = time.perf_counter()
            draw(way, prompts)
            found[way.label].append(time.perf_counter() - began)
    return found


def transformer_times(rounds: int) -> dict[str, list[float]]:
    """Seconds of the outermost transformer of AltDiffusion-m18 in a guided step at 512 px, by the share of tokens."""
    sizes = M18.unet
    width, heads = sizes.model_channels, sizes.heads(sizes.model_channels)
    block = SpatialTransformer(width, heads, width // heads, 1, sizes.context_dim, True, sizes.norm_groups).eval()
    x, context = torch.randn(2, width, 64, 64), torch.randn(2, 77, sizes.context_dim)
    found: dict[str, list[float]] = {f"{share:g}": [] for share in (0.0, *MERGED)}
    with torch.no_grad():
        for number in range(rounds + 1):
            for share, own in found.items():
                began = time.perf_counter()
                block(x, context, float(share))
                if number:  # the first round warms up
                    own.append(time.perf_counter() - began)
    return found


def asked(count: int) -> list[Question]:
    """So many questions of each kind, in several languages."""
    things = known_things()
    return [
        question
        for kind in ASKED
        for language in LANGUAGES
        for question in questions(kind, things, language, -(-count // len(LANGUAGES)))
    ]


def pictures(count: int) -> dict[str, dict[str, Any]]:
    """Of each way what the judge saw of what was asked for, and how far its pictures are from those of the first."""
    own = asked(count)
    drawn = ((way, draw(way, [question.prompt for question in own])) for way in WAYS)
    first: list[Any] = []
    found = {}
    for way, images in drawn:
        first = first or images
        found[way.label] = judged(own, images, first)
    return found


def judged(own: Sequence[Question], images: Sequence[Any], first: Sequence[Any]) -> dict[str, list[float]]:
    """Of each picture the share of what was asked for that is right, and its distance to another, in dB."""
    wanted = torch.tensor([right_answers(question.shown) for question in own])
    was_asked = torch.tensor([[name in question.asked for name in SEEN] for question in own])
    right = (see(load_judge(), looked_at(images)) == wanted) & was_asked
    off = [_psnr(image, reference) for image, reference in zip(images, first, strict=True)]
    return {"right": (right.sum(1) / was_asked.sum(1)).tolist(), "psnr": off}


def _psnr(image: Any, reference: Any) -> float:
    """Peak signal to noise of two pictures, in dB."""
    error = float(np.square(np.asarray(image, float) - np.asarray(reference, float)).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def table(seconds: Mapping[str, Sequence[float]], seen: Mapping[str, Mapping[str, Any]]) -> str:
    """All ways with the embedded model."""
    head = "| way | time of a picture | speed-up | right answers | distance to 50 steps of DDIM |\n"
    lines = [head + "|---|---:|---:|---:|---:|"]
    for way in WAYS:
        own, other = seconds[way.label], seconds[way.times_of]
        gain = statistics.median(b / a for a, b in zip(own, other, strict=True))
        values = torch.tensor(seen[way.label]["right"])
        share = estimate(lambda rows, v=values: v[rows].mean().item(), len(values), REPLICATES, 0, way.label)  # type: ignore[misc]
        half = 0.0 if share.low is None or share.high is None else (share.high - share.low) / 2
        psnr = statistics.median(seen[way.label]["psnr"])
        lines.append(
            f"| {way.label} | {statistics.median(own) / 4 * 1000:.0f} ms | {gain:.2f} | "
            f"{100 * share.value:.1f} ± {100 * half:.1f} % | {'—' if math.isinf(psnr) else f'{psnr:.0f} dB'} |"
        )
    return "\n".join(lines)


def multiplications(side: int, shortcuts: Shortcuts, rows: int = 2) -> int:
    """Of one step of AltDiffusion-m18 on a latent of that side, counted without computing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        unet = build_model(M18).model.diffusion_model
        unet(torch.empty(rows, 4, side, side), torch.zeros(rows), torch.empty(rows, 77, 1024), shortcuts)
    return counter.get_total_flops() // 2


def counted(seconds: Mapping[str, Sequence[float]]) -> str:
    """What is left of the work of AltDiffusion-m18 at two sizes, and of the time of its outermost transformer."""
    sides = (64, 96)
    whole = {side: multiplications(side, NONE) for side in sides}

    shares: dict[str, list[float]] = {}
    for side in sides:
        known = torch.empty(2, M18.unet.model_channels, side, side, device="meta")
        cached = multiplications(side, Shortcuts(inner=lambda rows, compute, kept=known: kept)) / whole[side]  # type: ignore[misc]
        single = multiplications(side, NONE, rows=1) / whole[side]
        for interval in (2, 3, 5):
            name = f"`cache_interval={interval}`"
            shares.setdefault(name, []).append((1 + (interval - 1) * cached) / interval)
        shares.setdefault('`guidance_interval="0.1-0.8"`', []).append(0.7 + 0.3 * single)
        for share in MERGED:
            left = multiplications(side, Shortcuts(merged_tokens=share)) / whole[side]
            shares.setdefault(f"`token_merging={share:g}`", []).append(left)
    plain = seconds["0"]
    spent = {
        f"`token_merging={share:g}`": statistics.median(
            a / b for a, b in zip(seconds[f"{share:g}"], plain, strict=True)
        )
        for share in MERGED
    }
    head = "| way | multiplications at 512 px | at 768 px | time of the outermost transformer at 512 px |\n"
    lines = [head + "|---|---:|---:|---:|"]
    for name, (small, large) in shares.items():
        timed = f"{100 * spent[name]:.0f} %" if name in spent else "—"
        lines.append(f"| {name} | {100 * small:.0f} % | {100 * large:.0f} % | {timed} |")
    return "\n".join(lines)


def memory() -> str:
    """Bytes of the weights of both models, as they are kept."""
    lines = ["| weights of UNet and text encoder | AltDiffusion-mini | AltDiffusion-m18 |\n|---|---:|---:|"]
    for kind in (None, *PRECISIONS):
        with torch.device("meta"):
            large = build_model(M18)
        if kind:
            for module in [*large.model.modules(), *large.cond_stage_model.modules()]:
                fold(module, PRECISIONS[kind])
        sizes = [_size(model) for model in (model_of(kind), large)]
        lines.append(f"| {f'`{kind}`' if kind else 'float32'} | {sizes[0] / 1e6:.1f} MB | {sizes[1] / 1e9:.2f} GB |")
    return "\n".join(lines)


def _size(model: LatentDiffusion) -> int:
    parts = (model.model, model.cond_stage_model)
    return sum(tensor.nbytes for part in parts for tensor in (*part.parameters(), *part.buffers()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--questions", type=int, default=40, help="of each kind")
    parser.add_argument("--part", choices=("times", "pictures", "table"), help="all of them unless given")
    parser.add_argument("--keep", type=Path, default=Path("runs/less_work.json"), help="what is measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(args.keep.read_text()) if args.keep.is_file() and args.part else {}
    if args.part in (None, "times"):
        kept["times"] = times(args.rounds)
        kept["transformer"] = transformer_times(args.rounds)
    if args.part in (None, "pictures"):
        kept["pictures"] = pictures(args.questions)
    args.keep.parent.mkdir(exist_ok=True)
    args.keep.write_text(json.dumps(kept))
    if args.part in (None, "table"):
        content = "\n\n".join([table(kept["times"], kept["pictures"]), counted(kept["transformer"]), memory()])
        write_chapter(CHAPTER, content)
        print(content)


if __name__ == "__main__":
    main()
