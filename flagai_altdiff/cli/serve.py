"""``altdiff serve`` and ``altdiff ui``."""

from __future__ import annotations

import argparse
import os
import sys
import webbrowser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flagai_altdiff.cli.common import DEFAULT_MODEL, add_model_dir
from flagai_altdiff.cli.model_flags import add_memory, add_quantize
from flagai_altdiff.errors import InvalidRequestError, MissingDependencyError
from flagai_altdiff.registry import DRAWING, locate

_KEY, _AUTH = "FLAGAI_ALTDIFF_API_KEY", "FLAGAI_ALTDIFF_AUTH"
_PACKAGES = ("fastapi", "fastapi_offline", "uvicorn", "prometheus_client", "python_multipart", "gradio")
_GIB = 1 << 30
_MAX_SECRET = 4096
_LARGEST = 1e15
"""Of a limit: more than any machine has, less than whole numbers end at."""


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``serve``."""
    _add(parser)
    parser.set_defaults(run=_serve, opens=False)


def add_ui(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``ui``."""
    _add(parser)
    parser.set_defaults(run=_serve, opens=True, no_page=False)


def _add(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-m",
        "--models",
        "--model",
        default=DEFAULT_MODEL,
        metavar="A,B",
        help="names of models, or paths of their weights; the first one draws unless a request says otherwise "
        "(default: %(default)s)",
    )
    add_model_dir(parser)
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s, this machine)")
    add("--port", type=int, default=7860, metavar="N", help="0 takes a free one (default: %(default)s)")
    add("--outdir", "-o", type=Path, default=Path("AltDiffusionOutputs"), metavar="DIR", help="folder of the images")
    add("--no-save", action="store_true", help="save no images")
    add("--no-page", action="store_true", help="only the interfaces for programs, no page")
    drawing = parser.add_argument_group("drawing")
    add = drawing.add_argument
    add("--devices", type=_at_least_one, metavar="N", help="draw on N GPUs, a process for each")
    add("--workers", type=_at_least_one, metavar="N", help="draw in N processes on the CPU (default: 1)")
    add(
        "--max-memory",
        type=_at_least_zero,
        metavar="GB",
        help="weights that a process keeps; models that were used least recently go, the one that draws stays "
        "(default: half of the GPU's memory, or of the machine's or its container's, divided by --workers)",
    )
    add("--fp16", action="store_true", help="half precision on a GPU: faster, half the memory")
    add_memory(drawing)
    add_quantize(drawing)
    add("--lora", action="append", default=[], type=Path, metavar="FILE", help="a LoRA or a folder of some; repeatable")
    add("--embedding", action="append", default=[], type=Path, metavar="FILE", help="add a learnt word; repeatable")
    add("--vae", type=Path, metavar="FILE", help="use the autoencoder of this file or folder")
    checker = drawing.add_mutually_exclusive_group()
    checker.add_argument("--no-safety-checker", action="store_true", help="do not check the images")
    checker.add_argument("--require-safety-checker", action="store_true", help="fail where a model has no checker")
    limits = parser.add_argument_group("limits")
    add = limits.add_argument
    add("--max-waiting", type=_at_least_one, metavar="N", help="jobs that may wait (default: 64)")
    add("--max-waiting-each", type=_at_least_one, metavar="N", help="jobs of one client that may wait (default: 16)")
    add("--max-work", type=_at_least_zero, metavar="X", help="pixels x steps x images of a request (default: 2e9)")
    add(
        "--max-chunks",
        type=_at_least_one,
        metavar="N",
        help="chunks of 75 tokens of a prompt with weights; each beyond the first counts as a step (default: 20)",
    )
    add("--max-batch", type=_at_least_one, metavar="N", help="images of like requests drawn at once (default: 8)")
    add("--max-body", type=_at_least_zero, metavar="MB", help="size of a request (default: 32)")
    add(
        "--grace",
        type=_at_least_zero,
        metavar="S",
        help="seconds that a begun job has when the server stops (default: 30)",
    )
    access = parser.add_argument_group("who may use it")
    add = access.add_argument
    add("--api-key", metavar="KEY|@FILE", help=f"ask for this key; better from a file, or from {_KEY}")
    add("--auth", "--api-auth", metavar="USER:PASSWORD|@FILE", help=f"ask for a password; or {_AUTH}")
    add("--open", action="store_true", help="let everybody in who reaches a public address")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name of this server; * is any; repeatable")
    add("--cors", action="append", default=[], metavar="ORIGIN", help="let pages of https://… use it; repeatable")
    add("--picture-urls", action="store_true", help="fetch pictures that requests name by public addresses")
    add("--name", default="", metavar="NAME", help="begins the ids of its jobs, for load balancers")


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _at_least_zero(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _LARGEST:
        raise ValueError
    return number


_at_least_one.__name__ = "whole number from 1 on"
_at_least_zero.__name__ = f"number from 0 to {_LARGEST:g}"


def _serve(args: argparse.Namespace) -> int:
    _require_packages()
    settings = _settings(args)
    from flagai_altdiff.web.server import run_server

    def when_ready(url: str) -> None:
        print(f"{'page' if settings.page else 'server'} at {url}   documentation at {url}/docs", flush=True)
        if args.opens:
            webbrowser.open(url)

    print(f"loading {', '.join(settings.drawing.models)}", file=sys.stderr)
    ended_by = run_server(settings, when_ready)
    return 128 + ended_by if ended_by else 0


def _require_packages() -> None:
    """MissingDependencyError where the server's packages are not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        how = "pip install '.[web]' in this package's folder"
        raise MissingDependencyError(f"the server needs {', '.join(missing)}: {how}")


def _settings(args: argparse.Namespace) -> Any:
    """The settings that were typed, checked as far as that goes without any model."""
    from flagai_altdiff.web.clients import is_loopback
    from flagai_altdiff.web.settings import MIB, Access, Drawing, Limits, Settings

    models = tuple(name for part in args.models.split(",") if (name := part.strip()))
    if not models:
        raise InvalidRequestError("--models", args.models, "expected at least one name")
    for name in models:
        locate(name, args.model_dir, task=DRAWING)
    key, auth = _secret("--api-key", args.api_key, _KEY), _secret("--auth", args.auth, _AUTH)
    if auth and ":" not in auth:
        raise InvalidRequestError("--auth", "…", "expected a name and a password, with a colon between them")
    access = Access(
        api_keys=(key,) if key else (),
        users=((auth.partition(":")[0], auth.partition(":")[2]),) if auth else (),
        hosts=tuple(args.allow_host),
        origins=tuple(args.cors),
        picture_urls=args.picture_urls,
    )
    if not is_loopback(args.host) and access.is_open and not args.open:
        expected = "everybody who reaches that address could draw; add --api-key @FILE or --auth @FILE, or --open"
        raise InvalidRequestError("--host", args.host, expected)
    limits = {
        "waiting": args.max_waiting,
        "waiting_each": args.max_waiting_each,
        "work": args.max_work and int(args.max_work),
        "chunks": args.max_chunks,
        "batch": args.max_batch,
        "body_bytes": args.max_body and int(args.max_body * MIB),
        "grace_s": args.grace,
    }
    if args.quantize and args.lora:
        expected = "quantized weights take no LoRAs; leave one of --quantize and --lora out"
        raise InvalidRequestError("--quantize", args.quantize, expected)
    devices = _devices(args)
    return Settings(
        host=args.host,
        port=args.port,
        name=args.name,
        devices=devices,
        drawing=Drawing(
            models=models,
            model_dir=args.model_dir,
            threads=max(1, (os.cpu_count() or 1) // len(devices)) if len(devices) > 1 else 0,
            half=args.fp16,
            memory=args.memory,
            safety_checker=False if args.no_safety_checker else True if args.require_safety_checker else "auto",
            loras=tuple(file for path in args.lora for file in _weights("--lora", path)),
            embeddings=tuple(file for path in args.embedding for file in _weights("--embedding", path)),
            vae=args.vae,
            quantize=args.quantize,
            max_memory=args.max_memory and int(args.max_memory * _GIB),
            folder=None if args.no_save else args.outdir,
        ),
        limits=Limits(**{name: value for name, value in limits.items() if value is not None}),
        access=access,
        page=not args.no_page,
    )


def _devices(args: argparse.Namespace) -> tuple[str, ...]:
    if args.devices and args.workers:
        raise InvalidRequestError("--workers", args.workers, "is for the CPU, --devices for GPUs; leave one out")
    if args.devices:
        return tuple(f"cuda:{number}" for number in range(args.devices))
    if args.workers:
        return ("cpu",) * int(args.workers)
    return ("auto",)


def _weights(flag: str, path: Path) -> list[Path]:
    from flagai_altdiff.model_files import is_weight

    if path.is_dir():
        return sorted(file.absolute() for file in path.iterdir() if is_weight(file.name))
    if not path.is_file():
        raise InvalidRequestError(flag, str(path), "there is no such file")
    return [path.absolute()]


def _secret(flag: str, typed: str | None, variable: str) -> str:
    """A key or password: typed, from a file, or from the environment."""
    given = os.environ.get(variable, "") if typed is None else typed
    if given.startswith("@"):
        try:
            with open(given[1:], encoding="utf-8") as file:
                given = file.read(_MAX_SECRET).strip()
        except (OSError, ValueError) as error:
            raise InvalidRequestError(flag, given, f"the file cannot be read ({error})") from error
        if not given:
            raise InvalidRequestError(flag, typed, "the file is empty")
    if typed is not None and not given:
        raise InvalidRequestError(flag, "", "expected a text; an empty one would let everybody in")
    return given
