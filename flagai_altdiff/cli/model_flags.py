"""The model that a command draws with: its flags, what is added to it, and where it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flagai_altdiff.errors import InvalidRequestError, shown
from flagai_altdiff.machine import MEMORY_MODES

if TYPE_CHECKING:
    from flagai_altdiff.models import LatentDiffusion


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Flags for what is added to a model."""
    add = parser.add_argument
    add("--lora", action="append", default=[], metavar="FILE[:X]", help="add a LoRA, X times as strong; repeatable")
    add("--embedding", action="append", default=[], type=Path, metavar="FILE", help="add a learnt word; repeatable")
    add("--vae", type=Path, metavar="FILE", help="use the autoencoder of this file or folder")
    add_quantize(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Flags for where a model runs, and for its safety checker."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    add_memory(parser)
    checker = parser.add_mutually_exclusive_group()
    checker.add_argument("--no-safety-checker", action="store_true", help="do not check the images")
    checker.add_argument("--require-safety-checker", action="store_true", help="fail where the model has no checker")


def add_quantize(parser: argparse._ActionsContainer) -> None:
    """The flag for weights in few bits."""
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="keep the weights in 8 or 4 bits: a quarter or a seventh of the memory, another picture, no less time",
    )


def add_memory(parser: argparse._ActionsContainer) -> None:
    """The flag for how much memory drawing may take."""
    parser.add_argument(
        "--memory",
        choices=MEMORY_MODES,
        default="auto",
        help="low has a part of the model at a time where it draws, and half precision on a GPU; lowest a layer at a "
        "time, which is slow on a GPU (default: auto, the first of normal, low and lowest that fits into what is free)",
    )


def usual_device(args: argparse.Namespace) -> str:
    """The device that was typed, or the one that is there."""
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_added(args: argparse.Namespace) -> None:
    """InvalidRequestError for a file that is not there."""
    for text in args.lora:
        lora_of(text)
    for flag, file in (*(("--embedding", path) for path in args.embedding), ("--vae", args.vae)):
        if file is not None and not file.exists():
            raise InvalidRequestError(flag, str(file), "there is no such file")


def check_loras_of(args: argparse.Namespace, place: Path) -> None:
    """What is wrong with the LoRAs, told before the model is loaded.

    Args:
        args: What was typed.
        place: Of the model.
    """
    from flagai_altdiff.lora import check_loras

    check_loras([lora_of(text) for text in args.lora], place)


def load_with_parts(args: argparse.Namespace, device: str) -> LatentDiffusion:
    """The model that was typed, with all that is to be added to it."""
    import torch

    from flagai_altdiff.loading import load_model
    from flagai_altdiff.lora import add_lora
    from flagai_altdiff.parts import add_embedding, use_vae
    from flagai_altdiff.quantizing import quantize_model

    model = load_model(
        args.model,
        args.model_dir,
        device=device,
        dtype=torch.float16 if args.fp16 else None,
        mapped=True,  # this process writes no weights
        memory=args.memory,
        safety_checker=False if args.no_safety_checker else True if args.require_safety_checker else "auto",
    )
    for path, strength in map(lora_of, args.lora):
        add_lora(model, path, strength)
    for path in args.embedding:
        print(f"new word: {add_embedding(model, path)}", file=sys.stderr)
    if args.vae:
        use_vae(model, args.vae)
    if args.quantize:
        quantize_model(model, args.quantize)
    return model


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
