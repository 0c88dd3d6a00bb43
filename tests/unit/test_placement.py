"""Little memory: the same images; weights are where they work only while they do."""

from __future__ import annotations

import copy
import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flagai_altdiff import generate, load_model
from flagai_altdiff.checkpoint import mapped
from flagai_altdiff.engine import make_engine
from flagai_altdiff.engine.sparing import SparingEngine
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare
from tests import tiny

MODES = ["low", "lowest"]
SMALL: dict[str, Any] = {"height": 64, "width": 96, "steps": 2, "seed": 7}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def kept(mode: str, variant_folder: Path) -> LatentDiffusion:
    return load_path(variant_folder, safety_checker=False, memory=mode)


def drawn(model: LatentDiffusion, **options: Any) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(generate(model, tiny.CAT, **{**SMALL, **options}).images[0]).astype(int)


def in_half(model: LatentDiffusion) -> set[str]:
    """Weights that are away at the moment, where half precision stands for another device."""
    return {name for name, weight in model.named_parameters() if weight.dtype is torch.bfloat16}


@pytest.mark.parametrize("options", [{}, {"hires": 2}, {"seamless": "x"}, {"images_per_prompt": 2, "window": 64}])
def test_images_are_the_same(options: dict[str, object], kept: LatentDiffusion, model: LatentDiffusion) -> None:
    assert isinstance(make_engine(kept, prepare(kept, tiny.CAT, **SMALL)[0]), SparingEngine)
    assert np.abs(drawn(kept, **options) - drawn(model, **options, engine="eager")).max() <= 1


def test_from_a_picture_too(kept: LatentDiffusion, model: LatentDiffusion) -> None:
    picture = generate(model, tiny.CAT, **SMALL).images[0]  # type: ignore[arg-type]
    options = {"init_image": picture, "height": None, "width": None, "steps": 4}
    assert np.abs(drawn(kept, **options) - drawn(model, **options, engine="eager")).max() <= 1


def test_copies_are_at_work_only(kept: LatentDiffusion, mode: str) -> None:
    """Half precision on the CPU stands for a device: there too, weights at work are copies."""
    homes = {name: weight.data_ptr() for name, weight in kept.named_parameters()}
    unet = kept.model.diffusion_model
    seen: list[set[str]] = []
    for module in (unet.input_blocks[1], unet.out, kept.first_stage_model.decoder, kept.cond_stage_model):
        module.register_forward_hook(lambda *_: seen.append(in_half(kept)))
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = kept.get_learned_conditioning([tiny.CAT])
        kept.apply_model(x, t, states)
        kept.decode_first_stage(x)
    text, early, late, decoded = seen
    of_unet = {name for name in homes if name.startswith("model.diffusion_model.")}
    assert not text
    if mode == "low":  # all of it until the decoder's turn comes
        assert early == late == of_unet and not decoded
    else:
        assert all(name.startswith("model.diffusion_model.input_blocks.1.") for name in early) or not early
        assert len(late) < 5 and not decoded
    kept.keeper.send_home()  # type: ignore[union-attr]
    assert {name: weight.data_ptr() for name, weight in kept.named_parameters()} == homes


def test_an_error_at_work_sends_them_home(kept: LatentDiffusion) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    handle = kept.model.diffusion_model.middle_block[0].register_forward_hook(fail)
    args = (torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 77, kept.config.unet.context_dim))
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kept.apply_model(*args)
    handle.remove()
    kept.keeper.send_home()  # type: ignore[union-attr]
    assert not in_half(kept)
    drawn(kept)


def test_moving_says_where_they_work(kept: LatentDiffusion) -> None:
    assert kept.to(torch.device("cpu"), torch.float64).dtype is torch.float64 and kept.device.type == "cpu"
    assert kept.to("meta") is kept and kept.device.type == kept.betas.device.type == "meta"
    assert {weight.device.type for weight in kept.parameters()} == {"cpu"}


def test_what_is_there_is_not_copied(kept: LatentDiffusion) -> None:
    """A device may be named without its number, which the place of a weight has."""
    places = {weight.data_ptr() for weight in kept.parameters()}
    kept.to(torch.device("cpu", 0))
    seen: list[set[int]] = []
    kept.model.diffusion_model.register_forward_hook(lambda *_: seen.append({w.data_ptr() for w in kept.parameters()}))  # type: ignore[arg-type]
    drawn(kept)
    assert seen == [places] * len(seen) and seen


def test_copies_and_pickles_draw(kept: LatentDiffusion, model: LatentDiffusion) -> None:
    wanted = drawn(model, engine="eager")
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    for other in (copy.deepcopy(kept), torch.load(file, weights_only=False)):
        assert np.abs(drawn(other) - wanted).max() <= 1
        assert other.memory == kept.memory


def test_threads_share_a_model(kept: LatentDiffusion) -> None:
    args = (torch.ones(1, 4, 8, 8), torch.zeros(1), torch.ones(1, 77, kept.config.unet.context_dim))

    def once() -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            kept.decode_first_stage(args[0])
            return kept.apply_model(*args)

    wanted = once()
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.extend(once() for _ in range(3))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 9 and all(torch.equal(one, wanted) for one in found)
    kept.keeper.send_home()  # type: ignore[union-attr]
    assert not in_half(kept)


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system is told about which addresses, of files that are mapped however small they are."""
    told: list[tuple[str, int]] = []
    advise = mapped._advise

    def listen(tensor: torch.Tensor, advice: str) -> None:
        told.append((advice, tensor.data_ptr()))
        advise(tensor, advice)

    monkeypatch.setattr(mapped, "_WORTH_MAPPING_BYTES", 0)
    monkeypatch.setattr(mapped, "_advise", listen)
    return told


def test_pages_are_let_go_part_by_part(
    advised: list[tuple[str, int]], mode: str, m18_folder: Path, m18: LatentDiffusion
) -> None:
    model = load_path(m18_folder, safety_checker=False, memory=mode)
    assert all(map(mapped.is_mapped, model.parameters()))
    advised.clear()
    word, last = (
        model.cond_stage_model.roberta.embeddings.word_embeddings.weight,
        model.model.diffusion_model.out[2].weight,
    )
    when: list[bool] = []
    model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: when.append(("MADV_DONTNEED", word.data_ptr()) in advised)  # type: ignore[arg-type]
    )
    assert np.abs(drawn(model) - drawn(m18, engine="eager")).max() <= 1
    assert all(when[1:]), "gone before the second step, at the latest"
    gone = [advice == "MADV_DONTNEED" for advice, place in advised if place == last.data_ptr()]  # type: ignore[operator]
    assert gone.count(True) == (2 if mode == "lowest" else 1), "after each step, or after the last"
    assert gone.count(False) == (2 if mode == "lowest" else 0), "read while the layer before it works"


def test_what_was_written_into_is_never_let_go(advised: list[tuple[str, int]], mode: str, m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False, memory=mode)
    before = drawn(model)
    weights = [weight for weight in model.parameters() if weight.nbytes > 8192]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    values = [weight.clone() for weight in weights]
    assert (drawn(model) != before).any()
    assert all(torch.equal(weight, value) for weight, value in zip(weights, values, strict=True))


def test_weights_are_at_home_between_drawings(kept: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = torch.zeros(1, 4, 8, 8), torch.zeros(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        kept.apply_model(x, t, torch.zeros(1, 77, kept.config.unet.context_dim))
    drawn(kept)
    assert not in_half(kept)


def test_weights_are_not_laid_out_anew(kept: LatentDiffusion) -> None:
    with pytest.raises(InvalidRequestError, match="no room"):
        generate(kept, tiny.CAT, **SMALL, engine="packed")  # type: ignore[arg-type]


def test_the_mode_is_remembered(mode: str, m9_folder: Path) -> None:
    assert load_model(m9_folder, memory=mode, safety_checker=False).memory == mode
    assert load_model(m9_folder, safety_checker=False).memory == "normal"


def test_the_checker_stays_on_the_processor(mode: str, m9_folder: Path, tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m9", "m9")
    tiny.write_safety_checker(folder / "safety_checker", concept_threshold=-2.0)
    model = load_path(folder, memory=mode)
    assert model.safety_checker is not None
    image = generate(load_path(m9_folder), tiny.CAT, **SMALL).images  # type: ignore[arg-type]
    assert model.safety_checker.check(image, torch.device("meta")) == [True]
