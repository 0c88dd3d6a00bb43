"""Running out of memory: refused before any work where that can be known, and answered with a request that fits."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagai_altdiff import GenerationRequest, Predictor
from flagai_altdiff.errors import InsufficientMemoryError
from flagai_altdiff.machine import free_main_memory, total_main_memory
from flagai_altdiff.memory import Planning, free_memory, memory_advice
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare
from flagai_altdiff.request import ResolvedRequest
from tests import tiny
from tests.processes import Nursery

CPU = torch.device("cpu")
REQUEST = GenerationRequest(prompts=("a cat",), height=512, width=768, images_per_prompt=6).resolve(
    height=64, width=64, steps=1, guidance_scale=1.0, downsampling=8, halvings=1
)


def pixels(request: ResolvedRequest) -> int:
    """Of all that is drawn at once."""
    return request.batch_size * request.height * request.width


PIXELS = Planning(batch=pixels)


def advised(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"\b(n_samples|H|W)=(\d+)", text)}


@pytest.mark.fault(52)
def test_what_cannot_fit_is_refused_before_any_work(m9: LatentDiffusion, tmp_path: Path) -> None:
    size = {"n_samples": 10_000, "H": 8192, "W": 8192, "ddim_steps": 1}
    with pytest.raises(InsufficientMemoryError, match="GiB are free on cpu") as caught:
        Predictor(m9).predict_generate_images(tiny.CAT, tmp_path / "out", **size)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    numbers = advised(str(caught.value))
    fitting = {"height": numbers.get("H", 8192), "width": numbers.get("W", 8192)}
    prepare(m9, "a cat", images_per_prompt=numbers["n_samples"], **fitting)


@pytest.mark.fault(52)
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_every_devices_error_becomes_one_with_advice(error: Exception) -> None:
    with pytest.raises(InsufficientMemoryError, match="6 images of 768x512") as caught, memory_advice(REQUEST, PIXELS):
        raise error
    assert caught.value.__cause__ is error
    assert advised(str(caught.value)) == {"n_samples": 3}


@pytest.mark.fault(52)
def test_a_single_image_is_made_smaller() -> None:
    with pytest.raises(InsufficientMemoryError) as caught, memory_advice(replace(REQUEST, batch_size=1), PIXELS):
        raise MemoryError
    assert str(caught.value) == "drawing an image of 768x512 ran out of memory. Try H=320 and W=512."


@pytest.mark.fault(52)
def test_images_are_made_smaller_where_fewer_of_them_save_nothing() -> None:
    def of_an_image(request: ResolvedRequest) -> int:
        return request.height * request.width

    with pytest.raises(InsufficientMemoryError) as caught, memory_advice(REQUEST, Planning(batch=of_an_image)):
        raise MemoryError
    assert advised(str(caught.value)) == {"n_samples": 1, "H": 320, "W": 512}


@pytest.mark.fault(52)
def test_other_ways_that_fit_are_told_too() -> None:
    def way(_: ResolvedRequest) -> dict[str, int]:
        return {"memory='low'": 1 << 40, "memory='lowest'": 1, "window=512": 2}

    planning = Planning(batch=lambda _: 1 << 40, otherwise=way)
    with pytest.raises(InsufficientMemoryError) as caught, memory_advice(REQUEST, planning):
        raise MemoryError
    assert str(caught.value).endswith("ran out of memory. Try memory='lowest', or window=512.")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), memory_advice(REQUEST, PIXELS):
        raise RuntimeError("shape mismatch")


def test_free_memory_of_this_machine() -> None:
    assert 2**27 < free_memory(CPU) < 2**45


MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
FREE = 8_000_000 * 1024
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "33 32 0:30 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
    "34 32 0:31 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
)


def machine(root: Path, files: dict[str, str]) -> Path:
    """A root folder with what the kernel would show."""
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return root


def v2(group: str = "/", mount: str = V2_MOUNT, **files: str) -> dict[str, str]:
    """Control groups of version 2; the names of files have ``__`` for ``/`` and ``_`` for ``.``."""
    shown = {
        f"sys/fs/cgroup/{name.replace('__', '/').replace('memory_', 'memory.')}": text for name, text in files.items()
    }
    return {"proc/self/cgroup": f"0::{group}\n", "proc/self/mountinfo": mount, **shown}


def v1(group: str = "/docker/abc", **files: str) -> dict[str, str]:
    shown = {f"sys/fs/cgroup/memory/{name.replace('memory_', 'memory.')}": text for name, text in files.items()}
    own = f"12:cpu,cpuacct:{group}\n4:memory:{group}\n1:name=systemd:{group}\n0::/\n"
    return {
        "proc/self/cgroup": own,
        "proc/self/mountinfo": V1_MOUNTS + V2_MOUNT.replace("cgroup ", "cgroup/unified ", 1),
        **shown,
    }


GIB = 2**30
MACHINES = {
    "no limits": ({}, FREE),
    "nothing under /proc/self": ({"proc/self/cgroup": "", "proc/self/mountinfo": ""}, FREE),
    "no limit": (v2(memory_max="max\n", memory_high="max\n", memory_current="123\n"), FREE),
    "a limit": (v2(memory_max=f"{GIB}\n", memory_current="4096\n"), GIB - 4096),
    "a soft limit": (v2(memory_max="max\n", memory_high=f"{GIB}\n", memory_current="4096\n"), GIB - 4096),
    "file cache counts as free": (
        v2(
            memory_max=f"{GIB}\n",
            memory_current=f"{GIB}\n",
            memory_stat="anon 5\nactive_file 7\ninactive_file 4096\nfile 9\n",
        ),
        4096,
    ),
    "more in use than allowed": (v2(memory_max=f"{GIB}\n", memory_current=f"{2 * GIB}\n"), 0),
    "more cache than use": (v2(memory_max=f"{GIB}\n", memory_current="5\n", memory_stat=f"inactive_file {GIB}\n"), GIB),
    "a limit of a group above": (
        v2("/a/b", a__b__memory_max="max", a__memory_max=f"{GIB}", a__memory_current="1000"),
        GIB - 1000,
    ),
    "the smallest of all groups": (v2("/a/b", a__b__memory_max=f"{GIB}", a__memory_max=f"{2 * GIB}"), GIB),
    "another group's limit": (v2("/a/b", c__memory_max="1000"), FREE),
    "a container that sees the host's name": (
        v2("/docker/abc", V2_MOUNT.replace("0:28 /", "0:28 /docker/abc"), memory_max=f"{GIB}"),
        GIB,
    ),
    "a name outside the mount": (v2("/../../x", memory_max=f"{GIB}"), GIB),
    "a mount point with a blank": (
        {**v2(mount=V2_MOUNT.replace("/sys/fs/cgroup", "/mnt/c\\040g")), "mnt/c g/memory.max": f"{GIB}"},
        GIB,
    ),
    "version 1": (v1(memory_limit_in_bytes=f"{GIB}\n", memory_usage_in_bytes="4096\n"), GIB - 4096),
    "version 1, no limit": (v1(memory_limit_in_bytes="9223372036854771712\n", memory_usage_in_bytes="4096\n"), FREE),
    "version 1, file cache": (
        v1(
            memory_limit_in_bytes=f"{GIB}",
            memory_usage_in_bytes=f"{GIB}",
            memory_stat="inactive_file 1\ntotal_inactive_file 8192\n",
        ),
        8192,
    ),
    "not numbers": (
        v2(memory_max="-1\n", memory_high="a lot", memory_current="\udcff\udcfe", memory_stat="inactive_file x"),
        FREE,
    ),
    "a number too long": (v2(memory_max="9" * 5000, memory_current="9" * 5000), FREE),
    "not the kernel's": (
        {"proc/self/cgroup": "\udcff\0:\n:::::\n0::", "proc/self/mountinfo": " - \n- cgroup2\n" + "a " * 99},
        FREE,
    ),
}


@pytest.mark.fault(119)
@pytest.mark.parametrize("name", MACHINES)
def test_the_smallest_limit_counts(name: str, tmp_path: Path) -> None:
    files, expected = MACHINES[name]
    assert free_main_memory(machine(tmp_path, files)) == expected


def test_files_that_cannot_be_read_limit_nothing(tmp_path: Path) -> None:
    root = machine(tmp_path, v2())
    (root / "sys/fs/cgroup/memory.max").mkdir(parents=True)
    (root / "sys/fs/cgroup/memory.current").symlink_to("memory.current")
    assert free_main_memory(root) == FREE
    assert free_main_memory(tmp_path / "nowhere") > 0


TOTAL = 16_000_000 * 1024
TOTALS = {
    "no limits": TOTAL,
    "no limit": TOTAL,
    "a limit": GIB,
    "a soft limit": GIB,
    "more in use than allowed": GIB,
    "the smallest of all groups": GIB,
    "another group's limit": TOTAL,
    "version 1": GIB,
    "version 1, no limit": TOTAL,
    "not numbers": TOTAL,
}


@pytest.mark.parametrize("name", TOTALS)
def test_what_is_in_use_does_not_count_in_the_total(name: str, tmp_path: Path) -> None:
    root = machine(tmp_path, MACHINES[name][0])
    assert total_main_memory(root) == TOTALS[name]
    assert total_main_memory(tmp_path / "nowhere") >= free_main_memory()


LIMITED = """
import resource, sys
import torch
from flagai_altdiff.machine import free_main_memory, total_main_memory
from flagai_altdiff.memory import free_memory
limit, field = sys.argv[1:]
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
resource.setrlimit(getattr(resource, limit), (used + 2**28,) * 2)
print(free_memory(torch.device("cpu")))
"""


@pytest.mark.fault(119)
@pytest.mark.skipif(sys.platform != "linux", reason="address space can be limited on Linux only")
@pytest.mark.parametrize(("limit", "field"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_limits_of_the_process_count(limit: str, field: str, script_environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", LIMITED, limit, field]
    done = subprocess.run(command, env=script_environment, capture_output=True, text=True, timeout=120, check=True)
    assert 2**27 < float(done.stdout) <= 2**28


SCRIPT = """
import resource, sys
from flagai_altdiff import Predictor, load_model
from flagai_altdiff.errors import InsufficientMemoryError
folder, room, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
predictor = Predictor(load_model(folder))
small = {"n_samples": 1, "ddim_steps": 1, "H": 64, "W": 64, "skip_grid": True}
predictor.predict_generate_images("a cat", "out", **small)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + room,) * 2)
try:
    predictor.predict_generate_images("a cat", "large", n_samples=count, ddim_steps=1, H=512, W=512)
except InsufficientMemoryError as error:
    print(error)
predictor.predict_generate_images("a cat", "out", **small)
"""


@pytest.mark.fault(52)
@pytest.mark.skipif(sys.platform != "linux", reason="address space can be limited on Linux only")
@pytest.mark.parametrize(
    ("room", "count", "message"),
    [
        (2**26, 64, "64 images of 512x512 at once needs about"),
        # more than is surely needed, less than is planned; both images are decoded one by one
        (230 << 20, 2, "ran out of memory. Try n_samples=1 and H=320 and W=320"),
    ],
)
def test_a_process_without_memory_says_so_and_goes_on(
    room: int, count: int, message: str, m9_folder: Path, tmp_path: Path, fresh_process: Nursery
) -> None:
    done = fresh_process.run(SCRIPT, m9_folder, room, count, cwd=tmp_path, timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")) == [
        "out/samples/00000.png",
        "out/samples/00001.png",
    ]
    assert not list(tmp_path.rglob("*.tmp"))
    if "needs about" in message:
        assert not (tmp_path / "large").exists()


_SCATTERED = """
import psutil
from flagai_altdiff.machine import give_back_memory
blocks = [bytearray(64 << 10) for _ in range(3000)]
kept = blocks[::100]
del blocks
before = psutil.Process().memory_info().rss
give_back_memory()
print((before - psutil.Process().memory_info().rss) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_what_lies_between_kept_blocks_is_given_back() -> None:
    assert int(subprocess.check_output([sys.executable, "-c", _SCATTERED])) > 100  # MB
