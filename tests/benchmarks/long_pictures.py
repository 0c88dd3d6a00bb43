"""Memory of long pictures in windows: ``python -m tests.benchmarks.long_pictures``."""

from __future__ import annotations

import resource
import subprocess
import sys

WIDTHS = (512, 2048, 8192)


def draw(width: int) -> None:
    """Draw 512 px high and so wide with a tiny model, and print the process's peak, in MiB."""
    import tempfile
    from pathlib import Path

    import torch

    from flagai_altdiff import generate
    from flagai_altdiff.loading import load_path
    from tests import tiny

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = load_path(tiny.write_flagai_folder(Path(folder) / "model", "m9"), safety_checker=False)
        generate(model, tiny.CAT, height=512, width=width, window=512, steps=2, seed=1)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Print a line for each width."""
    if len(sys.argv) > 1:
        draw(int(sys.argv[1]))
        return
    for width in WIDTHS:
        words = [sys.executable, "-m", "tests.benchmarks.long_pictures", str(width)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        print(f"512 x {width}: {float(done.stdout):.0f} MiB")


if __name__ == "__main__":
    main()
