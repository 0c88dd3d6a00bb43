"""Real clients, at pinned versions: the examples that people copy, run as they stand, and what the clients read."""

from __future__ import annotations

import base64
import io
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import webuiapi
from openai import OpenAI
from PIL import Image

from tests.web_server import Server
from tests.web_tools import needed

CLIENTS = Path(__file__).parents[3] / "examples" / "clients"
PICTURES = {
    "openai_python.py": {"openai-0.png", "openai-1.png", "rocket.png", "edited.png"},
    "webuiapi_python.py": {"robot.png", "red-robot.png"},
    "openai_node.mjs": {"bicycle.png", "sunflower.png", "near.png"},
    "fetch_node.mjs": {"job-0.png", "job-1.png"},
    "curl.sh": {"cat.png", "pineapple.webp"},
}
MANY = {"steps": 30}
SIZE = {"width": 128, "height": 128, "steps": 4, "cfg_scale": 2}


def program(script: Path) -> list[str]:
    if script.suffix == ".mjs":
        needed(shutil.which("node"), "node")
        needed((CLIENTS / "node_modules" / "openai").is_dir(), "the npm package openai")
        return ["node"]
    if script.suffix == ".sh":
        needed(shutil.which("curl"), "curl")
        return ["sh"]
    return [sys.executable]


@pytest.mark.parametrize("name", PICTURES)
def test_the_example_of_a_client_runs(name: str, server: Server, tmp_path: Path) -> None:
    script = CLIENTS / name
    command = program(script)
    if script.suffix == ".mjs":  # Node.js looks for packages where the script is
        (tmp_path / "node_modules").symlink_to(CLIENTS / "node_modules")
        shutil.copy(script, tmp_path)
        script = tmp_path / name
    done = subprocess.run(
        [*command, str(script)],
        cwd=tmp_path,
        env={**os.environ, "ALTDIFF_URL": server.url},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name for path in tmp_path.iterdir()}
    assert found >= PICTURES[name]
    for picture in PICTURES[name]:
        with Image.open(tmp_path / picture) as image:
            assert image.convert("L").getextrema()[0] != image.convert("L").getextrema()[1]


def test_every_example_is_run() -> None:
    assert {path.name for path in CLIENTS.iterdir() if path.suffix in (".py", ".mjs", ".sh")} == set(PICTURES)


@pytest.fixture
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def png(colour: str = "red", mode: str = "RGB", size: tuple[int, int] = (128, 128)) -> bytes:
    written = io.BytesIO()
    Image.new(mode, size, colour).save(written, "PNG")
    return written.getvalue()


def decoded(text: str | None) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text or "")))


def test_openai_reads_models_sizes_and_formats(client: OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == ["AltDiffusion-mini", "AltDiffusion-m9"]
    assert client.models.retrieve("AltDiffusion-mini").owned_by == "flagai_altdiff"
    answer = client.images.generate(
        prompt="a red heart", n=2, size="64x128", output_format="webp", output_compression=70, extra_body={"steps": 2}
    )
    assert answer.data is not None and len(answer.data) == 2 and answer.size == "64x128"
    assert all(
        (decoded(image.b64_json).format, decoded(image.b64_json).size) == ("WEBP", (64, 128)) for image in answer.data
    )
    assert answer.data[0].url is not None and server.session.get(answer.data[0].url).content[8:12] == b"WEBP"


def test_openai_reads_our_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="from 1 to 10") as caught:
        client.images.generate(prompt="a", n=11)
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "n",
        "invalid_request",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError, match="AltDiffusion-mini") as missing:
        client.images.generate(prompt="a", model="dall-e-3")
    assert missing.value.code == "model_not_found"
    for size in ("big", "100000x8"):
        with pytest.raises(openai.BadRequestError):
            client.images.generate(prompt="a", size=size)  # type: ignore[arg-type]


@pytest.mark.fault(56)
@pytest.mark.parametrize("model", [5, ["AltDiffusion-mini"], {}])
def test_a_model_is_a_name(server: Server, model: object) -> None:
    answer = server.post("/v1/images/generations", {"prompt": "a", "model": model})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "model", answer.text


@pytest.mark.fault(56)
@pytest.mark.parametrize("path", ["edits", "variations"])
@pytest.mark.parametrize("field", ["image", "mask"])
def test_a_text_is_no_picture_of_a_form(server: Server, path: str, field: str) -> None:
    form: dict[str, Any] = {"prompt": (None, "a"), "image": ("a.png", png()), field: (None, "cat.png")}
    answer = server.session.post(f"{server.url}/v1/images/{path}", files=form, timeout=20)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field, answer.text
    assert f"curl -F {field}=@cat.png" in answer.json()["error"]["message"]


def test_openai_streams_partial_images(client: OpenAI) -> None:
    kinds = []
    with client.images.generate(
        prompt="a red heart", stream=True, partial_images=2, extra_body={"steps": 30}
    ) as events:
        for event in events:
            kinds.append(event.type)
            assert decoded(event.b64_json).size[0] >= 100
    assert kinds[-1] == "image_generation.completed" and 1 <= kinds.count("image_generation.partial_image") <= 2


def test_openai_edits_only_what_is_transparent(client: OpenAI) -> None:
    mask = Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (64, 0, 128, 128))
    written = io.BytesIO()
    mask.save(written, "PNG")
    answer = client.images.edit(
        image=("a.png", png("red")),
        mask=("m.png", written.getvalue()),
        prompt="a blue star",
        response_format="b64_json",
        extra_body={"steps": 6},
    )
    assert answer.data is not None
    edited = decoded(answer.data[0].b64_json).convert("RGB")
    assert edited.crop((0, 0, 64, 128)).getcolors() == [(64 * 128, (255, 0, 0))]
    assert len(edited.crop((64, 0, 128, 128)).getcolors(1 << 20) or ()) > 10


@pytest.fixture
def api(server: Server) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")


def test_a1111s_clients_draw(api: webuiapi.WebUIApi) -> None:
    drawn = api.txt2img(
        prompt="a (red:1.2) heart", seed=5, n_iter=2, sampler_name="DPM++ 2M Karras", restore_faces=True, **SIZE
    )
    assert len(drawn.images) == 2 and drawn.info["all_seeds"] == [5, 6]
    assert drawn.info["sampler_name"] == "DPM++ 2M" and "Schedule type: Karras" in drawn.info["infotexts"][0]
    assert drawn.info["ignored"] == {"restore_faces": True}
    assert api.png_info(drawn.images[0]).info == drawn.info["infotexts"][0]
    again = api.txt2img(prompt="a (red:1.2) heart", seed=6, sampler_name="DPM++ 2M", scheduler="Karras", **SIZE)
    assert again.image.tobytes() == drawn.images[1].tobytes()


def test_a1111s_clients_begin_with_pictures(api: webuiapi.WebUIApi) -> None:
    red = Image.new("RGB", (128, 128), "red")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (64, 0, 128, 128))
    inside = api.img2img(
        images=[red],
        prompt="a blue star",
        mask_image=mask,
        mask_blur=0,
        inpaint_full_res=False,
        denoising_strength=1.0,
        seed=1,
        sampler_name="Euler",
        **SIZE,
    ).image.convert("RGB")
    assert inside.crop((0, 0, 64, 128)).getcolors() == [(64 * 128, (255, 0, 0))]
    larger = api.txt2img(
        prompt="a star",
        enable_hr=True,
        hr_scale=2,
        denoising_strength=0.5,
        seed=1,
        sampler_name="DDIM",
        **{**SIZE, "width": 64, "height": 64},
    )
    assert larger.image.size == (128, 128)


def test_a1111s_clients_enlarge(api: webuiapi.WebUIApi) -> None:
    drawn = api.txt2img(prompt="a heart", seed=5, **SIZE)
    larger = api.extra_single_image(drawn.image, upscaler_1="Lanczos", upscaling_resize=2.5, codeformer_visibility=1)
    assert larger.image.size == (320, 320)
    assert larger.image.tobytes() == drawn.image.resize((320, 320), Image.Resampling.LANCZOS).tobytes()
    assert larger.image.info["parameters"] == drawn.info["infotexts"][0]
    assert "upscale by: 2.5, Postprocess upscaler: Lanczos" in larger.image.info["extras"]
    assert "ignored: codeformer_visibility" in larger.info and larger.json["ignored"] == {"codeformer_visibility": 1}
    two = [Image.new("RGB", (20, 10), "red"), drawn.image]
    wide = {"resize_mode": 1, "upscaling_resize_w": 300, "upscaling_resize_h": 100}
    both = api.extra_batch_images(two, ["a.png", "b.png"], upscaler_1="Nearest", **wide)
    assert [image.size for image in both.images] == [(300, 100), (300, 100)]
    middle = drawn.image.resize((300, 300), Image.Resampling.NEAREST).crop((0, 100, 300, 200))
    assert both.images[1].tobytes() == middle.tobytes()
    whole = api.extra_single_image(drawn.image, upscaler_1="R-ESRGAN 4x+", upscaling_crop=False, **wide)
    assert whole.image.size == (300, 300) and whole.json["ignored"] == {"upscaler_1": "R-ESRGAN 4x+"}
    mixed = api.extra_single_image(two[0], upscaler_1="Lanczos", upscaler_2="Nearest", extras_upscaler_2_visibility=0.5)
    assert mixed.image.size == (40, 20) and mixed.image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert api.extra_single_image(drawn.image).image.tobytes() == drawn.image.tobytes()  # by no upscaler


def test_an_upscaler_that_is_not_here_is_named(api: webuiapi.WebUIApi) -> None:
    small = {**SIZE, "width": 64, "height": 64, "steps": 2}
    drawn = api.txt2img(prompt="a", enable_hr=True, hr_scale=2, hr_upscaler="R-ESRGAN 4x+", seed=1, **small)
    assert drawn.image.size == (128, 128) and drawn.info["ignored"] == {"hr_upscaler": "R-ESRGAN 4x+"}
    assert [upscaler["name"] for upscaler in api.get_upscalers()] == ["None", "Lanczos", "Nearest"]


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("route", "body", "word"),
    [
        ("single-image", {}, "image"),
        ("single-image", {"image": "no picture"}, "image"),
        ("single-image", {"image": base64.b64encode(png()).decode(), "upscaling_resize": 100}, "16,777,216 pixels"),
        ("single-image", {"image": "", "upscaling_resize": "2"}, "upscaling_resize"),
        ("single-image", {"image": "", "extras_upscaler_2_visibility": 7, "upscaler_2": "Nearest"}, "from 0 to 1"),
        ("batch-images", {"imageList": 7}, "imageList"),
        (
            "batch-images",
            {"imageList": [{"data": base64.b64encode(png()).decode()}] * 17, "upscaling_resize": 8},
            "in all",
        ),
    ],
)
def test_what_cannot_be_enlarged_is_said(server: Server, route: str, body: dict[str, object], word: str) -> None:
    answer = server.post(f"/sdapi/v1/extra-{route}", {"upscaler_1": "Nearest", **body})
    assert answer.status_code == 400 and word in answer.json()["detail"], answer.text


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("txt2img", {"cfg_scale": 10**400}, "cfg_scale"),
        ("txt2img", {"subseed_strength": 10**400}, "subseed_strength"),
        ("txt2img", {"enable_hr": True, "hr_scale": "abc"}, "hr_scale"),
        ("txt2img", {"enable_hr": True, "hr_scale": [2]}, "hr_scale"),
        ("img2img", {"init_images": [base64.b64encode(png()).decode()], "resize_mode": []}, "resize_mode"),
        ("img2img", {"init_images": [{}]}, "init_images"),
    ],
)
def test_what_a1111s_clients_write_wrong_is_said(
    server: Server, path: str, body: dict[str, object], field: str
) -> None:
    answer = server.post(f"/sdapi/v1/{path}", {"prompt": "a", "steps": 1, **body})
    assert answer.status_code == 400 and answer.json()["detail"].startswith(f"{field}="), answer.text


def test_a1111s_clients_watch_and_interrupt(api: webuiapi.WebUIApi, server: Server) -> None:
    answers: list[webuiapi.WebUIApiResult] = []
    long = {**SIZE, "steps": 900}
    asking = threading.Thread(
        target=lambda: answers.append(api.txt2img(prompt="a heart", sampler_name="Euler", **long))
    )
    asking.start()
    other = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    told = server.until(other.get_progress, lambda told: told["state"]["sampling_step"] > 2 and told["current_image"])
    assert 0 < told["progress"] < 1 and told["eta_relative"] > 0 and told["state"]["sampling_steps"] >= 900
    assert decoded(told["current_image"]).size[0] >= 100
    other.interrupt()
    asking.join(30)
    assert answers[0].images == [] and answers[0].info["all_seeds"] == []


def test_a1111s_clients_skip_an_image_and_get_the_others(api: webuiapi.WebUIApi, server: Server) -> None:
    asked = {**SIZE, "width": 64, "height": 64, "steps": 50, "prompt": "a heart", "sampler_name": "Euler"}
    answers: list[webuiapi.WebUIApiResult] = []
    asking = threading.Thread(target=lambda: answers.append(api.txt2img(seed=5, n_iter=3, **asked)))
    asking.start()
    other = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    told = server.until(other.get_progress, lambda told: told["state"]["sampling_step"] > 2)
    assert (told["state"]["job_count"], told["state"]["job_no"], told["state"]["sampling_steps"]) == (3, 0, 50)
    assert other.skip() == {}
    server.until(other.get_progress, lambda told: told["state"]["job_no"] == 2)
    other.interrupt()  # which ends it, with what there is
    asking.join(60)
    assert answers[0].info["all_seeds"] == [6]
    assert answers[0].image.tobytes() == api.txt2img(seed=6, **asked).image.tobytes()


def test_skipping_the_only_image_leaves_none(api: webuiapi.WebUIApi, server: Server) -> None:
    answers: list[webuiapi.WebUIApiResult] = []
    asking = threading.Thread(target=lambda: answers.append(api.txt2img(prompt="a", **{**SIZE, "steps": 900})))
    asking.start()
    server.until(api.get_progress, lambda told: told["state"]["sampling_step"] > 2)
    api.skip()
    asking.join(30)
    assert answers[0].images == [] and answers[0].info["notes"][-1] == "images that were skipped: 1"


def test_a1111s_clients_read_what_there_is(api: webuiapi.WebUIApi) -> None:
    assert api.util_get_model_names() == ["AltDiffusion-m9", "AltDiffusion-mini"]
    assert "Euler a" in api.util_get_sampler_names() and "karras" in api.util_get_scheduler_names()
    api.util_set_model("AltDiffusion-m9")
    assert api.util_get_current_model() == "AltDiffusion-m9"
    api.util_set_model("mini")
    assert api.util_get_current_model() == "AltDiffusion-mini"
    assert api.get_progress()["state"]["job_count"] == 0
    for found in (api.get_upscalers(), api.get_latent_upscale_modes(), api.get_cmd_flags(), api.get_memory()):
        assert found
    for nothing in (api.get_loras(), api.get_sd_vae(), api.get_hypernetworks(), api.get_prompt_styles()):
        assert nothing == []
    assert api.get_embeddings()["loaded"] == {}
    memory = api.get_memory()
    assert 0 < memory["ram"]["used"] < memory["ram"]["total"] and memory["ram"]["free"] > 0
    assert memory["cuda"] == {"error": "unavailable"} or memory["cuda"]["system"]["total"] > 0
    api.refresh_checkpoints()
    api.util_wait_for_ready(0.1)
