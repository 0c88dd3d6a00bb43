"""``altdiff generate``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from flagai_altdiff.cli.common import add_model_dir, fail
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.registry import locate
from flagai_altdiff.request import SAMPLER_NAMES, SEED_MODES, GenerationRequest, option_of

if TYPE_CHECKING:
    from flagai_altdiff.pipeline import GenerationResult
    from flagai_altdiff.predictor import Predictor

_FLAGS = {
    "n_samples": "--n-samples",
    "n_iter": "--n-iter",
    "n_rows": "--n-rows",
    "negative_prompt": "--negative-prompt",
    "ddim_steps": "--steps",
    "ddim_eta": "--eta",
    "from_file": "--from-file",
    "skip_save": "--skip-save",
    **{name: f"--{name}" for name in ("scale", "H", "W", "seed", "sampler", "plms")},
}
"""Argument of FlagAI's call -> the flag that sets it."""


def _help(option: str, default: str = "") -> str:
    known = option_of(option)
    limits = "" if known.minimum is None else f"{known.minimum:,} to {known.maximum:,} {known.unit}".rstrip()
    notes = [limits] * bool(limits) + [f"default: {default}"] * bool(default)
    return known.help[0].lower() + known.help[1:].rstrip(".") + (f" ({'; '.join(notes)})" if notes else "")


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``generate``."""
    add = parser.add_argument
    add("prompt", nargs="*", help="what the pictures show, in any language of the model; several prompts are drawn in turn")
    add("-m", "--model", default="AltDiffusion-mini", help="name of a model, or path of its weights (default: %(default)s)")
    add_model_dir(parser)
    add("-n", "--n-samples", type=int, default=4, metavar="N", help=_help("images_per_prompt", "4"))
    add("--n-iter", type=int, default=1, metavar="N", help=_help("iterations", "1"))
    add("--n-rows", type=int, default=0, metavar="N", help="pictures per row of the grid (default: --n-samples)")
    add("--negative-prompt", default="", metavar="TEXT", help=_help("negative_prompt"))
    add("-s", "--steps", "--ddim-steps", type=int, metavar="N", help=_help("steps", "the model's"))
    add(
        "--scale",
        "--guidance-scale",
        "--cfg-scale",
        type=float,
        metavar="X",
        help=_help("guidance_scale", "the model's"),
    )
    add("-H", "--H", "--height", dest="height", type=int, metavar="PX", help=_help("height", "the model's"))
    add("-W", "--W", "--width", dest="width", type=int, metavar="PX", help=_help("width", "the model's"))
    add("--seed", type=int, default=34234, metavar="N", help=_help("seed", "34234"))
    add("--seed-mode", choices=SEED_MODES, default="batch", help=_help("seed_mode", "batch"))
    add("--sampler", choices=SAMPLER_NAMES, help=_help("sampler", "ddim"))
    add("--plms", action="store_true", help="same as --sampler plms")
    add("--eta", "--ddim-eta", type=float, default=0.0, metavar="X", help=_help("eta", "0"))
    add("--fixed-code", action="store_true", help=_help("fixed_code"))
    add("--from-file", "--prompt-file", metavar="FILE", help="read the prompts from a UTF-8 file, one per line")
    add(
        "-o",
        "--outdir",
        "--outpath",
        "--out-path",
        "--output",
        default="AltDiffusionOutputs",
        metavar="DIR",
        help="folder of the pictures: samples/00000.png …, grid-0000.png … (default: %(default)s)",
    )
    add("--resume", action="store_true", help="go on with the latest run of this very request in --outdir")
    add("--skip-grid", action="store_true", help="make no grid")
    add("--skip-save", action="store_true", help="save no single pictures")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    checker = parser.add_mutually_exclusive_group()
    checker.add_argument("--no-safety-checker", action="store_true", help="do not check the pictures")
    checker.add_argument("--require-safety-checker", action="store_true", help="fail where the model has no checker")
    parser.set_defaults(run=_generate, kept="; finished pictures are kept, --resume draws the rest")


def _generate(args: argparse.Namespace) -> int:
    if bool(args.prompt) == bool(args.from_file):
        return fail(f"{'two sources of' if args.prompt else 'no'} prompts: type them, or name a file with --from-file", 2)
    if args.skip_save and args.skip_grid:
        return fail("--skip-save and --skip-grid together keep nothing; leave one of them out", 2)
    _check(args)
    print(f"loading {args.model}", file=sys.stderr)
    import torch

    from flagai_altdiff.loading import load_model
    from flagai_altdiff.predictor import Predictor

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    safety = False if args.no_safety_checker else True if args.require_safety_checker else "auto"
    model = load_model(args.model, args.model_dir, safety_checker=safety)
    try:
        model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError("--device", device, f"cannot be used here ({error}); --device cpu always works") from error
    model.autocast_dtype = torch.float16 if args.fp16 else None
    try:
        result = _draw(Predictor(model), args)
    except InvalidRequestError as error:
        raise InvalidRequestError(_FLAGS.get(error.field, error.field), error.value, error.expected) from None
    for path in (*result.paths, *([result.grid_path] if result.grid_path else [])):
        print(path)
    count = len(result.pictures)
    print(f"{count} picture{'s' * (count != 1)} in {result.seconds:.1f} s, seed {result.request.seed}", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be told to be wrong without the model, which takes seconds to load."""
    locate(args.model, args.model_dir)
    try:
        GenerationRequest(
            prompts=tuple(args.prompt) or ("in a file",),
            negative_prompt=args.negative_prompt,
            height=args.height,
            width=args.width,
            steps=args.steps,
            guidance_scale=args.scale,
            sampler=args.sampler or "ddim",
            seed=args.seed,
            images_per_prompt=args.n_samples,
            iterations=args.n_iter,
        )
    except InvalidRequestError as error:
        legacy = option_of(error.field).legacy
        raise InvalidRequestError(_FLAGS.get(legacy, legacy), error.value, error.expected) from None


def _draw(predictor: Predictor, args: argparse.Namespace) -> GenerationResult:
    return predictor.predict_generate_images(
        args.prompt or None,
        args.outdir,
        n_samples=args.n_samples,
        n_rows=args.n_rows,
        skip_grid=args.skip_grid,
        skip_save=args.skip_save,
        ddim_steps=args.steps,
        n_iter=args.n_iter,
        plms=args.plms,
        fixed_code=args.fixed_code,
        ddim_eta=args.eta,
        H=args.height,
        W=args.width,
        scale=args.scale,
        from_file=args.from_file,
        seed=args.seed,
        negative_prompt=args.negative_prompt,
        sampler=args.sampler,
        seed_mode=args.seed_mode,
        resume=args.resume,
    )
