"""Our own interface: jobs that are accepted, watched, fetched and cancelled."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from PIL import Image

from flagai_altdiff import GenerationRequest, generate, load_model
from flagai_altdiff.request import OPTIONS
from tests.web_server import Server


def test_a_job_from_prompt_to_picture(server: Server) -> None:
    job = server.submit("一颗大的红色的心", seed=7, images_per_prompt=2, negative_prompt="blau")
    events = list(server.events(job["id"]))
    names = [name for name, _ in events]
    assert names[-1] == "done" and names.count("image") == 2 and "preview" in names
    steps = [data["step"] for name, data in events if name == "step"]
    assert steps == sorted(steps) and steps[-1] == 4
    done = server.job(job["id"])
    assert [image["seed"] for image in done["images"]] == [7, 8]
    for image in done["images"]:
        answer = server.get(image["url"])
        assert answer.headers["content-type"] == "image/png" and answer.headers["x-content-type-options"] == "nosniff"
        picture = Image.open(io.BytesIO(answer.content))
        record = json.loads(picture.info["flagai_altdiff"])
        assert (record["prompt"], record["seed"], record["index"]) == (
            "一颗大的红色的心",
            image["seed"],
            image["index"],
        )
        assert (server.samples / image["file"]).read_bytes() == answer.content


def test_the_picture_is_the_one_that_python_draws(server: Server) -> None:
    options: dict[str, Any] = {"seed": 11, "steps": 4, "guidance_scale": 2.0, "sampler": "euler"}
    job = server.finished(server.submit("a blue star on a white background", **options)["id"])
    answer = server.get(job["images"][0]["url"])
    own = generate(load_model("AltDiffusion-mini"), "a blue star on a white background", **options).images[0]
    assert Image.open(io.BytesIO(answer.content)).convert("RGB").tobytes() == own.tobytes()


@pytest.mark.parametrize(("format", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP")])
def test_other_formats(server: Server, format: str, kind: str) -> None:
    job = server.finished(server.submit(seed=1)["id"])
    answer = server.get(f"{job['images'][0]['url']}?format={format}&quality=80")
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.format == kind and answer.headers["content-type"] == f"image/{format}"
    assert "Seed: 1" in picture.getexif().get_ifd(0x8769)[0x9286][8:].decode("utf-16-be")


@pytest.mark.parametrize(("format", "has_room"), [("jpeg", False), ("webp", True)])
def test_what_has_no_room_in_a_format_is_left_out(server: Server, format: str, has_room: bool) -> None:
    job = server.finished(server.submit("a" * 18_000, negative_prompt="b" * 18_000, steps=1)["id"])
    answer = server.get(f"{job['images'][0]['url']}?format={format}")
    assert answer.status_code == 200, answer.text
    assert bool(Image.open(io.BytesIO(answer.content)).getexif()) == has_room


def test_a_cancelled_job_ends_within_a_step(server: Server) -> None:
    job = server.submit(steps=900, images_per_prompt=4)
    server.until(lambda: server.job(job["id"]), lambda now: now["step"] >= 2)
    began = time.monotonic()
    answer = server.session.delete(f"{server.url}/api/jobs/{job['id']}")
    assert answer.json()["state"] == "cancelled"
    assert server.finished(server.submit()["id"])["state"] == "done"  # so the process is free again
    assert time.monotonic() - began < 20
    assert server.job(job["id"])["images"] == []


def test_models_are_changed_without_a_restart(server: Server) -> None:
    models = server.get("/api/models").json()
    assert [model["name"] for model in models["models"]] == ["AltDiffusion-mini", "AltDiffusion-m9"]
    for name in ("AltDiffusion-m9", "altdiffusion-MINI"):
        job = server.finished(server.submit(model=name, height=64, width=64)["id"])
        assert (job["state"], job["model"].lower()) == ("done", name.lower())


def test_the_history_is_what_the_pictures_say(server: Server) -> None:
    job = server.finished(server.submit("ein rotes Herz", seed=5)["id"])
    newest = server.get("/api/history?limit=3").json()["images"]
    assert len(newest) == 3
    assert newest[0]["record"]["prompt"] == "ein rotes Herz" and newest[0]["record"]["seed"] == 5
    assert f"{newest[0]['number']:05d}.png" == job["images"][0]["file"]
    older = server.get(f"/api/history?limit=1&before={newest[0]['number']}").json()["images"]
    assert older[0]["number"] == newest[1]["number"]
    assert server.get(newest[0]["url"]).content[:4] == b"\x89PNG"


def test_the_documentation_has_every_option(server: Server) -> None:
    schema = server.get("/openapi.json").json()["paths"]["/api/jobs"]["post"]["requestBody"]["content"]
    properties = schema["application/json"]["schema"]["properties"]
    own = {name for name in OPTIONS if name in GenerationRequest.__dataclass_fields__}
    assert own <= set(properties)
    assert all(OPTIONS[name].help.split(".")[0] in properties[name]["description"] for name in own)
    assert properties["steps"]["anyOf"][0]["maximum"] == 1000
    assert server.get("/docs").status_code == 200


@pytest.mark.fault(58)
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompts", "must be given"),
        ({"prompt": "a", "steps": "20"}, "steps", "a whole number from 1 to 1000"),
        ({"prompt": "a", "step": 20}, "step", "did you mean 'steps'"),
        ({"prompt": "a", "height": 100_000}, "height", "from 8 to 8192"),
        ({"prompt": "a", "sampler": "DPM3"}, "sampler", "unknown sampler"),
        ({"prompt": "a", "images_per_prompt": 10_000}, "images_per_prompt", "ask for fewer"),
        ({"prompt": "a", "loras": [{"name": "../../etc"}]}, "loras", "this server has none"),
        ({"prompt": "a", "init_image": "/etc/passwd"}, "init_image", "base64"),
        ({"prompt": "a", "init_image": ""}, "init_image", "the path of a picture"),
        ({"prompt": "a", "init_image": {"name": "/etc/passwd", "sha256": ""}}, "init_image", "base64"),
        ({"prompt": "a", "mask_image": "24,24,104"}, "mask_image", "a box of four numbers"),
        ({"prompt": "a", "mask_image": "/etc/host,name"}, "mask_image", "base64"),
        ({"prompt": "a", "mask_image": ["/etc/host,name"]}, "mask_image", "base64"),
        ({"prompt": "a", "loras": [{"name": "a", "strength": 10**400}]}, "loras", "expected a list as in"),
        ({"prompt": "a", "model": ["AltDiffusion-mini"]}, "model", "expected a name"),
        ({"prompt": "a", "save": "yes"}, "save", "true or false"),
        ({"prompt": ["a", 3]}, "prompts", "texts only"),
    ],
)
def test_what_is_wrong_is_said(server: Server, body: dict[str, object], param: str, words: str) -> None:
    answer = server.post("/api/jobs", body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and words in error["message"], error


def test_an_unsaved_picture_is_in_the_answer_only(server: Server) -> None:
    before = len(list(server.samples.iterdir()))
    job = server.finished(server.submit(save=False)["id"])
    assert job["images"][0]["file"] is None
    assert server.get(job["images"][0]["url"]).content[:4] == b"\x89PNG"
    assert len(list(server.samples.iterdir())) == before


def test_health_and_metrics(server: Server) -> None:
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json()["ready"] is True
    server.finished(server.submit()["id"])
    text = server.get("/metrics").text
    done = next(line for line in text.splitlines() if line.startswith('altdiff_jobs_total{state="done"}'))
    assert float(done.split()[-1]) >= 1 and "altdiff_jobs_waiting" in text


def test_small_answers_are_not_held_back(server: Server) -> None:
    """A socket that waits for more to send makes each answer 40 ms slower."""
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        server.get("/healthz")
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.03


def test_unknown_jobs_and_pictures_are_not_found(server: Server) -> None:
    for path in ("/api/jobs/nothing", "/api/jobs/nothing/events", "/api/history/999999", "/api/nothing"):
        answer = server.get(path)
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"
    assert server.get(f"/api/jobs/{server.submit()['id']}/images/7").status_code == 404
