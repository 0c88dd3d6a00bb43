"""Running out of memory: refused before any work where that can be known, and answered with a request that fits."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagai_altdiff import GenerationRequest, Predictor
from flagai_altdiff.errors import InsufficientMemoryError
from flagai_altdiff.memory import check_memory, free_memory, memory_advice
from flagai_altdiff.models import LatentDiffusion
from tests import tiny

CPU = torch.device("cpu")
REQUEST = GenerationRequest(prompts="a cat", height=512, width=768, images_per_prompt=6)


def advised(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(n_samples|H|W)=(\d+)", text)}


@pytest.mark.fault(52)
def test_what_cannot_fit_is_refused_before_any_work(m9: LatentDiffusion, tmp_path: Path) -> None:
    size = {"n_samples": 10_000, "H": 8192, "W": 8192, "ddim_steps": 1}
    with pytest.raises(InsufficientMemoryError, match="GiB are free on cpu") as caught:
        Predictor(m9).predict_generate_images(tiny.CAT, tmp_path / "out", **size)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    numbers = advised(str(caught.value))
    request = GenerationRequest(
        prompts="a cat", height=numbers.get("H", 8192), width=numbers.get("W", 8192), images_per_prompt=numbers["n_samples"]
    )
    check_memory(request, m9.config, CPU)


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_every_devices_error_becomes_one_with_advice(error: Exception) -> None:
    with pytest.raises(InsufficientMemoryError, match="6 pictures of 768x512") as caught, memory_advice(REQUEST):
        raise error
    assert caught.value.__cause__ is error
    assert advised(str(caught.value)) == {"n_samples": 3}


@pytest.mark.fault(52)
def test_a_single_picture_is_made_smaller() -> None:
    with pytest.raises(InsufficientMemoryError) as caught, memory_advice(replace(REQUEST, images_per_prompt=1)):
        raise MemoryError
    assert advised(str(caught.value)) == {"H": 320, "W": 512}


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_advice(REQUEST):
        raise RuntimeError("shape mismatch")


def test_free_memory_of_this_machine() -> None:
    assert 2**27 < free_memory(CPU) < 2**45


SCRIPT = """
import resource, sys
from flagai_altdiff import Predictor, load_model
from flagai_altdiff.errors import InsufficientMemoryError
predictor = Predictor(load_model(sys.argv[1]))
predictor.predict_generate_images("a cat", "out", n_samples=1, ddim_steps=1, H=64, W=64, skip_grid=True)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26,) * 2)
try:
    predictor.predict_generate_images("a cat", "out", n_samples=64, ddim_steps=1, H=512, W=512)
except InsufficientMemoryError as error:
    print(error)
predictor.predict_generate_images("a cat", "out", n_samples=1, ddim_steps=1, H=64, W=64, skip_grid=True)
"""


@pytest.mark.fault(52)
@pytest.mark.skipif(sys.platform != "linux", reason="address space can be limited on Linux only")
def test_a_process_that_runs_out_of_memory_says_so_and_goes_on(
    m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(m9_folder)],
        cwd=tmp_path,
        env=script_environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "ran out of memory. Try n_samples=32" in done.stdout
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")) == [
        "out/samples/00000.png",
        "out/samples/00001.png",
    ]
    assert not list(tmp_path.rglob("*.tmp"))
