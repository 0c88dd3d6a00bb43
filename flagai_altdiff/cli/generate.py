"""``altdiff generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flagai_altdiff.batch.work import named
from flagai_altdiff.cli.common import (
    DEFAULT_MODEL,
    add_model_dir,
    add_option,
    by_flags,
    fail,
    say_what_is_unknown,
)
from flagai_altdiff.cli.many import add_many, draw_many, is_many
from flagai_altdiff.cli.model_flags import (
    add_device,
    add_parts,
    check_added,
    check_loras_of,
    load_with_parts,
    usual_device,
)
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, RegistryError
from flagai_altdiff.options import options_of
from flagai_altdiff.prompt_files import has_requests, read_prompt_file, read_requests
from flagai_altdiff.registry import DRAWING, MATCHING, locate
from flagai_altdiff.request import FLAGAI_DEFAULTS, OPTIONS, GenerationRequest, Output

if TYPE_CHECKING:
    from flagai_altdiff.models import LatentDiffusion
    from flagai_altdiff.ranking import BestOf

_MODELS_OWN = ("height", "width", "steps", "guidance_scale")
"""Options whose default is the model's."""
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
    add_parts(parser)
    add("--best", type=int, metavar="N", help="keep the best N images of each prompt, as --judge sees them")
    add("--of", type=int, metavar="N", help="draw N images of each prompt to choose from (default: 4 times --best)")
    add(
        "--judge",
        metavar="NAME",
        help=f"the matching model that chooses (default: {_JUDGE}; for AltDiffusion-mini {_EMBEDDED_JUDGE})",
    )
    add_device(parser)
    add_many(parser)
    parser.set_defaults(run=_generate, kept="; finished images are kept, --resume draws the rest")


def _generate(args: argparse.Namespace) -> int:
    if bool(args.prompt) == bool(args.from_file):
        return fail(
            f"{'two sources of' if args.prompt else 'no'} prompts: type them, or name a file with --from-file", 2
        )
    try:
        return draw_many(args, _options(args), _output(args)) if is_many(args) else _draw(args)
    except InvalidRequestError as error:
        raise by_flags(error) from None


def _draw(args: argparse.Namespace) -> int:
    # All that can be told to be wrong without the model, which takes seconds to load, is told first.
    requests, output = _typed(args)
    for request in requests:
        output.check_resumable(request)
    if output.skip_save and output.skip_grid:
        return fail("--skip-save and --skip-grid together keep nothing; leave one of them out", 2)
    spec, model_path = locate(args.model, args.model_dir, task=DRAWING)
    args.judge = args.judge or (_EMBEDDED_JUDGE if spec and spec.embedded else _JUDGE)
    check_added(args)
    if args.best:
        locate(args.judge, args.model_dir, task=MATCHING)
    print(f"loading {args.model}", file=sys.stderr)
    from flagai_altdiff.output import OpenFolder, draw_to_folder

    device = usual_device(args)
    check_loras_of(args, model_path)
    best_of = _best_of(args, requests, device) if args.best else None
    model, place = load_with_parts(args, device), OpenFolder(output)
    if isinstance(requests, _Lines):
        requests.check(model)
    for request in requests:
        say_what_is_unknown(args, spec, request.prompts)
        result = draw_to_folder(model, request, place, best_of=best_of)
        for path in (*result.paths, *([result.grid_path] if result.grid_path else [])):
            print(path)
        count, seed = len(result.samples), result.request.seed
        print(f"{count} image{'s' * (count != 1)} in {result.seconds:.1f} s, seed {seed}", file=sys.stderr)
    return 0


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
    given, options, output = vars(args), FLAGAI_DEFAULTS | _options(args), _output(args)
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


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of a request that were typed."""
    given = vars(args)
    options = {name: given[name] for name in options_of(GenerationRequest) if name in given}
    if args.plms and options.setdefault("sampler", "plms") != "plms":
        raise InvalidRequestError("--plms", True, f"contradicts --sampler {options['sampler']}; leave one of them out")
    return options


def _output(args: argparse.Namespace) -> Output:
    given = vars(args)
    return Output(**{name: given[name] for name in options_of(Output) if name in given})


class _Lines:
    """The requests of a file of JSON Lines, made when they are asked for: their pictures are not kept.

    What a line does not say is as it was typed; FlagAI's names of options count too.
    """

    def __init__(self, file: str, typed: Mapping[str, Any], *, comments: bool) -> None:
        self._file, self._typed, self._lines = file, typed, read_requests(file, comments=comments)

    def __iter__(self) -> Iterator[GenerationRequest]:
        for number, line in enumerate(self._lines, 1):
            try:
                yield GenerationRequest(**{**self._typed, **named(line)})
            except (InvalidRequestError, RegistryError) as error:
                raise self._wrong(number, error) from None

    def check(self, model: LatentDiffusion) -> None:
        """InvalidRequestError, with the line, where a model cannot draw what is asked for, here and now."""
        from flagai_altdiff.pipeline import examine

        for number, request in enumerate(self, 1):
            try:
                examine(model, request)
            except FlagAIAltDiffError as error:
                raise self._wrong(number, error) from None

    def _wrong(self, number: int, error: FlagAIAltDiffError) -> InvalidRequestError:
        return InvalidRequestError("from_file", self._file, f"request {number}: {error}")


def _drawn_to_choose_from(args: argparse.Namespace, has_n_samples: bool) -> dict[str, int]:
    """How many images of each prompt are drawn, a few at a time."""
    if args.best is None:
        raise InvalidRequestError("--of", args.of, "--best says how many of them are kept; add it")
    if has_n_samples:
        raise InvalidRequestError("--n-samples", args.images_per_prompt, "--of says how many are drawn; leave one out")
    count = 4 * args.best if args.of is None else args.of
    return {"images_per_prompt": count, "batch_size": max(1, min(count, _DRAWN_AT_ONCE))}
