"""What the server costs and what batching gains: python -m tests.benchmarks.serving FOLDER [--clients 60 --seconds 60].

First the overhead over ``generate()`` for one request, then the throughput of eight waiting requests with batching and
without, then a crowd: clients of mixed sizes, a third of them rude, every image checked against its record.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from PIL import Image

from flagai_altdiff import generate, load_model
from tests.web_server import Server, serving

SIZES = ((64, 64), (128, 128), (128, 64), (192, 128))
COLOURS = ("red", "blue", "green", "black", "white", "purple", "orange", "yellow")
ROUNDS = 3


def draw(url: str, prompt: str, seed: int, **options: Any) -> dict[str, Any]:
    """An image's record, through OpenAI's interface."""
    body = {"prompt": prompt, "seed": seed, "response_format": "b64_json", **options}
    answer = requests.post(f"{url}/v1/images/generations", json=body, timeout=300)
    answer.raise_for_status()
    image = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    return dict(json.loads(image.info["flagai_altdiff"]))


def timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def overhead(server: Server, steps: int) -> tuple[float, float]:
    """Median seconds of one request of so many steps: the server's, and those of ``generate()`` in this process."""
    model = load_model("AltDiffusion-mini")
    served, own = [], []
    for number in range(2 * ROUNDS):  # in turn, as other programs come and go
        served.append(timed(lambda n=number: draw(server.url, "a red heart", n, steps=steps)))
        own.append(timed(lambda n=number: generate(model, "a red heart", seed=n, steps=steps)))
    return statistics.median(served), statistics.median(own)


def eight(server: Server) -> float:
    """Median seconds from the first step to the last image of eight requests that wait together."""

    def once() -> float:
        busy = server.submit(steps=20)
        jobs = [server.submit(seed=seed, steps=20) for seed in range(8)]
        server.finished(busy["id"])
        return timed(lambda: [server.finished(job["id"]) for job in jobs])

    return statistics.median(once() for _ in range(ROUNDS))


@dataclass
class Crowd:
    """What clients met."""

    lost: int = 0
    mixed_up: int = 0
    drawn: int = 0
    refused: int = 0
    waits: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def polite(self, url: str, number: int, until: float) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            width, height = chance.choice(SIZES)
            prompt, seed = f"a {chance.choice(COLOURS)} heart", chance.randrange(1 << 32)
            queue = requests.get(f"{url}/readyz", timeout=60).json()["waiting"]
            began = time.perf_counter()
            try:
                own = draw(url, prompt, seed, size=f"{width}x{height}", steps=chance.choice((4, 8)), user=str(number))
            except requests.HTTPError as error:
                if error.response.status_code != 429:
                    self.lost += 1
                else:
                    self.refused += 1
                    time.sleep(0.2)
                continue
            self.waits[queue // 10 * 10].append(time.perf_counter() - began)
            self.drawn += 1
            same = (own["prompt"], own["seed"], own["width"], own["height"]) == (prompt, seed, width, height)
            self.mixed_up += not same

    def rude(self, url: str, number: int, until: float) -> None:
        chance, where = random.Random(number), urlsplit(url)
        body = json.dumps({"prompt": "rude", "steps": 50, "user": f"rude {number}"}).encode()
        head = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        )
        while time.monotonic() < until:
            with socket.create_connection((where.hostname or "", where.port or 0), 10) as connection:
                kind = chance.randrange(4)
                connection.sendall((head + body, head + body[:9], b"GET /", os.urandom(400))[kind])
                time.sleep(chance.uniform(0.1, 1.0))  # and goes away


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def crowd(server: Server, clients: int, seconds: float) -> Crowd:
    """So many clients at once, a third of them rude."""
    found, until = Crowd(), time.monotonic() + seconds
    kinds = [found.rude if number % 3 == 0 else found.polite for number in range(clients)]
    threads = [threading.Thread(target=kind, args=(server.url, n, until)) for n, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def memory(server: Server) -> float:
    """Megabytes of the server and its processes."""
    whole = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (whole, *whole.children(recursive=True))) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--steps", type=int, default=70, help="of the request whose overhead is measured")
    args = parser.parse_args()
    environment = dict(os.environ)
    began = time.perf_counter()
    with serving(args.folder / "page", environment) as server:
        server.finished(server.submit(steps=20)["id"])
        print(f"from the command to the first picture, page and all: {time.perf_counter() - began:.1f} s")
    with serving(args.folder / "batched", environment, "--no-page") as server:
        server.finished(server.submit()["id"])
        served, own = overhead(server, args.steps)
        print(f"one request: {served:.3f} s, generate() {own:.3f} s, overhead {served / own - 1:+.1%}")
        together = eight(server)
        crowd(server, args.clients, args.seconds / 3)  # until everything has been used once
        before = memory(server)
        found = crowd(server, args.clients, args.seconds)
        server.until(lambda: server.get("/readyz").json()["waiting"], lambda waiting: waiting == 0)
        after = memory(server)
    with serving(args.folder / "alone", environment, "--no-page", "--max-batch", "1") as server:
        server.finished(server.submit()["id"])
        alone = eight(server)
    print(
        f"eight waiting requests: {together:.2f} s in batches, {alone:.2f} s one by one: {alone / together:.2f} times"
    )
    print(
        f"{found.drawn} images drawn, {found.mixed_up} mixed up, {found.lost} lost, {found.refused} asked to come again"
    )
    print(f"memory {before:.0f} MB before, {after:.0f} MB after")
    for queue, waits in sorted(found.waits.items()):
        p50, p95 = percentile(waits, 0.5), percentile(waits, 0.95)
        print(f"queue {queue:2} to {queue + 9:2}: {len(waits):4} images, p50 {p50:.2f} s, p95 {p95:.2f} s")


if __name__ == "__main__":
    main()
