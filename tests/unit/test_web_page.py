"""What the page says and shows."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from gradio.components.image_editor import AcceptBlobs, BlobData, EditorData
from gradio.data_classes import FileData
from PIL import Image
from starlette.exceptions import HTTPException

from flagai_altdiff import generate, load_model
from flagai_altdiff.mini.things.knowing import names_nothing
from flagai_altdiff.options import options_of
from flagai_altdiff.registry import MODELS, embedded_dir
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.tokenizer import load_tokenizer, own_tokenizer
from flagai_altdiff.web.history import History
from flagai_altdiff.web.jobs import Job
from flagai_altdiff.web.messages import Drawn, Task
from flagai_altdiff.web.page.languages import EXAMPLES
from flagai_altdiff.web.page.page import _Page, _records
from flagai_altdiff.web.page.shown import caption, error_html, interrupted_html, loras_of
from flagai_altdiff.web.page.texts import _OPTIONS, language_of, option_help, option_label, said
from flagai_altdiff.web.page.tokens import tokens_html, unknown_html
from flagai_altdiff.web.page.widgets import BESIDE_PICTURE, FIRST, MORE, SHOWN, given
from flagai_altdiff.web.service import Service
from flagai_altdiff.web.settings import Drawing, Limits, Settings


@pytest.fixture(scope="module")
def page() -> _Page:
    """A page whose pictures may have 64 x 64 pixels."""

    async def made() -> _Page:
        settings = Settings(drawing=Drawing(folder=None), limits=Limits(picture_pixels=64 * 64))
        return _Page(Service(settings), History(None))

    return asyncio.run(made())


@pytest.fixture
def editor(page: _Page) -> gr.ImageEditor:
    return next(block for block in page.blocks.blocks.values() if isinstance(block, gr.ImageEditor))


def test_every_option_has_a_widget_and_chinese_words() -> None:
    elsewhere = {"prompts", "init_image", "mask_image", "batch_size"}
    assert set(SHOWN) == set(options_of(GenerationRequest)) - elsewhere
    assert sorted((*FIRST, *BESIDE_PICTURE, *MORE)) == sorted(SHOWN)
    assert set(SHOWN) <= set(_OPTIONS)
    for name in SHOWN:
        assert option_help(name, "zh") != option_help(name, "en") != ""
        assert option_label(name, "en") and option_label(name, "zh")


def test_the_language_is_the_browsers() -> None:
    assert [language_of(text) for text in ("zh-TW,en;q=0.5", "de,zh", "", "ZH")] == ["zh", "en", "en", "zh"]
    assert option_help("steps", "zh").endswith("（1 至 1,000）") and option_help("steps", "en").endswith("(1 to 1,000)")
    assert said("waiting", "zh", position=3) == "排队中：前面还有 3 个。"


def test_there_is_an_example_in_every_language() -> None:
    assert len(EXAMPLES) == len(MODELS["AltDiffusion-m18"].languages) == 18
    assert not [prompt for prompt in EXAMPLES.values() if names_nothing(prompt)]


def test_the_page_says_what_the_embedded_model_does_not_know() -> None:
    assert "Try: helicopter" in unknown_html("AltDiffusion-mini", "a hellicopter", "en")
    assert "试试：" in unknown_html("AltDiffusion-mini", "a hellicopter", "zh")
    assert unknown_html("AltDiffusion-mini", "a helicopter", "en") == unknown_html("AltDiffusion-mini", " ", "en") == ""
    assert "<script" not in unknown_html("<script>", "<script>alert(1)</script>", "en")


@pytest.mark.fault(64)
@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b"])
def test_what_people_write_is_escaped(text: str) -> None:
    path = own_tokenizer(embedded_dir() / "AltDiffusion-mini")
    assert path is not None
    for syntax in ("plain", "weighted"):
        shown = tokens_html(load_tokenizer(path), text, syntax, "en")
        assert "<script" not in shown and "<img" not in shown
    lost = interrupted_html([{"request": {"prompts": [text]}}], "en")
    assert "<script" not in lost and "<img" not in lost and lost.count("<li") == 1
    assert "<" not in error_html(text).removeprefix('<div class="status error" role="alert">').removesuffix("</div>")


def test_tokens_show_what_is_cut_and_what_is_weighted() -> None:
    path = own_tokenizer(embedded_dir() / "AltDiffusion-mini")
    assert path is not None
    tokenizer = load_tokenizer(path)
    cut = tokens_html(tokenizer, "star " * 100, "plain", "en")
    assert "75 of 75 tokens" in cut and cut.count("<del") == 25
    weighted = tokens_html(tokenizer, "a (red:1.3) star", "weighted", "en")
    assert '<mark title="1.30">red</mark>' in weighted and "<del" not in weighted
    assert tokens_html(None, "a", "plain", "en") == tokens_html(tokenizer, " ", "plain", "en") == ""


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"steps": 20, "eta": 0, "seamless": "none", "window": ""}, {"steps": 20}),
        ({"window": "64", "variation_strength": "0.2"}, {"window": 64, "variation_strength": 0.2}),
        ({"window": "wide"}, {"window": "wide"}),
    ],
)
def test_what_is_typed_becomes_options(values: dict[str, Any], found: dict[str, Any]) -> None:
    assert given(values) == found


def test_a_caption_has_prompt_seed_and_settings() -> None:
    record = {"prompt": "一颗心", "seed": 7, "steps": 20, "sampler": "ddim", "width": 128, "height": 64, "model": "m"}
    assert caption(record, "en") == "一颗心 · seed 7 · 20 steps · ddim · 128×64 · m"
    own = {**record, "loras": [{"name": "robot", "strength": 0.5}]}
    assert caption(own, "en") == "一颗心 · seed 7 · 20 steps · ddim · 128×64 · m · robot 0.5"


@pytest.mark.parametrize("listed", [None, 7, "robot", ["robot"], [{}], [{"name": "robot", "strength": "strong"}]])
def test_what_is_no_lora_of_a_record_is_left_out(listed: object) -> None:
    assert loras_of({"loras": listed}) == {}


def picture(kind: str, side: int = 8) -> bytes:
    written = io.BytesIO()
    Image.new("RGB" if kind == "EPS" else "RGBA", (side, side)).save(written, kind)
    return written.getvalue()


@pytest.mark.parametrize(
    ("content", "why"), [(picture("EPS"), "not an image"), (picture("PNG", 65), "more pixels")], ids=["EPS", "large"]
)
@pytest.mark.parametrize("place", ["background", "layers"])
def test_the_editor_takes_what_the_other_doors_take(
    editor: gr.ImageEditor, tmp_path: Path, content: bytes, why: str, place: str
) -> None:
    for name, written in {"good": picture("PNG"), "bad": content}.items():
        (tmp_path / name).write_bytes(written)
    given = FileData(path=str(tmp_path / "good"))
    taken = editor.preprocess(EditorData(background=given, layers=[given], composite=given))
    assert taken is not None
    assert isinstance(taken["background"], Image.Image) and taken["background"].mode == "RGBA"
    bad = FileData(path=str(tmp_path / "bad"))
    is_layer = place == "layers"
    with pytest.raises(gr.Error, match=why):
        editor.preprocess(EditorData(background=given if is_layer else bad, layers=[bad] if is_layer else []))
    editor.accept_blobs(AcceptBlobs(data=blob("background"), files=[("file", content)]))
    with pytest.raises(gr.Error, match=why):
        editor.preprocess(EditorData(id="a"))


def blob(kind: str, index: int | None = None, name: str = "a") -> BlobData:
    return BlobData(type=kind, index=index, file=b"", id=name)


def test_the_editor_takes_few_layers_and_holds_few_pictures(editor: gr.ImageEditor) -> None:
    with pytest.raises(gr.Error, match="at most 4 layers"):
        editor.preprocess(EditorData(layers=[FileData(path="nowhere")] * 5))
    with pytest.raises(HTTPException):
        editor.accept_blobs(AcceptBlobs(data=blob("layer", 100_000), files=[("file", b"")]))
    for number in range(100):
        editor.accept_blobs(AcceptBlobs(data=blob("background", name=str(number)), files=[("file", b"")]))
    assert len(editor.blob_storage) <= 16 and "99" in editor.blob_storage


def test_the_browser_knows_the_editor(page: _Page, editor: gr.ImageEditor) -> None:
    config = page.blocks.get_config_file()
    (own,) = (component for component in config["components"] if component["id"] == editor._id)
    assert own["type"] == "imageeditor" and own["props"]["brush"] and own["props"]["server_fns"] == ["accept_blobs"]


def drawn(index: int, **options: Any) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """One of the images of a job: what the page knows of it, and its pixels."""
    small = {"height": 64, "width": 64, "steps": 1, "seed": 7, "images_per_prompt": 3}
    result = generate(load_model("AltDiffusion-mini"), "a red heart", **(small | options))

    async def records() -> list[dict[str, Any]]:
        job = Job(task=Task(id="a", request=result.request, model="AltDiffusion-mini"), client="")
        for number, sample in enumerate(result.samples):
            own: dict[str, Any] = {"prompt": sample.prompt, "seed": sample.seed, "safety": sample.safety}
            job.add(Drawn(id="a", index=number, size=(64, 64), path=None, png=b"", **own))
        return _records(job)

    return asyncio.run(records())[index], np.asarray(result.images[index], int)


@pytest.mark.parametrize(
    "options",
    [{}, {"variation_strength": 0.5, "variation_seed": 2**32 - 2}, {"iterations": 2, "images_per_prompt": 2}],
    ids=["own seeds", "variations", "iterations"],
)
def test_again_draws_the_image_that_was_chosen(page: _Page, options: dict[str, Any]) -> None:
    record, pixels = drawn(2, **options)
    _, prompt, _, *values = page._filled(record, "en", None)
    again = generate(load_model("AltDiffusion-mini"), prompt, **given(dict(zip(page._options, values, strict=True))))
    (image,) = again.images
    assert np.abs(np.asarray(image, int) - pixels).max() <= 1


@pytest.mark.parametrize("options", [{"seed_mode": "batch"}, {"fixed_code": True}])
def test_what_was_drawn_after_others_of_its_batch_is_not_drawn_alone(page: _Page, options: dict[str, Any]) -> None:
    page._filled(drawn(0, **options)[0], "en", None)
    with pytest.raises(gr.Error, match="cannot be drawn alone"):
        page._filled(drawn(1, **options)[0], "en", None)
