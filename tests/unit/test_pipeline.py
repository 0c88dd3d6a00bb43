"""Native calls: their defaults, threads that share a model, precisions, and a process that is left as it was."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flagai_altdiff import GenerationRequest, Predictor, Sample, Step, generate, stream
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.pipeline import GenerationResult, draw, prepare, unwrapped
from flagai_altdiff.request import SeedMode
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}
LONG = "a castle on a hill at sunset with many small towers, " * 12


def pixels(result: GenerationResult) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image).astype(int) for image in result.images])


def test_defaults_are_a_librarys(m9: LatentDiffusion) -> None:
    first, second = (generate(m9, tiny.CAT, **SMALL) for _ in range(2))
    assert len(first.images) == 1
    assert first.request.seed_mode == "per_image"
    assert first.seeds == [first.request.seed] != second.seeds
    again = generate(m9, tiny.CAT, seed=first.seeds[0], **SMALL)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert generate(m9, first.request).images[0].tobytes() == first.images[0].tobytes()


def test_prompts_options_and_requests_are_three_ways_to_ask(m9: LatentDiffusion) -> None:
    request = GenerationRequest(prompts=(tiny.CAT, tiny.CASTLE), seed=3, **SMALL)
    wanted = pixels(generate(m9, request))
    assert (pixels(generate(m9, [tiny.CAT, tiny.CASTLE], seed=3, **SMALL)) == wanted).all()
    events = list(stream(m9, request))
    assert [type(e) for e in events] == [Step, Step, Sample] * 2
    samples = [e for e in events if isinstance(e, Sample)]
    assert [s.prompt for s in samples] == [tiny.CAT, tiny.CASTLE]
    assert (np.stack([np.asarray(s.image) for s in samples]) == wanted).all()
    with pytest.raises(InvalidRequestError, match="GenerationRequest"):
        generate(m9, request, steps=3)
    with pytest.raises(InvalidRequestError, match="did you mean 'steps'"):
        generate(m9, tiny.CAT, step=3)


def test_the_negative_prompt_is_encoded_once_in_a_call(m9: LatentDiffusion) -> None:
    encoded: list[object] = []
    hook = m9.cond_stage_model.register_forward_pre_hook(lambda module, inputs: encoded.append(inputs))
    try:
        generate(m9, tiny.CAT, iterations=3, **SMALL)
    finally:
        hook.remove()
    assert len(encoded) == 1 + 3


@pytest.mark.fault(109)
def test_an_image_does_not_depend_on_its_neighbours(m9: LatentDiffusion) -> None:
    """Short and long prompts of one batch are encoded apart."""
    alone = [pixels(generate(m9, prompt, seed=4 + i, **SMALL))[0] for i, prompt in enumerate((tiny.CAT, LONG))]
    together = pixels(generate(m9, [tiny.CAT, LONG], seed=4, batch_size=2, **SMALL))
    assert max(np.abs(a - b).max() for a, b in zip(alone, together, strict=True)) <= 1


@pytest.fixture
def _switching_fast() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.fault(109)
@pytest.mark.usefixtures("_switching_fast")
@pytest.mark.parametrize("seed_mode", ["batch", "per_image"])
def test_threads_that_share_a_model_get_the_images_of_their_seeds(seed_mode: str, m9: LatentDiffusion) -> None:
    def drawn(job: tuple[str, int, str]) -> bytes:
        prompt, seed, sampler = job
        options: dict[str, Any] = {**SMALL, "sampler": sampler, "eta": 0.5 if sampler == "ddim" else 0.0}
        return generate(m9, prompt, seed=seed, seed_mode=seed_mode, **options).images[0].tobytes()

    jobs = [
        (prompt, seed, sampler)
        for prompt in (tiny.CAT, LONG, "")
        for seed in (7, 8)
        for sampler in ("ddim", "euler_ancestral")
    ]
    wanted = [drawn(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(drawn, jobs * 3)) == wanted * 3


@pytest.mark.fault(109)
@pytest.mark.usefixtures("_switching_fast")
def test_threads_may_tokenize_texts_of_every_length(m9: LatentDiffusion) -> None:
    texts = ["", tiny.CAT, LONG, LONG * 10, "<pad> " * 100]
    wanted = [m9.tokenize([text]) for text in texts]
    lost = [generate(m9, text, seed=1, **SMALL, guidance_scale=1).notes for text in texts]

    def check(i: int) -> bool:
        k = i % len(texts)
        assert m9.text_tokenizer is not None
        same_loss = [n.kind for n in prepare(m9, texts[k], **SMALL)[1]] == [n.kind for n in lost[k]]
        return same_loss and torch.equal(m9.tokenize([texts[k]]), wanted[k])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(150)))


@pytest.mark.fault(110)
def test_the_process_is_left_as_it_was(m9: LatentDiffusion, tmp_path: Path) -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    os.environ.pop("PL_GLOBAL_SEED", None)
    environment = dict(os.environ)
    before = (torch.get_rng_state(), str(np.random.get_state()), random.getstate(), os.umask(0o022))
    os.umask(before[3])
    for seed_mode in ("batch", "per_image"):
        generate(m9, tiny.CAT, seed=9, seed_mode=seed_mode, sampler="euler_ancestral", **SMALL)
    Predictor(m9).predict_generate_images(tiny.CAT, tmp_path, H=64, W=64, ddim_steps=1, fixed_code=True)
    after = (torch.get_rng_state(), str(np.random.get_state()), random.getstate(), os.umask(0o022))
    os.umask(after[3])
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert dict(os.environ) == environment
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def _double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.fault(110)
def test_another_default_dtype_changes_nothing(m9: LatentDiffusion, m9_folder: Path, request: Any) -> None:
    wanted = {mode: pixels(generate(m9, tiny.CAT, seed=3, seed_mode=mode, **SMALL)) for mode in ("batch", "per_image")}
    request.getfixturevalue("_double_by_default")
    for model in (m9, load_path(m9_folder, safety_checker=False)):
        for mode, images in wanted.items():
            assert (pixels(generate(model, tiny.CAT, seed=3, seed_mode=mode, **SMALL)) == images).all()


@pytest.mark.fault(111)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3), (torch.bfloat16, 16), (torch.float64, 1)])
def test_a_model_may_be_cast(dtype: torch.dtype, tolerance: float, m9: LatentDiffusion, m9_folder: Path) -> None:
    cast = load_path(m9_folder, safety_checker=False).to(dtype)
    options: dict[str, Any] = {**SMALL, "seed": 3, "guidance_scale": 1.0}
    wanted, got = pixels(generate(m9, tiny.CAT, **options)), pixels(generate(cast, tiny.CAT, **options))
    assert np.abs(wanted - got).mean() < tolerance
    step = next(e for e in stream(cast, tiny.CAT, **options) if isinstance(e, Step))
    preview = cast.decode_first_stage(step.pred_x0)  # float32 latents, whatever the weights are
    assert preview.shape == (1, 3, 64, 64)
    assert cast.encode_first_stage(torch.zeros(1, 3, 64, 64)).mode().dtype == dtype


@pytest.mark.fault(111)
def test_parts_of_a_model_may_have_precisions_of_their_own(m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False)
    model.model.bfloat16()
    model.cond_stage_model.half()
    assert len(generate(model, tiny.CAT, **SMALL).images) == 1


@pytest.mark.fault(111)
def test_wrapped_models_are_unwrapped(m9: LatentDiffusion, tmp_path: Path) -> None:
    wanted = generate(m9, tiny.CAT, seed=3, **SMALL).images[0].tobytes()
    for wrapped in (torch.compile(m9), torch.nn.DataParallel(m9), torch.compile(torch.nn.DataParallel(m9))):
        assert unwrapped(wrapped) is m9  # type: ignore[arg-type]
        assert generate(wrapped, tiny.CAT, seed=3, **SMALL).images[0].tobytes() == wanted  # type: ignore[arg-type]
        assert Predictor(wrapped).model is m9  # type: ignore[arg-type]
    for other in ("AltDiffusion-m9", None, torch.nn.Linear(1, 1), torch.compile(torch.nn.Linear(1, 1))):
        with pytest.raises(TypeError, match="LatentDiffusion"):
            generate(other, tiny.CAT)  # type: ignore[arg-type]


def test_notes_are_data(m9: LatentDiffusion) -> None:
    result = generate(m9, [LONG, tiny.CAT], width=70, height=64, steps=6, guidance_scale=1.0)
    assert [note.kind for note in result.notes] == ["floored size", "changed steps", "cut prompt"]
    assert "70x64" in result.notes[0].text and "64x64" in result.notes[0].text
    assert "makes them 7" in result.notes[1].text
    assert generate(m9, tiny.CAT, **SMALL).notes == []


def test_more_steps_than_the_model_has_timesteps_are_refused(m9: LatentDiffusion) -> None:
    model = load_short(m9)
    with pytest.raises(InvalidRequestError, match="this model has 10 timesteps"):
        generate(model, tiny.CAT, **{**SMALL, "steps": 50})
    assert len(generate(model, tiny.CAT, **SMALL).images) == 1


def load_short(m9: LatentDiffusion) -> LatentDiffusion:
    short = build_model(tiny.tiny_config(tiny.VARIANTS["m9"], timesteps=10))
    short.text_tokenizer = m9.text_tokenizer
    return short.eval()


def test_a_scripts_tokenizer_may_be_called_beside_drawing(m9: LatentDiffusion, m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False)
    own = model.tokenizer = model.tokenizer
    assert own is not None and model.tokenizer is own
    script: Any = own
    script("x", truncation=True, max_length=5, padding="max_length")
    assert torch.equal(model.tokenize([LONG]), m9.tokenize([LONG]))
    assert script.backend_tokenizer.truncation["max_length"] == 5  # drawing has a copy, so neither disturbs the other


@pytest.mark.parametrize("seed_mode", ["batch", "per_image"])
def test_skipped_images_change_no_other(seed_mode: SeedMode, m9: LatentDiffusion) -> None:
    request = GenerationRequest(
        prompts=(tiny.CAT,), images_per_prompt=2, iterations=3, seed=1, seed_mode=seed_mode, eta=0.5, **SMALL
    )
    resolved, _ = prepare(m9, request)
    whole = {e.index: e.image.tobytes() for e in draw(m9, resolved) if isinstance(e, Sample)}
    part = {e.index: e.image.tobytes() for e in draw(m9, resolved, frozenset({0, 1, 2})) if isinstance(e, Sample)}
    assert sorted(part) == [3, 4, 5]
    assert all(whole[i] == image for i, image in part.items())


def test_gradients_are_off_only_inside(m9: LatentDiffusion) -> None:
    seen = [torch.is_grad_enabled() for _ in stream(m9, tiny.CAT, **SMALL)]
    assert all(seen) and torch.is_grad_enabled()
    barrier = threading.Barrier(2)

    def drawn() -> bool:
        barrier.wait()
        return generate(m9, tiny.CAT, **SMALL).images[0].size == (64, 64) and torch.is_grad_enabled()

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: drawn(), range(2)))
