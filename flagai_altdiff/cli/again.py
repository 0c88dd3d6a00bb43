"""``altdiff show``, ``redraw`` and ``tokens``: how a picture was made, the same once more, how a prompt is read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagai_altdiff.added import PRECISION, QUANTIZE
from flagai_altdiff.cli.common import DEFAULT_MODEL, add_model_dir, fail, say
from flagai_altdiff.cli.model_flags import add_memory, add_quantize
from flagai_altdiff.errors import ImageError, printable
from flagai_altdiff.prompt_syntax import SYNTAXES
from flagai_altdiff.registry import find_model
from flagai_altdiff.request import ENGINES

if TYPE_CHECKING:
    from flagai_altdiff.models import LatentDiffusion
    from flagai_altdiff.records import Record


def add_show(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``show``."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="PNG files")
    parser.add_argument("--json", action="store_true", help="print the records as JSON, one on each line")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> int:
    records, unread = _records(args.files)
    for number, (path, record) in enumerate(records):
        said = dict(record.own) or {"model": record.model, **record.options}
        if args.json:
            print(json.dumps({"file": str(path), "program": record.program, **said}, ensure_ascii=False))
            continue
        if len(args.files) > 1:
            say(f"{'' if not number else chr(10)}{path}")
        say(f"{'program':18} {record.program}")
        for name, value in said.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            say(f"{name:18} {printable(text, 2000)}")
        for text in record.lost:
            say(f"{'cannot be redrawn':18} {text}")
    return unread


def _records(files: Sequence[Path]) -> tuple[list[tuple[Path, Record]], int]:
    """The records of those files that have one, and the exit status: 1 where one has none, which is said."""
    from flagai_altdiff.records import read_any

    found, status = [], 0
    for path in files:
        try:
            found.append((path, read_any(path)))
        except ImageError as error:
            status = fail(error, 1)
    return found, status


def add_redraw(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``redraw``."""
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="PNG files of flagai_altdiff, A1111, ComfyUI or InvokeAI")
    add("-m", "--model", metavar="NAME", help="the model (default: the record's, if it is one of ours)")
    add_model_dir(parser)
    add("--outdir", "-o", type=Path, metavar="DIR", help="folder of the images (default: AltDiffusionOutputs)")
    add("--seed", type=int, metavar="N", help="another seed: the same again, but another image")
    add("--lora", action="append", default=[], metavar="FILE[:X]", help="a LoRA that the images were drawn with")
    add("--embedding", action="append", default=[], type=Path, metavar="FILE", help="a learnt word of theirs")
    add("--vae", type=Path, metavar="FILE", help="the autoencoder that they were drawn with")
    add("--init-image", type=Path, metavar="FILE", help="the picture that was begun with, if it lies elsewhere now")
    add("--mask", type=Path, metavar="FILE", help="its mask, likewise")
    add_quantize(parser)
    add("--engine", choices=ENGINES, help="what computes (default: as they were drawn)")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add_memory(parser)
    parser.set_defaults(run=_redraw)


def _redraw(args: argparse.Namespace) -> int:
    records, status = _records(args.files)
    if not records:
        return status
    import torch

    from flagai_altdiff.output import draw_to_folder, redraw

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded: dict[tuple[object, ...], Any] = {}
    pictures = {"init_image": args.init_image, "mask_image": args.mask}
    pictures = {name: file for name, file in pictures.items() if file is not None}
    for path, record in records:
        name = _model_for(path, record, args.model)
        ways = args.quantize or _quantization(record.own), _part(record.own, PRECISION)
        wanted = (name, *ways, *sorted(_strengths(record.own).items()))
        if wanted not in loaded:
            print(f"loading {name}", file=sys.stderr)
            loaded[wanted] = _load(name, *ways, device, record, args)
        model = loaded[wanted]
        if record.own and (differs := _other_parts(record.own, model)):
            return fail(f"{path}: {differs}", 2)
        typed = {"engine": args.engine} if args.engine else {}
        if record.own and args.seed is None:
            result = redraw(model, {**record.own, **typed}, args.outdir, pictures=pictures)
        else:
            options = {**record.options, **typed, **pictures, **({} if args.seed is None else {"seed": args.seed})}
            options |= {"images_per_prompt": 1, "batch_size": 1, "iterations": 1}
            result = draw_to_folder(model, options.pop("prompts"), args.outdir, **options)
        for saved in result.paths:
            print(saved)
    return status


def _model_for(path: Path, record: Record, asked: str | None) -> str:
    """Name of the model that draws a record; what of it cannot be carried over is said."""
    known = find_model(record.model)
    name = asked or (known.name if known else record.model if record.own else DEFAULT_MODEL)
    lost = [*record.lost]
    if not record.own and record.model and known is None and asked is None:
        lost.append(f"Model: {printable(record.model, 80)} ({name} in its place; -m names another)")
    for text in lost:
        print(f"{path}: not carried over: {text}", file=sys.stderr)
    return name


def _quantization(own: Mapping[str, Any]) -> str:
    """How the weights were kept, as a record says; empty if they were as in their file."""
    from flagai_altdiff.models.quantized import PRECISIONS

    kind = _part(own, QUANTIZE)
    return kind if kind in tuple(PRECISIONS) else ""


def _part(own: Mapping[str, Any], kind: str) -> str:
    """The name of the part of a kind that a record tells of; empty if it tells of none."""
    return next((str(part["name"]) for part in own.get("parts", ()) if part["kind"] == kind), "")


def _strengths(own: Mapping[str, Any]) -> dict[str, float]:
    """How strong each LoRA was, as a record says."""
    return {lora["name"]: float(lora["strength"]) for lora in own.get("loras", ())}


def _load(
    name: str, kind: str, precision: str, device: str, record: Record, args: argparse.Namespace
) -> LatentDiffusion:
    """The model with what is added to it; a LoRA as strong as the record says, where nothing was typed."""
    import torch

    from flagai_altdiff.cli.model_flags import lora_of
    from flagai_altdiff.loading import load_model
    from flagai_altdiff.lora import add_lora
    from flagai_altdiff.parts import add_embedding, use_vae
    from flagai_altdiff.quantizing import quantize_model

    strengths = _strengths(record.own)
    loras = [lora_of(text, lambda file: strengths.get(file.stem, 1.0)) for text in args.lora]
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(precision)
    model = load_model(name, args.model_dir, device=device, dtype=dtype, mapped=True, memory=args.memory)
    for file, strength in loras:
        add_lora(model, file, strength)
    for file in args.embedding:
        add_embedding(model, file)
    if args.vae:
        use_vae(model, args.vae)
    if kind:
        quantize_model(model, kind)
    return model


def _other_parts(own: Mapping[str, Any], model: LatentDiffusion) -> str:
    """What was added to the model when the image was drawn and is not now, or the reverse; empty if it is the same."""
    said = [f"--lora {lora['name']}:{lora['strength']:g} ({lora['sha256']})" for lora in own.get("loras", ())]
    for part in own.get("parts", ()):
        if part["kind"] == PRECISION:  # redraw loads the model for it
            continue
        said.append(f"--{part['kind']} {part['name']}" + (f" ({part['sha256']})" if part["sha256"] else ""))
    now = [f"--lora {lora}" for lora in model.loras] + [f"--{part}" for part in model.parts]
    if sorted(said) == sorted(now):
        return ""
    return (
        f"it was drawn with {', '.join(said) or 'nothing added'}, and now there is {', '.join(now) or 'nothing'}; "
        "name the files with these flags"
    )


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``tokens``."""
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to read")
    add("-m", "--model", default=DEFAULT_MODEL, metavar="NAME", help="whose tokenizer (default: %(default)s)")
    add_model_dir(parser)
    add("--prompt-syntax", default="weighted", choices=SYNTAXES, help="how it is read (default: %(default)s)")
    parser.set_defaults(run=_tokens)


def _tokens(args: argparse.Namespace) -> int:
    from flagai_altdiff.auto_loader import find_own_tokenizer
    from flagai_altdiff.chunks import ROOM, Chunk, chunks
    from flagai_altdiff.tokenizer.files import UNK

    tokenizer = find_own_tokenizer(args.model, args.model_dir)
    for number, prompt in enumerate(args.prompts):
        if number:
            say("")
        if args.prompt_syntax == "plain":
            found = tokenizer.encode(prompt)
            pieces = tuple(prompt[first:end] for first, end in found.spans)
            read = [Chunk(pieces[:ROOM], found.ids[:ROOM], (1.0,) * len(pieces[:ROOM]))]
        else:
            read = chunks(tokenizer, prompt)
        for place, chunk in enumerate(read, 1):
            say(f"chunk {place} of {len(read)}: {len(chunk.ids)} of {ROOM} tokens")
            for piece, i, weight in zip(chunk.pieces, chunk.ids, chunk.weights, strict=True):
                say(f"  {i:7} {weight:6.3f}  {printable(piece, 80)}{'  (unknown)' * (i == UNK)}")
        if args.prompt_syntax == "plain" and (lost := tokenizer.lost_text(prompt)):
            say(f"lost: {printable(lost, 2000)}")
    return 0
