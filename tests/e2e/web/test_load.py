"""A crowd for a minute: nothing breaks, nobody is forgotten, nothing piles up."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from PIL import Image

from tests.benchmarks.serving import COLOURS, SIZES, memory
from tests.web_server import Server, serving

CLIENTS = int(os.environ.get("ALTDIFF_LOAD_CLIENTS", "60"))
SECONDS = float(os.environ.get("ALTDIFF_LOAD_SECONDS", "60"))
GROWTH = 1.1
"""Memory at the end by that after a third of the time."""
OVER = ("done", "cancelled")


@dataclass
class Crowd:
    """Clients of every kind, and what they met.

    Args:
        url: Of the server.
        until: When they go home, as of ``time.monotonic()``.
    """

    url: str
    until: float
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    states: Counter[str] = field(default_factory=Counter)
    drawn: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, path: str, body: dict[str, Any], client: str) -> requests.Response | None:
        """An answer; ``None`` where the server had no place, and said when to come again."""
        answer = requests.post(self.url + path, json=body, headers={"X-Client": client}, timeout=300)
        with self.lock:
            self.statuses[answer.status_code] += 1
            if answer.status_code in (429, 503):
                if not 1 <= int(answer.headers.get("Retry-After", 0)) <= 600:
                    self.wrong.append(f"{path}: {answer.status_code} without a time: {dict(answer.headers)}")
            elif answer.status_code >= 400:
                self.wrong.append(f"{path}: {answer.status_code} {answer.text[:300]}")
        if answer.ok:
            return answer
        time.sleep(0.2)
        return None

    def check(self, png: bytes, prompt: str, seed: int, size: tuple[int, int]) -> None:
        """Whether a picture is the one that was asked for."""
        image = Image.open(io.BytesIO(png))
        record = json.loads(image.info["flagai_altdiff"])
        with self.lock:
            self.drawn += 1
            if (record["prompt"], record["seed"], image.size) != (prompt, seed, size):
                self.wrong.append(f"asked for {prompt}, {seed}, {size}, got {record}")

    def run(self, number: int, kind: Callable[[Crowd, random.Random, str], None]) -> None:
        chance = random.Random(number)
        while time.monotonic() < self.until:
            try:
                kind(self, chance, f"client {number}")
            except Exception as error:
                with self.lock:
                    self.wrong.append(f"{kind.__name__}: {error!r}")
                return


def wish(chance: random.Random) -> tuple[str, int, tuple[int, int], int]:
    """A prompt, a seed, a size, and a number of steps."""
    return f"a {chance.choice(COLOURS)} heart", chance.randrange(1 << 32), chance.choice(SIZES), chance.choice((4, 8))


def of_openai(crowd: Crowd, chance: random.Random, name: str) -> None:
    prompt, seed, size, steps = wish(chance)
    own = {"prompt": prompt, "seed": seed, "size": "x".join(map(str, size)), "steps": steps}
    answer = crowd.ask("/v1/images/generations", {**own, "response_format": "b64_json"}, name)
    if answer:
        crowd.check(base64.b64decode(answer.json()["data"][0]["b64_json"]), prompt, seed, size)


def of_a1111(crowd: Crowd, chance: random.Random, name: str) -> None:
    prompt, seed, size, steps = wish(chance)
    own = {"prompt": prompt, "seed": seed, "width": size[0], "height": size[1], "steps": steps}
    if answer := crowd.ask("/sdapi/v1/txt2img", own, name):
        crowd.check(base64.b64decode(answer.json()["images"][0]), prompt, seed, size)


def of_ours(crowd: Crowd, chance: random.Random, name: str) -> None:
    """A job that is watched to its end, or cancelled on the way."""
    prompt, seed, size, steps = wish(chance)
    own = {"prompt": prompt, "seed": seed, "width": size[0], "height": size[1], "steps": steps}
    answer = crowd.ask("/api/jobs", own, name)
    if not answer:
        return
    address = f"{crowd.url}/api/jobs/{answer.json()['id']}"
    if chance.random() < 0.3:
        time.sleep(chance.uniform(0, 1))
        requests.delete(address, timeout=60)
    while (job := requests.get(address, timeout=60).json())["state"] in ("waiting", "drawing"):
        time.sleep(0.1)
    with crowd.lock:
        crowd.states[job["state"]] += 1
    for image in job["images"] if job["state"] == "done" else ():
        crowd.check(requests.get(crowd.url + image["url"], timeout=60).content, prompt, seed, size)


def rude(crowd: Crowd, chance: random.Random, name: str) -> None:
    """Half a request, nonsense, or a whole one whose answer nobody waits for."""
    where = urlsplit(crowd.url)
    body = json.dumps({"prompt": "rude", "steps": 50, "user": name}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((where.hostname or "", where.port or 0), 30) as connection:
        connection.sendall((head + body, head + body[:9], b"GET /", os.urandom(400))[chance.randrange(4)])
        time.sleep(chance.uniform(0.1, 1.0))


def counted(server: Server) -> dict[str, float]:
    """Jobs that are over, by how they ended."""
    found = re.findall(r'^altdiff_jobs_total\{state="(\w+)"\} (\S+)', server.get("/metrics").text, re.MULTILINE)
    return {state: float(number) for state, number in found}


def average_memory(server: Server) -> float:
    """Megabytes over two seconds, as every batch takes some and gives it back."""
    samples = []
    for _ in range(10):
        samples.append(memory(server))
        time.sleep(0.2)
    return sum(samples) / len(samples)


@pytest.mark.full
@pytest.mark.fault(61)
def test_a_crowd_breaks_nothing(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page", "--max-waiting", "32") as server:
        server.finished(server.submit()["id"])
        began = time.monotonic()
        crowd = Crowd(server.url, began + SECONDS)
        kinds = (of_openai, of_a1111, of_ours, of_ours, rude)
        threads = [threading.Thread(target=crowd.run, args=(n, kinds[n % len(kinds)])) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(max(SECONDS / 3 - 2, 0))
        early = average_memory(server)
        time.sleep(max(crowd.until - 2 - time.monotonic(), 0))
        late = average_memory(server)
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        server.until(lambda: server.get("/api/jobs").json()["jobs"], lambda jobs: jobs == [])
        print(f"\n{crowd.drawn} images, {dict(crowd.statuses)}, {dict(crowd.states)}, {counted(server)}")
        print(f"memory {early:.0f} MB, then {late:.0f} MB")
        assert crowd.wrong == []
        assert crowd.drawn > 0 and set(crowd.states) <= set(OVER) and set(counted(server)) <= set(OVER)
        assert late <= GROWTH * early
        assert server.get("/readyz").json()["workers"][0]["restarts"] == 0
        assert "Traceback" not in server.log
