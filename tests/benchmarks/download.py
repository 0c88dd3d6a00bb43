"""How long a download with verification takes, next to ``curl`` and ``sha256sum`` on the same file from the same
server.

    python tests/benchmarks/download.py --mib 1024 --rounds 5

Both sides take turns in one run; each of ours is a process of its own, started before the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SERVER = """
import os, socket, sys, threading
path = sys.argv[1]
size = os.path.getsize(path)
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)

def answer(connection):
    with connection, open(path, "rb") as file:
        connection.recv(65536)
        head = f"HTTP/1.1 200 OK\\r\\nContent-Length: {size}\\r\\nConnection: close\\r\\n\\r\\n"
        connection.sendall(head.encode())
        sent = 0
        while sent < size:
            sent += os.sendfile(connection.fileno(), file.fileno(), sent, 1 << 22)

while True:
    threading.Thread(target=answer, args=listening.accept()[:1], daemon=True).start()
"""
CLIENT = """
import resource, sys, time
from pathlib import Path
from flagai_altdiff.hub.transfer import download
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
received = download(sys.argv[1], Path(sys.argv[2]), sha256=sys.argv[3])
took = time.perf_counter() - began
print(took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--most", type=float, default=1.25, help="exit status 1 above this ratio (default: %(default)s)"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        return compare(Path(place), args.mib, args.rounds, args.most)


def compare(place: Path, mib: int, rounds: int, most: float) -> int:
    original, digest = place / "original", hashlib.sha256()
    with open(original, "wb") as file:
        for _ in range(mib):
            piece = os.urandom(1 << 20)
            file.write(piece)
            digest.update(piece)
    with subprocess.Popen([sys.executable, "-c", SERVER, str(original)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}/file"
        theirs, ours, grown_mib = [], [], []
        for turn in range(rounds):
            theirs.append(curl(url, place / "theirs"))
            took, grown = download(url, place / "ours", digest.hexdigest())
            ours.append(took)
            grown_mib.append(grown)
            print(
                f"{turn + 1}: curl + sha256sum {theirs[-1]:.2f} s, download {took:.2f} s, memory +{grown:.1f} MiB",
                flush=True,
            )
        server.kill()
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(
        f"{mib} MiB, medians of {rounds}: "
        f"{statistics.median(ours):.2f} s / {statistics.median(theirs):.2f} s = {ratio:.2f}"
    )
    print(
        f"ratio of the fastest: {min(ours) / min(theirs):.2f}; most memory beyond the start: {max(grown_mib):.1f} MiB"
    )
    return 0 if ratio <= most else 1


def curl(url: str, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(f"curl -sS -o '{target}' {url} && sha256sum '{target}' > /dev/null", shell=True, check=True)
    took = time.perf_counter() - began
    target.unlink()
    return took


def download(url: str, target: Path, sha256: str) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, url, str(target), sha256], check=True, capture_output=True, text=True
    )
    target.unlink()
    took, grown = map(float, done.stdout.split())
    return took, grown


if __name__ == "__main__":
    raise SystemExit(main())
