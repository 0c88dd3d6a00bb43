"""``altdiff generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.cli.common import DEFAULT_MODEL, add_memory, add_model_dir, add_option, add_quantize, fail
from flagai_altdiff.errors import InvalidRequestError, shown
from flagai_altdiff.options import options_of
from flagai_altdiff.prompt_files import has_requests, read_prompt_file, read_requests
from flagai_altdiff.registry import DRAWING, MATCHING, locate
from flagai_altdiff.request import FLAGAI_DEFAULTS, OPTIONS, GenerationRequest, Output

if TYPE_CHECKING:
    from flagai_altdiff.ranking import BestOf

_MODELS_OWN = ("height", "width", "steps", "guidance_scale")
"""Options whose default is the model's."""
_OWN_FLAGS = {
    "from_file": "--from-file",
    "device": "--device",
    "best": "--best",
    "lora_strength": "--lora",
    "word": "--embedding",
}
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
        default=DEFAULT_MODEL,
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
        help="read prompts from a text file; each line is drawn once, --n-samples at a time. In a .jsonl file each "
        'line is a request: {"prompt": "a cat", "steps": 30}',
    )
    add("--comments", action="store_true", help="leave out lines of --from-file that begin with #")
    add("--lora", action="append", default=[], metavar="FILE[:X]", help="add a LoRA, X times as strong; repeatable")
    add("--embedding", action="append", default=[], type=Path, metavar="FILE", help="add a learnt word; repeatable")
    add("--vae", type=Path, metavar="FILE", help="use the autoencoder of this file or folder")
    add("--best", type=int, metavar="N", help="keep the best N images of each prompt, as --judge sees them")
    add("--of", type=int, metavar="N", help="draw N images of each prompt to choose from (default: 4 times --best)")
    add(
        "--judge",
        metavar="NAME",
        help=f"the matching model that chooses (default: {_JUDGE}; for AltDiffusion-mini {_EMBEDDED_JUDGE})",
    )
    add_quantize(parser)
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    add_memory(parser)
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
        raise InvalidRequestError(flag, error.value, _with_flags(error.expected)) from None


def _with_flags(expected: str) -> str:
    """An error's words with flags for the names of options that it says are needed."""
    head, needed, names = expected.partition("it has no effect without ")
    if not needed:
        return expected
    return head + needed + " or ".join(OPTIONS[name].flags[0] for name in names.split(" or "))


def _draw(args: argparse.Namespace) -> int:
    # All that can be told to be wrong without the model, which takes seconds to load, is told first.
    requests, output = _typed(args)
    for request in requests:
        output.check_resumable(request)
    if output.skip_save and output.skip_grid:
        return fail("--skip-save and --skip-grid together keep nothing; leave one of them out", 2)
    spec, place = locate(args.model, args.model_dir, task=DRAWING)
    args.judge = args.judge or (_EMBEDDED_JUDGE if spec and spec.embedded else _JUDGE)
    loras = [lora_of(text) for text in args.lora]
    for flag, file in (*(("--embedding", path) for path in args.embedding), ("--vae", args.vae)):
        if file is not None and not file.exists():
            raise InvalidRequestError(flag, str(file), "there is no such file")
    if args.best:
        locate(args.judge, args.model_dir, task=MATCHING)
    print(f"loading {args.model}", file=sys.stderr)
    import torch

    from flagai_altdiff.loading import load_model
    from flagai_altdiff.lora import add_lora, check_loras
    from flagai_altdiff.output import draw_to_folder
    from flagai_altdiff.parts import add_embedding, use_vae
    from flagai_altdiff.quantizing import quantize_model

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_loras(loras, place)
    best_of = _best_of(args, requests, device) if args.best else None
    model = load_model(
        args.model,
        args.model_dir,
        device=device,
        dtype=torch.float16 if args.fp16 else None,
        mapped=True,  # this process writes no weights
        memory=args.memory,
        safety_checker=False if args.no_safety_checker else True if args.require_safety_checker else "auto",
    )
    for path, strength in loras:
        add_lora(model, path, strength)
    for path in args.embedding:
        print(f"new word: {add_embedding(model, path)}", file=sys.stderr)
    if args.vae:
        use_vae(model, args.vae)
    if args.quantize:
        quantize_model(model, args.quantize)
    for request in requests:
        if spec and spec.embedded and not (args.lora or args.embedding):
            _say_what_is_unknown(request.prompts)
        result = draw_to_folder(model, request, output, best_of=best_of)
        for path in (*result.paths, *([result.grid_path] if result.grid_path else [])):
            print(path)
        count, seed = len(result.samples), result.request.seed
        print(f"{count} image{'s' * (count != 1)} in {result.seconds:.1f} s, seed {seed}", file=sys.stderr)
    return 0


def _say_what_is_unknown(prompts: Iterable[str]) -> None:
    """Which prompts name nothing that the embedded model knows; others know any word."""
    from flagai_altdiff.mini.things.knowing import hint

    for said in filter(None, (hint(prompt, DEFAULT_MODEL) for prompt in prompts)):
        print(f"{said} things.json beside its weights lists what it knows.", file=sys.stderr)


def lora_of(text: str, usual: Callable[[Path], float] = lambda path: 1.0) -> tuple[Path, float]:
    """File and strength of a typed LoRA; the strength stands behind the last colon, which a path may have as well.

    Args:
        text: As it was typed.
        usual: The strength of a file for which none was typed.
    """
    name, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        path, strength = Path(text), usual(Path(text))
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


def _best_of(args: argparse.Namespace, requests: Iterable[GenerationRequest], device: str) -> BestOf:
    from flagai_altdiff.matching import load_matching_model
    from flagai_altdiff.ranking import BestOf, check_choice

    for request in requests:
        check_choice(args.best, request)
    print(f"loading {args.judge}", file=sys.stderr)
    judge = load_matching_model(args.judge, args.model_dir, device=device, mapped=True)
    return BestOf(judge=judge, best=args.best)


def _typed(args: argparse.Namespace) -> tuple[Iterable[GenerationRequest], Output]:
    """What was asked for, with FlagAI's defaults where nothing was typed; several requests from JSON Lines."""
    given = vars(args)
    options = FLAGAI_DEFAULTS | {name: given[name] for name in options_of(GenerationRequest) if name in given}
    if args.plms and options.setdefault("sampler", "plms") != "plms":
        raise InvalidRequestError("--plms", True, f"contradicts --sampler {options['sampler']}; leave one of them out")
    output = Output(**{name: given[name] for name in options_of(Output) if name in given})
    if args.from_file and has_requests(args.from_file):
        if args.best is not None or args.of is not None:
            options |= _drawn_to_choose_from(args, "images_per_prompt" in given)
        return _Lines(args.from_file, options, comments=args.comments), output
    if args.from_file:
        options["prompts"] = read_prompt_file(args.from_file, comments=args.comments)
        options |= {"images_per_prompt": 1, "batch_size": options["images_per_prompt"]}
    else:
        options["prompts"] = args.prompt
    if args.best is not None or args.of is not None:
        options |= _drawn_to_choose_from(args, "images_per_prompt" in given)
    return [GenerationRequest(**options)], output


class _Lines:
    """The requests of a file of JSON Lines, made when they are asked for: their pictures are not kept.

    What a line does not say is as it was typed; FlagAI's names of options count too.
    """

    def __init__(self, file: str, typed: Mapping[str, Any], *, comments: bool) -> None:
        self._file, self._typed, self._lines = file, typed, read_requests(file, comments=comments)

    def __iter__(self) -> Iterator[GenerationRequest]:
        ours = {option.flagai: name for name, option in OPTIONS.items() if name != "batch_size"}
        for number, line in enumerate(self._lines, 1):
            said = {ours.get(name, name): value for name, value in line.items()}
            try:
                yield GenerationRequest(**{**self._typed, **said})
            except InvalidRequestError as error:
                expected = f"request {number}: {error.field}={shown(error.value)}: {error.expected}"
                raise InvalidRequestError("from_file", self._file, expected) from None


def _drawn_to_choose_from(args: argparse.Namespace, has_n_samples: bool) -> dict[str, int]:
    """How many images of each prompt are drawn, a few at a time."""
    if args.best is None:
        raise InvalidRequestError("--of", args.of, "--best says how many of them are kept; add it")
    if has_n_samples:
        raise InvalidRequestError("--n-samples", args.images_per_prompt, "--of says how many are drawn; leave one out")
    count = 4 * args.best if args.of is None else args.of
    return {"images_per_prompt": count, "batch_size": max(1, min(count, _DRAWN_AT_ONCE))}
