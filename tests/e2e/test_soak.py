"""Two hundred pictures in one process: no memory, file or thread is left behind."""

from __future__ import annotations

from pathlib import Path

from tests.processes import Nursery

SCRIPT = """
import gc, os, threading
from flagai_altdiff import Predictor, load_model

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])

def handles():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

predictor = Predictor(load_model("AltDiffusion-mini"))
pages, held = [], []
for i in range(200):
    result = predictor.predict_generate_images(f"a red heart, number {i}", "out", n_samples=1, ddim_steps=1, H=32, W=32)
    assert len(result.paths) == 1
    pages.append(resident_pages())
    held.append(handles())
first, last = sum(pages[:50]) / 50, sum(pages[-50:]) / 50
print(f"memory grew by {100 * (last / first - 1):.2f} %")
assert last <= 1.02 * first, (first, last)
assert held[-1] == held[0], (held[0], held[-1])
assert len(os.listdir("out/samples")) == 200
"""


def test_two_hundred_pictures_leave_nothing_behind(tmp_path: Path, fresh_process: Nursery) -> None:
    done = fresh_process.run(SCRIPT, cwd=tmp_path, timeout_s=600)
    assert done.returncode == 0, done.stderr
