"""What goes wrong around a server: floods, clients that go away or say nothing, kills, full disks, vanished models."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image

from tests.web_server import Server, serving

ENDLESS: dict[str, Any] = {"steps": 900, "images_per_prompt": 4}


def address(server: Server) -> tuple[str, int]:
    where = urlsplit(server.url)
    return where.hostname or "", where.port or 0


@pytest.mark.fault(61)
def test_a_flood_is_turned_away(tmp_path: Path, script_environment: dict[str, str]) -> None:
    words = ["--no-page", "--max-waiting", "3", "--max-waiting-each", "2", "--max-batch", "1", "--max-work", "1e9"]
    with serving(tmp_path, script_environment, *words) as server:
        first = server.submit(**ENDLESS)
        server.until(lambda: server.job(first["id"]), lambda job: job["state"] == "drawing")
        waiting = [server.submit(**ENDLESS) for _ in range(2)]
        refused = server.post("/api/jobs", {"prompt": "a", **ENDLESS})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        other = server.post("/api/jobs", {"prompt": "a"}, headers={"X-Client": "another"})
        assert other.status_code == 202 and other.json()["position"] == 1  # before the second one of the first client
        assert server.post("/v1/images/generations", {"prompt": "a", "user": "third"}).status_code == 429
        assert server.job(waiting[1]["id"])["position"] == 2
        much = server.post("/api/jobs", {"prompt": "a", "width": 1024, "height": 1024, "steps": 1000})
        assert much.status_code == 400 and "1,000,000,000 pixels x steps x images" in much.json()["error"]["message"]
        began = time.monotonic()
        assert server.get("/healthz").ok and server.get("/readyz").json()["waiting"] == 3
        assert time.monotonic() - began < 2


@pytest.mark.fault(62)
def test_a_client_that_goes_away_takes_its_job_along(server: Server) -> None:
    with socket.create_connection(address(server)) as connection:
        body = json.dumps({"prompt": "a", "steps": 900, "n": 4}).encode()
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        jobs = server.until(lambda: server.get("/api/jobs").json()["jobs"], bool)
    job = server.finished(jobs[0]["id"], 20)
    assert (job["state"], job["error"]["text"]) == ("cancelled", "the client went away")


@pytest.mark.fault(62)
@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/api/jobs"])
def test_a_client_that_goes_away_in_the_middle_of_a_request_is_no_error(server: Server, path: str) -> None:
    kind = "multipart/form-data; boundary=b" if path.endswith("edits") else "application/json"
    with socket.create_connection(address(server)) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b'--b\r\n{"prompt"')
        time.sleep(0.2)
    assert server.get("/healthz").ok
    time.sleep(0.2)
    assert "failed" not in server.log and "Traceback" not in server.log


@pytest.mark.fault(62)
def test_many_at_once_get_their_own_pictures(server: Server) -> None:
    wanted = {seed: f"a {colour} heart" for seed, colour in enumerate(["red", "blue", "green", "black"] * 2, 100)}

    def ask(seed: int) -> dict[str, object]:
        answer = requests.post(
            f"{server.url}/sdapi/v1/txt2img",
            json={"prompt": wanted[seed], "seed": seed, "steps": 4, "cfg_scale": 1 + seed % 3},
            timeout=90,
        )
        import base64

        image = Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0])))
        return dict(json.loads(image.info["flagai_altdiff"]))

    with ThreadPoolExecutor(8) as pool:
        records = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    for seed, record in records.items():
        assert (record["prompt"], record["seed"], record["guidance_scale"]) == (wanted[seed], seed, 1 + seed % 3)
    counted = server.get("/metrics").text
    alone = next(
        float(line.split()[-1]) for line in counted.splitlines() if 'altdiff_batch_jobs_bucket{le="1.0"}' in line
    )
    total = next(
        float(line.split()[-1]) for line in counted.splitlines() if line.startswith("altdiff_batch_jobs_count")
    )
    assert total > alone  # some were drawn together


@pytest.mark.fault(62)
def test_who_leaves_a_batch_is_answered_at_once_and_leaves_the_others_alone(server: Server) -> None:
    options: dict[str, Any] = {"steps": 60, "sampler": "euler_ancestral", "height": 64, "width": 64}
    wanted = {seed: f"a {colour} heart" for seed, colour in ((100, "red"), (101, "blue"), (102, "green"))}

    def together() -> dict[int, str]:
        """Jobs that wait for one that is drawn meanwhile, and are then drawn in one batch."""
        first = server.submit(**ENDLESS)
        server.until(lambda: server.job(first["id"]), lambda job: job["step"] >= 1)
        jobs = {seed: server.submit(prompt, seed=seed, **options)["id"] for seed, prompt in wanted.items()}
        server.session.delete(f"{server.url}/api/jobs/{first['id']}")
        server.until(lambda: [server.job(job)["step"] for job in jobs.values()], all)
        return jobs

    def picture(job: dict[str, Any]) -> np.ndarray[Any, Any]:
        assert job["state"] == "done", job
        return np.asarray(Image.open(io.BytesIO(server.get(job["images"][0]["url"]).content)), int)

    jobs = together()
    assert server.session.delete(f"{server.url}/api/jobs/{jobs[101]}").json()["state"] == "cancelled"
    assert server.job(jobs[100])["state"] == server.job(jobs[102])["state"] == "drawing"
    for seed in (100, 102):
        alone = server.finished(server.submit(wanted[seed], seed=seed, **options)["id"])
        assert np.abs(picture(server.finished(jobs[seed])) - picture(alone)).max() <= 1
    assert server.job(jobs[101])["images"] == []

    began = time.monotonic()
    options |= {"steps": 900, "images_per_prompt": 2, "height": 128, "width": 128}
    for job in together().values():
        server.session.delete(f"{server.url}/api/jobs/{job}")
    assert server.finished(server.submit()["id"])["state"] == "done"  # so the process is free again
    assert time.monotonic() - began < 20


@pytest.mark.fault(65)
def test_slow_and_silent_clients_hold_nobody_up(server: Server) -> None:
    silent = [socket.create_connection(address(server)) for _ in range(20)]
    for number, connection in enumerate(silent):
        connection.sendall([b"", b"GET /healthz HTTP/1.1\r\nHost: loc", b"POST /api/jobs HTT"][number % 3])
    job = server.submit(steps=200, images_per_prompt=2)
    reader = requests.get(f"{server.url}/api/jobs/{job['id']}/events", stream=True, timeout=60)  # and nobody reads
    began = time.monotonic()
    assert server.get("/healthz").ok and time.monotonic() - began < 2
    assert server.finished(job["id"])["state"] == "done"
    reader.close()
    polling = http.client.HTTPConnection(*address(server))
    polling.auto_open = False  # a connection that is in use stays
    polling.connect()
    for _ in range(60):
        polling.request("GET", "/healthz")
        assert polling.getresponse().read()
        time.sleep(0.2)
    for connection in silent:  # no whole request in ten seconds: closed
        connection.settimeout(15)
        assert connection.recv(1) == b""
        connection.close()


@pytest.mark.fault(66)
def test_what_was_begun_is_finished_within_the_grace(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page", "--grace", "60", "--max-batch", "1") as server:
        begun = server.submit(steps=60)
        server.until(lambda: server.job(begun["id"]), lambda job: job["step"] >= 1)
        waiting: list[requests.Response] = []
        asking = threading.Thread(
            target=lambda: waiting.append(server.post("/v1/images/generations", {"prompt": "a", "steps": 5}))
        )
        asking.start()
        server.until(lambda: server.get("/readyz").json(), lambda state: state["waiting"] == 1)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: server.get("/readyz"), lambda answer: answer.status_code == 503)
        late = server.post("/api/jobs", {"prompt": "late"})
        assert late.status_code == 503 and "retry-after" in late.headers
        asking.join(30)
        assert waiting[0].status_code == 503 and waiting[0].json()["error"]["code"] == "stopping"
        assert server.process.wait(90) == 128 + signal.SIGTERM
        assert "Traceback" not in server.log
        assert [path.name for path in server.samples.iterdir()] == ["00000.png"]


@pytest.mark.fault(66)
def test_the_grace_has_an_end(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page", "--grace", "0.5") as server:
        job = server.submit(**ENDLESS)
        server.until(lambda: server.job(job["id"]), lambda now: now["step"] >= 1)
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == 128 + signal.SIGINT
        assert time.monotonic() - began < 15
        assert "Traceback" not in server.log


def test_a_server_without_its_model_says_so_and_ends(
    tmp_path: Path, script_environment: dict[str, str], m9_folder: Path
) -> None:
    broken = shutil.copytree(m9_folder, tmp_path / "broken")
    (broken / "config.yaml").write_text("model: {}", encoding="utf-8")
    command = [sys.executable, "-m", "flagai_altdiff", "serve", "--port", "0", "--no-page", "--models", str(broken)]
    ended = subprocess.run(command, cwd=tmp_path, env=script_environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "config.yaml" in ended.stderr
    assert "Traceback" not in ended.stderr and "starting another" not in ended.stderr
    models = f"AltDiffusion-mini,{broken}"
    with serving(tmp_path / "both", script_environment, "--no-page", "--models", models) as server:
        assert server.finished(server.submit()["id"])["state"] == "done"
        (name,) = {"AltDiffusion-m9", "broken"} & set(re.findall(r"(\S+) is not served", server.log))
        answer = server.post("/api/jobs", {"prompt": "a cat", "model": name})
        assert answer.status_code == 400 and "could not be had" in answer.json()["error"]["message"]


def test_a_server_without_its_gpus_says_so_and_ends(tmp_path: Path, script_environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "flagai_altdiff", "serve", "--port", "0", "--no-page", "--devices", "2"]
    none = {**script_environment, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=tmp_path, env=none, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1 and "error: cuda:" in ended.stderr
    assert "Traceback" not in ended.stderr and "starting another" not in ended.stderr


def test_whoever_asks_is_told_what_is_not_done(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page") as server:
        job = server.finished(server.submit("florbnax on a red background", width=130)["id"])
        floored, unknown = job["notes"]
        assert "130x128" in floored and "knows nothing that 'florbnax on a red background' names" in unknown
        asked = {"prompt": "cat", "steps": 2, "styles": ["x"], "alwayson_scripts": {"controlnet": {"args": []}}}
        info = json.loads(server.post("/sdapi/v1/txt2img", asked).json()["info"])
        assert info["ignored"] == {name: asked[name] for name in ("styles", "alwayson_scripts")}


def test_a_worker_that_is_killed_loses_its_own_job_only(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page", "--max-batch", "1") as server:
        drawn, waiting = server.submit(**ENDLESS), server.submit(seed=4)
        server.until(lambda: server.job(drawn["id"]), lambda job: job["step"] >= 1)
        (pid,) = server.workers()
        os.kill(pid, signal.SIGKILL)
        failed = server.finished(drawn["id"])
        assert failed["state"] == "failed" and failed["error"]["code"] == "worker_died"
        assert "signal 9" in failed["error"]["text"]
        assert server.finished(waiting["id"])["state"] == "done"
        assert server.get("/readyz").json()["workers"][0]["restarts"] == 1
        assert server.workers() != [pid]


def test_a_worker_that_finds_no_model_tries_again(
    tmp_path: Path, script_environment: dict[str, str], m9_folder: Path
) -> None:
    folder = shutil.copytree(m9_folder, tmp_path / "AltDiffusion-m9")
    with serving(tmp_path, script_environment, "--no-page", "--models", str(folder)) as server:
        assert server.get("/readyz").ok
        moved = folder.rename(tmp_path / "moved")
        os.kill(server.workers()[0], signal.SIGKILL)
        server.until(lambda: server.log, lambda log: "cannot draw" in log)
        assert server.get("/readyz").status_code == 503
        waiting = server.submit(height=64, width=64)
        moved.rename(folder)
        assert server.finished(waiting["id"])["state"] == "done" and server.get("/readyz").ok


def test_two_workers_draw_side_by_side(tmp_path: Path, script_environment: dict[str, str]) -> None:
    words = ["--no-page", "--max-batch", "1", "--workers", "2", "--name", "a"]
    with serving(tmp_path, script_environment, *words) as server:
        server.until(server.workers, lambda pids: len(pids) == 2)
        jobs = [server.submit(**ENDLESS) for _ in range(2)]
        assert all(job["id"].startswith("a-") for job in jobs)
        server.until(lambda: [server.job(job["id"])["step"] for job in jobs], all)
        os.kill(server.workers()[0], signal.SIGKILL)
        states = server.until(
            lambda: sorted(server.job(job["id"])["state"] for job in jobs), lambda states: "failed" in states
        )
        assert states == ["drawing", "failed"]
        assert server.finished(server.submit()["id"])["state"] == "done"


def test_a_server_that_is_killed_tells_what_it_did_not_draw(tmp_path: Path, script_environment: dict[str, str]) -> None:
    with serving(tmp_path, script_environment, "--no-page", "--max-batch", "1") as server:
        done = server.finished(server.submit(seed=4)["id"])
        cancelled, failed = server.submit("cancelled", **ENDLESS), server.submit("failed", **ENDLESS)
        server.session.delete(f"{server.url}/api/jobs/{cancelled['id']}")
        server.until(lambda: server.job(failed["id"]), lambda job: job["step"] >= 1)
        os.kill(server.workers()[0], signal.SIGKILL)
        server.finished(failed["id"])
        begun, waiting = server.submit("begun", **ENDLESS), server.submit("waiting")
        server.until(lambda: server.job(begun["id"]), lambda job: job["step"] >= 1)
        before = {own["id"]: own["state"] for own in server.get("/api/history").json()["jobs"]}
        assert before == {failed["id"]: "failed", cancelled["id"]: "cancelled"}
        workers = server.workers()
        server.stop(signal.SIGKILL)
        server.until(lambda: [pid for pid in workers if Path(f"/proc/{pid}").exists()], lambda left: not left, 20)
    with serving(tmp_path, script_environment, "--no-page") as server:
        told = {own["id"]: own for own in server.get("/api/jobs").json()["interrupted"]}
        assert told.keys() == {begun["id"], waiting["id"]}
        assert told[waiting["id"]]["request"]["prompts"] == ["waiting"]
        assert server.job(begun["id"])["state"] == "interrupted"
        after = server.get("/api/history").json()["jobs"]
        assert [(own["id"], own["state"], own["error"]["code"]) for own in after] == [
            (waiting["id"], "interrupted", "interrupted"),
            (begun["id"], "interrupted", "interrupted"),
            (failed["id"], "failed", "worker_died"),
            (cancelled["id"], "cancelled", "cancelled"),
        ]
        assert server.job(failed["id"])["request"]["prompts"] == ["failed"]
        assert server.get("/api/history?before=1").json()["jobs"] == []
        assert server.get("/api/history").json()["images"][0]["record"]["seed"] == done["images"][0]["seed"]
        server.session.delete(f"{server.url}/api/jobs/{begun['id']}")
        assert server.get(f"/api/jobs/{begun['id']}").status_code == 404
        assert [own["id"] for own in server.get("/api/jobs").json()["interrupted"]] == [waiting["id"]]


def test_a_full_disk_loses_no_picture(tmp_path: Path, script_environment: dict[str, str]) -> None:
    """Files of 4 KB at most: the journal has room, a picture has none."""
    with serving(tmp_path, script_environment, "--no-page") as server:
        (pid,) = server.workers()
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        job = server.finished(server.submit(seed=4)["id"])
        assert job["state"] == "done" and "File too large" in job["notes"][0]
        answer = server.get(job["images"][0]["url"])
        assert json.loads(Image.open(io.BytesIO(answer.content)).info["flagai_altdiff"])["seed"] == 4
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert server.finished(server.submit()["id"])["notes"] == []


def test_a_model_that_vanishes_fails_its_own_jobs(
    tmp_path: Path, script_environment: dict[str, str], m9_folder: Path
) -> None:
    shutil.copytree(m9_folder, tmp_path / "AltDiffusion-m9")
    with serving(
        tmp_path, script_environment, "--models", "AltDiffusion-mini,AltDiffusion-m9", "--model-dir", "."
    ) as server:
        shutil.rmtree(tmp_path / "AltDiffusion-m9")
        job = server.finished(server.submit(model="AltDiffusion-m9", height=64, width=64)["id"])
        assert job["state"] == "failed" and "AltDiffusion-m9" in job["error"]["text"]
        assert server.finished(server.submit()["id"])["state"] == "done"
