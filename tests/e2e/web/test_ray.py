"""Two replicas on Ray Serve, under load, one of which is killed in the middle."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
SCRIPT = f"""
import json, os, signal, sys, time, threading
import ray, requests
from ray import serve
sys.path.insert(0, {str(ROOT)!r})
from examples.ray_serve import deployment
ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR")
two = deployment.options(autoscaling_config=None, num_replicas=2)
serve.start(http_options={{"host": "127.0.0.1", "port": int(sys.argv[1])}})
serve.run(two.bind(), name="altdiff")
url = f"http://127.0.0.1:{{sys.argv[1]}}/v1/images/generations"
answers, again = [], []
def ask(seed):
    for _ in range(20):
        try:
            answer = requests.post(url, json={{"prompt": "a red heart", "seed": seed, "steps": 4}}, timeout=60)
            if answer.ok:
                answers.append((seed, answer.json()["data"][0]["b64_json"]))
                return
        except requests.RequestException:
            pass
        again.append(seed)
        time.sleep(1)
threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
for number, thread in enumerate(threads):
    thread.start()
    time.sleep(0.1)
    if number == 8:
        import psutil
        replicas = [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]
        assert len(replicas) == 2, replicas
        replicas[0].kill()
for thread in threads:
    thread.join()
print(json.dumps({{"answers": answers, "again": len(again)}}))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.full
def test_a_replica_that_is_killed_loses_no_picture(tmp_path: Path, script_environment: dict[str, str]) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("the Python package ray is missing: make test-ray")
    environment = {**script_environment, "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", SCRIPT, "18765"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"answers"')))
    records = [
        (seed, json.loads(Image.open(io.BytesIO(base64.b64decode(text))).info["flagai_altdiff"])["seed"])
        for seed, text in found["answers"]
    ]
    assert sorted(seed for seed, _ in records) == list(range(24))
    assert all(seed == own for seed, own in records)
