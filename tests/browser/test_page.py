"""The page as people use it: they type, draw, cancel, edit, switch the language, reload, and have no mouse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import PHONE, opened
from tests.web_server import Server, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDE_SHOT = {"width": 1280, "height": 1330}
LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "page": ("火箭，黄色背景", {"locale": "en-US", "viewport": WIDE_SHOT}),
    "page-dark": (
        "Pinguin, blauer Hintergrund",
        {"locale": "en-US", "viewport": WIDE_SHOT, "color_scheme": "dark"},
    ),
    "page-phone": ("熊猫，橙色背景", {"locale": "zh-CN", "viewport": PHONE, "device_scale_factor": 1.5}),
}
"""Pictures of the README: a prompt, and how the browser shows the page."""
DRAWN_BEFORE = [
    "أناناس، خلفية زرقاء",
    "傘、緑色の背景",
    "camel, yellow background",
]
CHINESE = "蓝色背景上的黄色的星星"
ARABIC = "قلب أخضر كبير على خلفية بيضاء"
SECONDS = 60_000


def draw(page: Page, prompt: str, **numbers: int) -> None:
    page.fill("#prompt textarea", prompt)
    for name, number in numbers.items():
        page.fill(f"#option-{name} input", str(number))
    page.click("#draw")


def wait_done(page: Page) -> None:
    page.wait_for_function(
        "() => /Done in|完成/.test(document.querySelector('#status').innerText)"
        " && document.querySelector('#images img')",
        timeout=SECONDS,
    )


def wait_spoken(page: Page, word: str) -> None:
    """Until the page has its language."""
    page.wait_for_function(f"() => document.querySelector('#draw').innerText === '{word}'", timeout=SECONDS)


def colours(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), int)


def test_a_chinese_prompt_becomes_a_picture(page: Page, server: Server) -> None:
    draw(page, CHINESE, steps=40, seed=7)
    page.wait_for_selector("#status progress", timeout=SECONDS)
    page.wait_for_selector("#status .preview", timeout=SECONDS)
    wait_done(page)
    assert "蓝色" in page.inner_text("#tokens") and "of 75 tokens" in page.inner_text("#tokens")
    assert f"{CHINESE} · seed 7 · 40 steps" in page.inner_text("#images")
    source = page.get_attribute("#images img", "src")
    assert source is not None
    picture = colours(server.session.get(source).content)
    yellow, blue = picture[64, 64], picture[4, 4]
    assert yellow[0] > 180 > 100 > yellow[2] and blue[2] > 150 > 100 > blue[0]  # the star and its ground
    page.reload()  # the history comes from the files themselves
    page.wait_for_function(
        f"() => document.querySelector('#history')?.innerText.includes('{CHINESE}')", timeout=SECONDS
    )


def test_cancel_ends_a_drawing(page: Page, server: Server) -> None:
    draw(page, "a red heart", steps=900)
    page.wait_for_selector("#status .preview", timeout=SECONDS)
    page.click("#cancel")
    page.wait_for_function("() => document.querySelector('#status').innerText.includes('Cancelled')", timeout=SECONDS)
    assert server.get("/api/jobs").json()["jobs"] == []


def test_a_page_that_is_closed_draws_no_more(page: Page, server: Server) -> None:
    draw(page, "a red heart", steps=900)
    page.wait_for_selector("#status .preview", timeout=SECONDS)
    page.goto("about:blank")
    server.until(lambda: server.get("/api/jobs").json()["jobs"], lambda jobs: jobs == [], 40)


def test_a_wrong_value_is_said_and_escaped(page: Page) -> None:
    page.click("#more button >> nth=0")
    page.fill("#option-window input, #option-window textarea", "<img src=x onerror=document.title='broken'>")
    draw(page, "a red heart")
    page.wait_for_selector(".status.error", timeout=SECONDS)
    assert "window=" in page.inner_text("#status") and "a whole number from 8 to 8192" in page.inner_text("#status")
    assert page.title() == "AltDiffusion" and page.query_selector("#status img") is None


def test_an_edit_with_a_mask_keeps_what_was_not_painted(page: Page, server: Server, tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    page.click("#picture > button")
    page.wait_for_selector("#editor canvas", timeout=SECONDS)
    page.wait_for_timeout(2000)  # until the editor is ready for a file; nothing of it can be seen
    page.set_input_files("#editor input[type=file]", str(tmp_path / "red.png"))
    page.wait_for_selector("#editor canvas", timeout=SECONDS)
    page.wait_for_timeout(1500)
    if brush := page.query_selector("#editor button[aria-label='Brush'], #editor button[title='Brush']"):
        brush.click()
    canvas = page.query_selector("#editor canvas")
    assert canvas is not None
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 10, y)
    page.mouse.down()
    page.mouse.move(x + 10, y, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1000)
    draw(page, "a large blue star", steps=10, seed=3)
    wait_done(page)
    source = page.get_attribute("#images img", "src")
    assert source is not None
    picture = colours(server.session.get(source).content)
    kept = (picture == (255, 0, 0)).all(-1)
    assert 0.3 < kept.mean() < 0.999 and kept[:8].all() and kept[-8:].all()


def test_again_near_and_edit_take_the_settings_along(page: Page) -> None:
    draw(page, "a green house", steps=6, seed=21)
    wait_done(page)
    page.fill("#prompt textarea", "something else")
    page.click("#again")
    page.wait_for_function(
        "() => document.querySelector('#prompt textarea').value === 'a green house'", timeout=SECONDS
    )
    assert page.input_value("#option-seed input") == "21" and page.input_value("#option-steps input") == "6"
    wait_done(page)
    page.click("#near")
    page.wait_for_function("() => document.querySelectorAll('#images img').length >= 4", timeout=SECONDS)
    wait_done(page)
    page.click("#edit")
    page.wait_for_selector("#editor canvas", timeout=SECONDS)


def test_a_lora_is_as_strong_as_it_is_set(page: Page, server: Server) -> None:
    assert not page.is_visible("#lora-0")
    page.click("#loras input")
    page.click("[role=option]:has-text('robot')")
    page.keyboard.press("Escape")
    page.wait_for_selector("#lora-0 input[type=number]", timeout=SECONDS)
    page.fill("#lora-0 input[type=number]", "0.5")
    page.keyboard.press("Tab")
    draw(page, "a red heart", steps=4, seed=9)
    wait_done(page)
    page.wait_for_function("() => document.querySelector('#images').innerText.includes('robot 0.5')", timeout=SECONDS)
    newest = server.get("/api/history?limit=1").json()["images"][0]["record"]
    assert [(own["name"], own["strength"]) for own in newest["loras"]] == [("robot", 0.5)]
    page.fill("#lora-0 input[type=number]", "1.5")
    page.keyboard.press("Tab")
    page.click("#again")  # as it was drawn
    page.wait_for_function(
        "() => document.querySelector('#lora-0 input[type=number]').value === '0.5'", timeout=SECONDS
    )
    wait_done(page)
    again = server.until(
        lambda: server.get("/api/history?limit=1").json()["images"][0]["record"],
        lambda own: own["run"] != newest["run"],
    )
    assert again["loras"] == newest["loras"]


def test_a_long_picture_has_a_viewer(page: Page) -> None:
    draw(page, "a red heart", steps=2, width=512, height=128)
    page.wait_for_selector("#viewer .long img", timeout=SECONDS)
    assert page.evaluate("() => { const v = document.querySelector('.long'); return v.scrollWidth > v.clientWidth; }")


def test_the_language_is_the_browsers_and_can_be_switched(chinese_page: Page, shots: Path) -> None:
    page = chinese_page
    wait_spoken(page, "绘制")
    draw(page, ARABIC, steps=4)
    wait_done(page)
    assert page.evaluate("() => getComputedStyle(document.querySelector('#prompt textarea')).direction") == "rtl"
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 390  # nothing is cut off on a phone
    page.screenshot(path=shots / "phone.png", full_page=True)
    page.click("#language label:has-text('English')")
    wait_spoken(page, "Draw")
    assert "Sampler steps" in page.inner_text("#option-steps")


def test_the_pictures_of_the_readme(
    browser: Browser, tmp_path: Path, script_environment: dict[str, str], shots: Path
) -> None:
    """`make screenshots` puts them into docs/images."""
    with serving(tmp_path / "server", script_environment) as server:
        for seed, prompt in enumerate(DRAWN_BEFORE):
            server.finished(server.submit(prompt, seed=seed, steps=25)["id"])
        for name, (prompt, look) in LOOKS.items():
            for page in opened(browser, server, **look):
                wait_spoken(page, "绘制" if look["locale"] == "zh-CN" else "Draw")
                draw(page, prompt, seed=7, steps=25)
                wait_done(page)
                page.mouse.move(0, 0)
                page.wait_for_timeout(1000)
                seen = [shot(page)]
                if look["viewport"] == PHONE:  # below what was typed
                    page.evaluate("() => document.querySelector('#status').scrollIntoView()")
                    seen.append(shot(page))
                write_shot(seen, shots / f"{name}.png")
                ground = np.asarray(seen[0].convert("L"), int)[:8, :8].mean()
                assert ground < 60 if name == "page-dark" else ground > 200


def shot(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def write_shot(seen: list[Image.Image], path: Path) -> None:
    """Screens side by side, in few colours."""
    gap = 24
    whole = Image.new("RGB", (sum(image.width + gap for image in seen) - gap, seen[0].height), "#808080")
    for number, image in enumerate(seen):
        whole.paste(image, (number * (image.width + gap), 0))
    whole.quantize(256).save(path, optimize=True)


def test_the_documentation_loads_nothing_from_elsewhere(page: Page, server: Server) -> None:
    page.goto(f"{server.url}/docs")
    page.wait_for_selector("#operations-tag-jobs", timeout=SECONDS)


def test_names_are_proposed_for_what_is_not_known(page: Page) -> None:
    page.fill("#prompt textarea", "a hellicopter")
    page.wait_for_function(
        "() => document.querySelector('#tokens').innerText.includes('Try: helicopter')", timeout=SECONDS
    )


def test_an_example_of_a_language_is_drawn(page: Page) -> None:
    page.click("#examples button:has-text('日本語')")
    page.wait_for_function("() => document.querySelector('#prompt textarea').value.startsWith('傘')", timeout=SECONDS)
    page.click("#draw")
    wait_done(page)


def test_all_is_done_with_the_keyboard(page: Page) -> None:
    page.focus("#prompt textarea")
    page.keyboard.type("a red star")
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.id === 'draw'"):
            break
    else:
        pytest.fail("the button cannot be reached")
    page.keyboard.press("Enter")
    wait_done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_stands_in_the_way_of_people(page: Page, scheme: Any, shots: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector("#prompt textarea")
    draw(page, CHINESE, steps=6)
    wait_done(page)
    page.wait_for_timeout(500)
    page.screenshot(path=shots / f"{scheme}.png", full_page=True)
    found = Axe().run(page).response["violations"]
    serious = [
        (rule["id"], [node["html"][:160] for node in rule["nodes"]][:4])
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
    assert serious == []
