"""``altdiff generate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flagai_altdiff.cli.common import add_model_dir, add_option, fail
from flagai_altdiff.errors import InvalidRequestError, shown
from flagai_altdiff.options import options_of
from flagai_altdiff.prompt_files import read_prompt_file
from flagai_altdiff.registry import DRAWING, MATCHING, locate
from flagai_altdiff.request import FLAGAI_DEFAULTS, OPTIONS, GenerationRequest, Output

if TYPE_CHECKING:
    from flagai_altdiff.ranking import BestOf

_MODELS_OWN = ("height", "width", "steps", "guidance_scale")
"""Options whose default is the model's."""
_OWN_FLAGS = {"from_file": "--from-file", "device": "--device", "best": "--best", "strength": "--lora"}
"""What is no option of a request, by the flag that sets it."""


_JUDGE, _EMBEDDED_JUDGE = "AltCLIP-XLMR-L-m9", "AltCLIP-mini"
_DRAWN_AT_ONCE = 4


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``generate``."""
    add = parser.add_argument
    add(
        "prompt",
        nargs="*",
        help="what the images show, in any language of the model; several prompts are drawn in turn",
    )
    add(
        "-m",
        "--model",
        default="AltDiffusion-mini",
        help="name of a model, or path of its weights (default: %(default)s)",
    )
    add_model_dir(parser)
    for option in OPTIONS.values():
        if option.flags:
            default = "the model's" if option.name in _MODELS_OWN else FLAGAI_DEFAULTS.get(option.name, option.default)
            add_option(parser, option, default)
    add("--plms", action="store_true", help="same as --sampler plms")
    add(
        "--from-file",
        "--prompt-file",
        metavar="FILE",
        help="read prompts from a text file; each line is drawn once, --n-samples at a time",
    )
    add("--comments", action="store_true", help="leave out lines of --from-file that begin with #")
    add("--lora", action="append", default=[], metavar="FILE[:X]", help="add a LoRA, X times as strong; repeatable")
    add("--best", type=int, metavar="N", help="keep the best N images of each prompt, as --judge sees them")
    add("--of", type=int, metavar="N", help="draw N images of each prompt to choose from (default: 4 times --best)")
    add(
        "--judge",
        metavar="NAME",
        help=f"the matching model that chooses (default: {_JUDGE}; for AltDiffusion-mini {_EMBEDDED_JUDGE})",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    checker = parser.add_mutually_exclusive_group()
    checker.add_argument("--no-safety-checker", action="store_true", help="do not check the images")
    checker.add_argument("--require-safety-checker", action="store_true", help="fail where the model has no checker")
    parser.set_defaults(run=_generate, kept="; finished images are kept, --resume draws the rest")


def _generate(args: argparse.Namespace) -> int:
    if bool(args.prompt) == bool(args.from_file):
        return fail(
            f"{'two sources of' if args.prompt else 'no'} prompts: type them, or name a file with --from-file", 2
        )
    try:
        return _draw(args)
    except InvalidRequestError as error:
        option = OPTIONS.get(error.field)
        flag = option.flags[0] if option and option.flags else _OWN_FLAGS.get(error.field, error.field)
        raise InvalidRequestError(flag, error.value, error.expected) from None


def _draw(args: argparse.Namespace) -> int:
    # All that can be told to be wrong without the model, which takes seconds to load, is told first.
    request, output = _typed(args)
    output.check_resumable(request)
    if output.skip_save and output.skip_grid:
        return fail("--skip-save and --skip-grid together keep nothing; leave one of them out", 2)
    spec, place = locate(args.model, args.model_dir, task=DRAWING)
    args.judge = args.judge or (_EMBEDDED_JUDGE if spec and spec.embedded else _JUDGE)
    loras = [_lora(text) for text in args.lora]
    if args.best:
        locate(args.judge, args.model_dir, task=MATCHING)
    print(f"loading {args.model}", file=sys.stderr)
    import torch

    from flagai_altdiff.loading import load_model
    from flagai_altdiff.lora import add_lora, check_loras
    from flagai_altdiff.output import draw_to_folder

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_loras(loras, place)
    best_of = _best_of(args, request, device) if args.best else None
    model = load_model(
        args.model,
        args.model_dir,
        device=device,
        dtype=torch.float16 if args.fp16 else None,
        mapped=True,  # this process writes no weights
        safety_checker=False if args.no_safety_checker else True if args.require_safety_checker else "auto",
    )
    for path, strength in loras:
        add_lora(model, path, strength)
    result = draw_to_folder(model, request, output, best_of=best_of)
    for path in (*result.paths, *([result.grid_path] if result.grid_path else [])):
        print(path)
    count = len(result.samples)
    print(f"{count} image{'s' * (count != 1)} in {result.seconds:.1f} s, seed {result.request.seed}", file=sys.stderr)
    return 0


def _lora(text: str) -> tuple[Path, float]:
    """File and strength of a typed LoRA; the strength stands behind the last colon, which a path may have as well."""
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        path, strength = Path(text), 1.0
    else:
        try:
            path, strength = Path(name), float(number)
        except ValueError:
            path, strength = Path(text), 1.0
            if Path(name).exists():
                expected = f"a number behind the last colon in place of {shown(number)}, for example {name}:0.8"
                raise InvalidRequestError("--lora", text, expected) from None
    if not path.is_file():
        expected = "the name of a file in that folder" if path.is_dir() else f"a file; there is no {path}"
        raise InvalidRequestError("--lora", text, expected)
    return path, strength


def _best_of(args: argparse.Namespace, request: GenerationRequest, device: str) -> BestOf:
    from flagai_altdiff.matching import load_matching_model
    from flagai_altdiff.ranking import BestOf, check_choice

    check_choice(args.best, request)
    print(f"loading {args.judge}", file=sys.stderr)
    judge = load_matching_model(args.judge, args.model_dir, device=device, mapped=True)
    return BestOf(judge=judge, best=args.best)


def _typed(args: argparse.Namespace) -> tuple[GenerationRequest, Output]:
    """What was asked for, with FlagAI's defaults where nothing was typed."""
    given = vars(args)
    options = FLAGAI_DEFAULTS | {name: given[name] for name in options_of(GenerationRequest) if name in given}
    if args.plms and options.setdefault("sampler", "plms") != "plms":
        raise InvalidRequestError("--plms", True, f"contradicts --sampler {options['sampler']}; leave one of them out")
    if args.from_file:
        options["prompts"] = read_prompt_file(args.from_file, comments=args.comments)
        options |= {"images_per_prompt": 1, "batch_size": options["images_per_prompt"]}
    else:
        options["prompts"] = args.prompt
    if args.best is not None or args.of is not None:
        options |= _drawn_to_choose_from(args, "images_per_prompt" in given)
    return GenerationRequest(**options), Output(**{name: given[name] for name in options_of(Output) if name in given})


def _drawn_to_choose_from(args: argparse.Namespace, has_n_samples: bool) -> dict[str, int]:
    """How many images of each prompt are drawn, a few at a time."""
    if args.best is None:
        raise InvalidRequestError("--of", args.of, "--best says how many of them are kept; add it")
    if has_n_samples:
        raise InvalidRequestError("--n-samples", args.images_per_prompt, "--of says how many are drawn; leave one out")
    count = 4 * args.best if args.of is None else args.of
    return {"images_per_prompt": count, "batch_size": max(1, min(count, _DRAWN_AT_ONCE))}
