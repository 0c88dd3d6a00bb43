"""More ways to draw: from pictures and into them, in windows, twice, near another image, without edges."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flagai_altdiff import draw_to_folder, generate
from flagai_altdiff.conditioning import encode_prompts
from flagai_altdiff.engine import EagerEngine
from flagai_altdiff.engine.seamless import seamless
from flagai_altdiff.engine.tiles import decode_in_tiles
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.layout import circular_axes, pixels_of_a_step, windows_of
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.noise import CallNoise, slerp
from flagai_altdiff.pipeline import draw, prepare
from flagai_altdiff.request import Batch
from flagai_altdiff.sampling import SAMPLERS, Step
from flagai_altdiff.sampling.windows import Window, joined, make_windows, window_starts
from flagai_altdiff.walks import condition, decoded, step_counts
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 4, "seed": 1}


def gradient(size: tuple[int, int] = (64, 64)) -> Image.Image:
    red = np.linspace(0, 255, size[0], dtype=np.uint8)[None].repeat(size[1], 0)
    return Image.fromarray(np.stack([red, red.T if size[0] == size[1] else red, 255 - red], axis=-1))


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def drawn(model: LatentDiffusion, prompt: str = tiny.CAT, **options: Any) -> np.ndarray[Any, Any]:
    return pixels(generate(model, prompt, **{**SMALL, **options}).images[0])


def round_trip(model: LatentDiffusion, image: Image.Image) -> np.ndarray[Any, Any]:
    engine = EagerEngine(model)
    with torch.no_grad():
        given = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        back = engine.decode(engine.encode_image(given))[0]
    return ((back + 1) * 127.5).clamp(0, 255).permute(1, 2, 0).numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_left_the_less_the_lower_the_strength(sampler: str, m9: LatentDiffusion) -> None:
    image, many = gradient(), dict[str, Any](steps=20, sampler=sampler)
    target = round_trip(m9, image)
    near, far = (np.abs(drawn(m9, init_image=image, strength=s, **many) - target).mean() for s in (0.05, 1.0))
    assert near < far
    again = drawn(m9, init_image=image, strength=0.05, **many)
    assert (again == drawn(m9, init_image=image, strength=0.05, **many)).all()


def test_a_strength_is_a_share_of_the_steps_or_takes_all_of_them(m9: LatentDiffusion) -> None:
    def steps(**options: Any) -> list[Step]:
        resolved, _ = prepare(m9, tiny.CAT, **{**SMALL, "steps": 10, "init_image": gradient(), **options})
        found = [event for event in draw(m9, resolved) if isinstance(event, Step)]
        assert sum(step_counts(resolved, 1000)) == len(found) == found[0].total
        return found

    assert [len(steps(strength=s)) for s in (0.1, 0.55, 1.0)] == [1, 5, 10]
    assert steps(strength=0.3)[0].t == steps(strength=1.0)[7].t
    full = steps(strength=0.5, full_steps=True)
    assert len(full) == 10 and full[0].t == pytest.approx(steps(strength=0.5)[0].t, abs=60)
    assert len(steps(strength=None)) == 7, "unless it is given, 0.75"
    with pytest.raises(InvalidRequestError, match=r"leaves none of 10 steps; expected at least 0\.1") as caught:
        steps(strength=0.05)
    assert caught.value.field == "strength"


def test_variations_and_prompts_of_a_picture_differ_and_are_resumed(m9: LatentDiffusion, tmp_path: Path) -> None:
    ways: dict[str, Any] = {**SMALL, "init_image": gradient(), "strength": 0.8, "images_per_prompt": 2}
    prompts = [tiny.CAT, tiny.CASTLE]
    result = draw_to_folder(m9, prompts, tmp_path, **ways)
    assert len({image.tobytes() for image in result.images}) == 4
    before = [path.read_bytes() for path in result.paths]
    result.paths[2].unlink()
    from flagai_altdiff.request import Output

    again = draw_to_folder(m9, prompts, Output(folder=tmp_path, resume=True), **ways)
    assert [image.tobytes() for image in again.images] == [
        Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in before
    ]
    record = read_record(result.paths[0])
    assert record["strength"] == 0.8 and len(record["init_image"]["sha256"]) == 64
    other = draw_to_folder(
        m9, prompts, Output(folder=tmp_path, resume=True), **{**ways, "init_image": Image.new("RGB", (64, 64))}
    )
    assert not set(other.paths) & set(again.paths), "another picture is another run"


def test_the_size_follows_the_picture(m9: LatentDiffusion) -> None:
    def size(image: tuple[int, int], **options: Any) -> tuple[int, int]:
        resolved, _ = prepare(m9, tiny.CAT, init_image=Image.new("RGB", image), steps=2, **options)
        return resolved.width, resolved.height

    unit = 16
    assert size((100, 70)) == (96, 64)
    assert size((100, 70), width=48) == (48, 32)
    assert size((100, 70), width=48, height=128) == (48, 128)
    assert size((100, 70), outpaint="left=60") == (160, 80), "with a margin, which is cut off again"
    assert size((640, 64), window=64) == (640, 64)
    width, height = size((4000, 1000))
    assert width % unit == height % unit == 0 and width / height == pytest.approx(4, rel=0.1) and width * height < 3e5


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "plms", "unipc"])
def test_outside_the_mask_the_picture_keeps_its_bits(sampler: str, m9: LatentDiffusion) -> None:
    image = gradient()
    found = drawn(m9, init_image=image, mask_image="16,16,48,40", mask_feather=6, strength=1, sampler=sampler)
    inside = np.zeros((64, 64), bool)
    inside[16:40, 16:48] = True
    assert (found[~inside] == pixels(image)[~inside]).all()
    assert np.abs(found[inside] - pixels(image)[inside]).max() > 10


def test_a_mask_keeps_the_latent_outside_on_its_way_to_the_picture(m9: LatentDiffusion) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    for sampler in SAMPLERS:
        resolved, _ = prepare(
            m9,
            tiny.CAT,
            **SMALL,
            init_image=gradient(),
            mask_image=mask,
            strength=1.0,
            sampler=sampler,
            grid="trailing",
        )
        *_, last = (event for event in draw(m9, resolved) if isinstance(event, Step))
        engine = EagerEngine(m9)
        with torch.no_grad():
            given = torch.from_numpy(np.array(gradient())).permute(2, 0, 1)[None].float() / 127.5 - 1
            clean = engine.encode_image(given)
        columns = clean.shape[3] // 2
        torch.testing.assert_close(last.x[..., columns:], clean[..., columns:], rtol=1e-3, atol=1e-3, msg=sampler)


def test_the_masked_area_at_full_resolution(m9: LatentDiffusion) -> None:
    image = gradient((200, 160))
    result = generate(
        m9, tiny.CAT, **SMALL, init_image=image, mask_image="100,80,120,100", mask_full_resolution=True, strength=1
    )
    found = pixels(result.images[0])
    assert result.images[0].size == (200, 160) == result.request.final_size
    inside = np.zeros((160, 200), bool)
    inside[80:100, 100:120] = True
    assert (found[~inside] == pixels(image)[~inside]).all() and (found[inside] != pixels(image)[inside]).any()


def test_what_is_around_a_picture_is_drawn(m9: LatentDiffusion) -> None:
    image = gradient()
    result = generate(m9, tiny.CAT, steps=3, seed=1, init_image=image, outpaint="left=32,bottom=16")
    found = pixels(result.images[0])
    assert found.shape == (80, 96, 3) and result.request.strength == 1
    assert (found[:64, 32:] == pixels(image)).all()
    assert found[:, :32].std() > 1
    both = generate(m9, tiny.CAT, steps=3, seed=1, init_image=image, outpaint="left=32", mask_image="0,0,16,16")
    assert (pixels(both.images[0])[16:, 32:] == pixels(image)[16:]).all()
    assert (pixels(both.images[0])[:16, 32:48] != pixels(image)[:16, :16]).any()


def test_windows_cover_everything() -> None:
    assert window_starts(10, 4, 3, wraps=False) == [0, 3, 6]
    assert window_starts(11, 4, 3, wraps=False) == [0, 3, 6, 7]
    assert window_starts(4, 4, 3, wraps=False) == window_starts(3, 4, 3, wraps=False) == [0]
    assert window_starts(4, 4, 4, wraps=True) == [0, 2], "the circle is cut in two places"
    assert window_starts(12, 4, 3, wraps=True) == [0, 3, 6, 9]
    for wraps in (False, True):
        count = torch.zeros(1, 1, 7, 23)
        for window in make_windows((7, 23), 5, 3, wraps_x=wraps):
            assert window.cut(count).shape == (1, 1, 5, 5)
            window.add(torch.ones(1, 1, 5, 5), count)
        assert count.min() >= 1


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)),
        ({"width": 160, "window": 64, "window_overlap": 56}, (64, 160)),
        ({"width": 160, "height": 96, "window": 64, "seamless": "xy"}, (96, 160)),
        ({"window": 64, "hires": 2.5}, (160, 160)),
        ({"window": 64, "width": 32}, (64, 32)),
    ],
)
def test_a_step_computes_the_pixels_of_its_windows(
    options: dict[str, Any], size: tuple[int, int], m9: LatentDiffusion
) -> None:
    cell = EagerEngine(m9).cell
    resolved, _ = prepare(m9, tiny.CAT, **{**SMALL, **options})
    shape = [side // cell for side in size]
    windows = windows_of(resolved, cell, shape) or [Window(top=0, left=0, height=shape[0], width=shape[1])]
    assert pixels_of_a_step(resolved, cell) == sum(window.height * window.width for window in windows) * cell**2


def test_a_joined_prediction_is_the_mean_of_its_windows() -> None:
    x = torch.randn(2, 4, 4, 10, generator=torch.Generator().manual_seed(0))
    windows = make_windows((4, 10), 4, 3)
    same = joined(lambda window: lambda part, t: part * t, windows)(x, 3)
    torch.testing.assert_close(same, 3 * x)
    by_place = joined(lambda window: lambda part, t: torch.full_like(part, window.left), windows)(x, 3)
    assert by_place[0, 0, 0].tolist() == [0, 0, 0, 1.5, 3, 3, 4.5, 6, 6, 6]
    wrapped = Window(top=0, left=8, height=4, width=4)
    assert torch.equal(wrapped.cut(x), torch.cat([x[..., 8:], x[..., :2]], dim=3))


def test_long_pictures_are_drawn_in_windows(m9: LatentDiffusion) -> None:
    long: dict[str, Any] = {"width": 160, "window": 64, "window_overlap": 32}
    found = drawn(m9, **long)
    assert found.shape == (64, 160, 3)
    assert (drawn(m9, width=64, window=64) == drawn(m9)).all(), "a single window is the image"
    stretches = drawn(m9, f"{tiny.CAT} | {tiny.CASTLE}", **long, stretches=True)
    whole = drawn(m9, tiny.CAT, **long)
    assert (stretches != whole).any()
    assert (drawn(m9, f"{tiny.CAT} | {tiny.CAT}", **long, stretches=True) == whole).all()
    for options, message in (
        ({"stretches": True}, "no effect without window"),
        ({"window_overlap": 8}, "no effect without window"),
        ({"window": 64, "window_overlap": 64}, "less than the window's 64"),
        ({"window": 9}, "multiples of 16"),
    ):
        with pytest.raises(InvalidRequestError, match=message):
            drawn(m9, **options)


def test_panoramas_have_no_edge(m9: LatentDiffusion) -> None:
    """Turning the noise turns the picture."""
    engine = EagerEngine(m9)
    resolved, _ = prepare(m9, tiny.CAT, **{**SMALL, "width": 128}, window=64, window_overlap=32, seamless="x")
    assert circular_axes(resolved) == ""

    with torch.no_grad():
        predict = condition(
            m9, engine, resolved, Batch(0, (tiny.CAT,)), lambda text: encode_prompts(m9, engine, [text])[0]
        )
        shape = (1, *engine.latent_shape(64, 128))
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        stride = 32 // engine.cell
        eps = predict(shape)
        torch.testing.assert_close(eps(x.roll(stride, 3), 500), eps(x, 500).roll(stride, 3), rtol=1e-4, atol=1e-4)
        turned = decoded(engine, resolved, x.roll(shape[3] // 2, 3)).roll(-64, 3)
        straight = decoded(engine, resolved, x)
        assert float((turned - straight).abs().mean()) < 0.3 * float(straight.std())


def test_both_passes_of_a_panorama_go_over_its_edge(m9: LatentDiffusion) -> None:
    """The first pass is as large as one window."""
    engine = EagerEngine(m9)
    resolved, _ = prepare(m9, tiny.CAT, **SMALL, window=64, window_overlap=32, hires=2, seamless="x")
    for length in (64, 128):
        windows = windows_of(resolved, engine.cell, engine.latent_shape(64, length)[1:])
        assert windows is not None
        assert any(window.left + window.width > length // engine.cell for window in windows)
    x = torch.randn(1, *engine.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, turned = decoded(engine, resolved, x), decoded(engine, resolved, x.roll(x.shape[3] // 2, 3))
    torch.testing.assert_close(turned.roll(-32, 3), whole, rtol=1e-4, atol=1e-4)


def test_tiles_are_nearly_the_whole(m9: LatentDiffusion) -> None:
    engine = EagerEngine(m9)
    x = torch.randn(1, *engine.latent_shape(128, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = engine.decode(x)
        tiled = decode_in_tiles(engine.decode, x, tile=24, overlap=12, factor=engine.cell)
        one = decode_in_tiles(engine.decode, x, tile=64, overlap=8, factor=engine.cell)
    torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-4)
    assert tiled.shape == whole.shape and tiled.isfinite().all()
    assert float((tiled - whole).abs().mean()) < 0.35 * float(whole.std())


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_seamless_images_go_on_at_the_opposite_edge(axes: str, m9: LatentDiffusion) -> None:
    twin = seamless(m9, axes)
    assert all(a is b for a, b in zip(twin.parameters(), m9.parameters(), strict=True)), "no weight is copied"
    x = torch.randn(1, *EagerEngine(m9).latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for axis, dim in (("x", 3), ("y", 2)):
            turned = EagerEngine(twin).decode(x.roll(2, dim)).roll(-2 * EagerEngine(m9).cell, dim)
            is_same = torch.allclose(turned, EagerEngine(twin).decode(x), atol=1e-3)
            assert is_same is (axis in axes)
    assert (drawn(m9, seamless=axes) != drawn(m9)).any()


@pytest.mark.parametrize("upscaler", ["picture", "latent"])
def test_two_passes(upscaler: str, m9: LatentDiffusion, tmp_path: Path) -> None:
    two: dict[str, Any] = {**SMALL, "hires": 2, "hires_strength": 0.5, "hires_upscaler": upscaler}
    result = draw_to_folder(m9, tiny.CAT, tmp_path, **two)
    assert result.images[0].size == (128, 128)
    assert result.grid_path is not None and Image.open(result.grid_path).size == (128, 128)
    resolved, _ = prepare(m9, tiny.CAT, **two)
    steps = [event for event in draw(m9, resolved) if isinstance(event, Step)]
    assert [step.index for step in steps] == list(range(6)) and {step.total for step in steps} == {6}
    assert steps[-1].x.shape[2] == 2 * steps[0].x.shape[2]
    with pytest.raises(InvalidRequestError, match="leaves none of 4 steps") as caught:
        generate(m9, tiny.CAT, **{**two, "hires_strength": 0.1})
    assert caught.value.field == "hires_strength"


@pytest.mark.parametrize("seed_mode", ["batch", "per_image"])
def test_a_skipped_batch_changes_no_other(seed_mode: str, m9: LatentDiffusion) -> None:
    """Not where passes and fresh noise draw more random numbers either."""
    resolved, _ = prepare(
        m9,
        [tiny.CAT, tiny.CASTLE],
        **SMALL,
        seed_mode=seed_mode,
        sampler="euler_ancestral",
        hires=2,
        hires_strength=0.5,
    )
    whole = [event.image.tobytes() for event in draw(m9, resolved) if not isinstance(event, Step)]
    rest = [event.image.tobytes() for event in draw(m9, resolved, frozenset([0])) if not isinstance(event, Step)]
    assert rest == whole[1:]


def test_variations_are_near_an_image(m9: LatentDiffusion) -> None:
    base = drawn(m9)
    near, far = (drawn(m9, variation_seed=9, variation_strength=share) for share in (0.05, 1.0))
    assert 0 < np.abs(near - base).mean() < np.abs(far - base).mean()
    assert np.abs(far - drawn(m9, seed=9)).max() <= 1, "all of another noise is that noise"
    resolved, _ = prepare(
        m9, tiny.CAT, **{**SMALL, "height": 512, "width": 512}, variation_seed=9, variation_strength=0.5
    )
    noise = CallNoise(resolved, EagerEngine(m9).latent_shape(512, 512), m9.device)
    assert noise.start(next(resolved.batches()))[0].std().item() == pytest.approx(1, abs=0.02), "as loud as any noise"
    several = generate(m9, tiny.CAT, **SMALL, variation_seed=9, variation_strength=0.3, images_per_prompt=2)
    assert several.seeds == [1, 1] and several.images[0].tobytes() != several.images[1].tobytes()
    a, b = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    assert slerp(a, b, 0.5).std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("size", [(100, 70), (500, 333), (61, 64)])
def test_pictures_of_any_size_keep_their_pixels_outside_the_mask(size: tuple[int, int], m9: LatentDiffusion) -> None:
    image = gradient(size) if size[0] == size[1] else Image.effect_noise(size, 60).convert("RGB")
    result = generate(m9, tiny.CAT, steps=2, seed=1, init_image=image, mask_image="16,16,48,40", strength=1)
    found = pixels(result.images[0])
    assert result.images[0].size == size
    inside = np.zeros(size[::-1], bool)
    inside[16:40, 16:48] = True
    assert (found[~inside] == pixels(image)[~inside]).all() and (found[inside] != pixels(image)[inside]).any()
    wider = generate(m9, tiny.CAT, steps=2, seed=1, init_image=image, outpaint="left=10").images[0]
    assert wider.size == (size[0] + 10, size[1]) and (pixels(wider)[:, 10:] == pixels(image)).all()


def test_masks_that_vanish_are_refused(m9: LatentDiffusion) -> None:
    image = Image.new("RGB", (256, 128))
    for options, field in (
        ({"mask_image": "0,0,30,128", "height": 64, "width": 64}, "mask_image"),
        ({"mask_image": "10,10,14,14", "mask_feather": 40}, "mask_feather"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            prepare(m9, tiny.CAT, steps=2, init_image=image, **options)
        assert caught.value.field == field


def test_a_strength_of_nothing_is_refused(m9: LatentDiffusion) -> None:
    for options in ({"strength": 0}, {"strength": 0, "full_steps": True}, {"strength": 0.001, "full_steps": True}):
        with pytest.raises(InvalidRequestError, match=r"strength|full_steps"):
            prepare(m9, tiny.CAT, steps=4, init_image=gradient(), **options)


def test_every_stretch_needs_a_window(m9: LatentDiffusion) -> None:
    with pytest.raises(InvalidRequestError, match="3 stretches need more or smaller windows than 2"):
        prepare(m9, "a | b | c", **{**SMALL, "width": 96}, window=64, window_overlap=0, stretches=True)
    prepare(m9, "a | b", **{**SMALL, "width": 128}, window=64, window_overlap=0, stretches=True)


def test_scrolls_go_on_in_windows(m9: LatentDiffusion) -> None:
    image = Image.effect_noise((200, 64), 60).convert("RGB")
    found = generate(m9, tiny.CAT, steps=2, seed=1, init_image=image, outpaint="right=56", window=64).images[0]
    assert found.size == (256, 64) and (pixels(found)[:, :200] == pixels(image)).all()
