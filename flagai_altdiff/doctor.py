"""What a machine has to offer, and what on it stands in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flagai_altdiff import __version__, hub
from flagai_altdiff.config import RELEASED, LatentDiffusionConfig
from flagai_altdiff.engine.plan import Size, choose_mode, plan_memory, working_dtype
from flagai_altdiff.errors import DiskError, HubError
from flagai_altdiff.machine import MEMORY_MODES
from flagai_altdiff.memory import free_memory
from flagai_altdiff.registry import MODELS, ModelSpec, embedded_dir

_PACKAGES = ("torch", "transformers", "pytorch-lightning", "safetensors", "tokenizers", "einops", "pillow")
_COMPILERS = ("g++", "clang++", "c++", "cl")
_BUSY = "other programs keep it busy, and threads that wait for each other can take many times as long"
_GIB = 2**30
_LARGEST = "AltDiffusion-m18"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        topic: What was looked at.
        state: What was found.
        advice: What to do about it; empty where all is well.
    """

    topic: str
    state: str
    advice: str = ""


def examine(model_dir: Path) -> Iterator[Finding]:
    """Look at this machine.

    Args:
        model_dir: Folder of the model folders.
    """
    yield Finding("flagai_altdiff", f"{__version__} in {Path(__file__).parent}")
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        yield _package(package)
    yield _shim()
    yield from _devices()
    yield _engines()
    free = free_memory(torch.device("cpu"))
    yield Finding("memory", f"{free / _GIB:.1f} GiB free; {_needed(torch.device('cpu'))}")
    place = model_dir.absolute()
    existing = next(path for path in (place, *place.parents) if os.path.exists(path))
    free = shutil.disk_usage(existing).free
    small = free < MODELS["AltDiffusion-m18"].size_bytes
    yield Finding("disk", f"{free / _GIB:.1f} GiB free at {existing}", "a released model needs 9 GiB" if small else "")
    yield from _network()
    for name, spec in MODELS.items():
        yield _model(spec, (embedded_dir() if spec.embedded else model_dir) / name)


def _network() -> Iterator[Finding]:
    offline = hub.offline_switch()
    yield Finding("network", f"not used: {offline} is set" if offline else "used for missing files only")
    for check in hub.CHECKS:
        try:
            check()
        except HubError as error:
            yield Finding("network", "a variable of the environment is wrong", str(error))


def _model(spec: ModelSpec, folder: Path) -> Finding:
    try:
        missing = hub.missing_files(spec, folder)
    except DiskError as error:
        return Finding(spec.name, f"{folder} cannot be read", str(error))
    return Finding(spec.name, f"not in {folder} (missing {', '.join(missing)})" if missing else f"complete in {folder}")


def _package(name: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}")


def _shim() -> Finding:
    """Whether the name ``flagai`` is ours; next to the real package, the one installed last wins."""
    try:
        version = importlib.metadata.version("flagai")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    found = importlib.util.find_spec("flagai")  # found, not imported: the real one loads half of the machine
    if found is None or not found.origin:
        return Finding("import flagai", "not there; scripts that say flagai need it", "pip install flagai-altdiff")
    place = Path(found.origin).parent
    real = os.path.exists(place / "data")  # which ours has not
    advice = "pip uninstall flagai flagai-altdiff && pip install flagai-altdiff" if version or real else ""
    return Finding("import flagai", f"{place}" + (f" (FlagAI {version} is installed too)" if version else ""), advice)


def _needed(device: torch.device) -> str:
    """What the largest model takes of a device in each mode of memory, and which one fits."""
    config, size = RELEASED[_LARGEST], Size(height=512, width=512)
    assert isinstance(config, LatentDiffusionConfig)
    plans = {
        mode: plan_memory(config, size, mode, device.type, working_dtype(mode, device, None))
        for mode in MEMORY_MODES[1:]
    }
    taken = ", ".join(f"{plan.peak / _GIB:.1f} ({mode})" for mode, plan in plans.items())
    chosen = choose_mode(config, size, device, None)
    pages = " beside pages of its file" if device.type == "cpu" else ""
    return f"an image of {_LARGEST} takes about {taken} GiB{pages}; memory=auto chooses {chosen}"


def _engines() -> Finding:
    """What can compute here: ``--engine``."""
    lacking = {
        "openvino": importlib.util.find_spec("openvino") is None,
        "compile": not any(map(shutil.which, _COMPILERS)),
    }
    needed = {"openvino": "pip install openvino", "compile": "a C++ compiler"}
    there = ", ".join(("eager", "packed", *(name for name, lacks in lacking.items() if not lacks)))
    missing = ", ".join(f"{name} ({needed[name]})" for name, lacks in lacking.items() if lacks)
    return Finding("engines", there + (f"; not there: {missing}" if missing else ""))


def _devices() -> Iterator[Finding]:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    busy = threads > 1 and load > cores / 2
    advice = f"{_BUSY}: try OMP_NUM_THREADS={max(threads // 2, 1)}" if busy else ""
    yield Finding("cpu", f"{cores} cores, {threads} threads, load {load:.1f}", advice)
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            yield Finding(
                f"cuda:{i}",
                f"{torch.cuda.get_device_name(i)}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free; "
                f"{_needed(torch.device('cuda', i))}",
            )
    else:
        yield Finding("cuda", "none")
    if torch.backends.mps.is_available():
        yield Finding("mps", "available (float32)")
