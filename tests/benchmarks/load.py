"""Time and memory of loading AltDiffusion-m18 at full size (6 GB): this package, FlagAI's way, diffusers.

    python -m tests.benchmarks.load FOLDER [--rounds 3] [--keep]

The clock starts after the imports and stops when every page of every weight was touched. Each side runs in a fresh
process, all in turn, with its files in the page cache. FlagAI's way is what its loader does: a model with freshly drawn
weights, then ``torch.load`` and ``load_state_dict``; with this package's modules, because the original's cannot be
imported any more. diffusers loads the folder that ``altdiff convert --to diffusers`` writes, part by part as its
pipeline does; its deprecated text encoder is loaded by transformers' class of the same layers. ``accelerate`` is
installed for it, which makes it faster.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from flagai_altdiff.convert import convert
from tests.benchmarks.frame import Row, Side, machine, table
from tests.full.test_full_size import write_released_folder

NAME = "AltDiffusion-m18"
FLAGAI = "FlagAI's way"

COMMON = r"""
import gc, json, re, sys, threading, time
from pathlib import Path
import torch

def memory(*fields):
    text = Path("/proc/self/status").read_text()
    return {f: int(re.search(rf"{f}:\s+(\d+)", text)[1]) / 2**20 for f in fields}

class Peak(threading.Thread):
    # the kernel remembers the peak of the sum only; private memory is sampled
    anonymous, running = 0.0, True
    def run(self):
        while self.running:
            self.anonymous = max(self.anonymous, memory("RssAnon")["RssAnon"])
            time.sleep(0.02)

def touch(tensors):
    # one number of each page
    return sum(float(t.detach().flatten()[::1024].float().sum()) for t in tensors if t.numel())
"""

FINISH = r"""
total = touch(weights)
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
peak.running = False
peak.join()
size = sum(t.numel() * t.element_size() for t in weights) / 2**30
highest = memory("VmHWM")["VmHWM"]
found = {"seconds": seconds, "cpu_s": cpu, "peak_gib": highest, "private_gib": peak.anonymous, "weights_gib": size}
print(json.dumps(found))
"""

START = """
peak = Peak(daemon=True); peak.start()
start, cpu_start = time.perf_counter(), time.process_time()
"""

OURS = """
from flagai_altdiff.loading import load_path
from flagai_altdiff.tokenizer import files
files._XLM_R = files.hashlib.sha256((Path(sys.argv[1]) / "sentencepiece.bpe.model").read_bytes()).hexdigest()
"""
"""The released tokenizer is known by its digest, so the made one in its place is as well."""
SIDES = {
    "flagai_altdiff": (
        OURS,
        "model = load_path(Path(sys.argv[1]), safety_checker=False)\nweights = list(model.state_dict().values())\n",
    ),
    "flagai_altdiff, mapped": (
        OURS,
        "model = load_path(Path(sys.argv[1]), safety_checker=False, mapped=True)\n"
        "weights = list(model.state_dict().values())\n",
    ),
    "diffusers": (
        "from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel\n"
        "from transformers import XLMRobertaModel, XLMRobertaTokenizer\n"
        "import transformers; transformers.utils.logging.set_verbosity_error()\n"
        "from safetensors import safe_open\n",  # imported here, not on the clock
        "tokenizer = XLMRobertaTokenizer.from_pretrained(sys.argv[2], subfolder='tokenizer')\n"
        "scheduler = PNDMScheduler.from_pretrained(sys.argv[2], subfolder='scheduler')\n"
        "parts = [UNet2DConditionModel.from_pretrained(sys.argv[2], subfolder='unet'),\n"
        "         AutoencoderKL.from_pretrained(sys.argv[2], subfolder='vae'),\n"
        "         XLMRobertaModel.from_pretrained(sys.argv[2], subfolder='text_encoder', add_pooling_layer=False)]\n"
        "weights = [t for part in parts for t in part.state_dict().values()]\n",
    ),
    FLAGAI: (
        "from flagai_altdiff.models import build_model\nfrom tests.full.test_full_size import CONFIGS\n",
        "model = build_model(CONFIGS['AltDiffusion-m18'])\n"
        "state = torch.load(Path(sys.argv[1]) / 'model.ckpt', map_location='cpu')['state_dict']\n"
        "model.load_state_dict(state, strict=True)\n"
        "weights = list(model.state_dict().values())\n",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where 12 GB of files are made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    args = parser.parse_args()
    print(table([loading(args.folder, args.rounds)]))
    print("goals: our peak at most 1.1x the weights; mapped, 1.4x as fast as diffusers and 17x as FlagAI's way")
    if not args.keep:
        shutil.rmtree(args.folder)


def loading(folder: Path, rounds: int) -> Row:
    """The row of all sides.

    Args:
        folder: Where the files are, or are made.
        rounds: Turns of each side.
    """
    flagai, diffusers = folder / NAME, folder / "diffusers"
    if not flagai.exists():
        write_released_folder(flagai, NAME)
    if not diffusers.exists():
        convert(flagai, diffusers, "diffusers")
    print(f"warm copy of {flagai.name}: {warm(flagai):.1f} s of reading alone")
    sides = {side: Side() for side in SIDES}
    for _ in range(rounds):
        for side, (imports, body) in SIDES.items():
            warm(diffusers if side == "diffusers" else flagai)
            script = COMMON + imports + START + body + FINISH
            done = subprocess.run(
                [sys.executable, "-c", script, str(flagai), str(diffusers)], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr}")
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{side:15} {found}", flush=True)
            sides[side].seconds.append(found["seconds"])
            sides[side].gib = max(found["peak_gib"] - found["weights_gib"], 0.0)
    return Row(name="load", what="loading, all weights touched", reference=FLAGAI, sides=sides, machine=machine())


def warm(folder: Path) -> float:
    """Bring the files into the page cache; seconds that it took."""
    start = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
