"""Weights in 8 or 4 bits."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flagai_altdiff import add_embedding, add_lora, draw_to_folder, generate, load_model, quantize_model
from flagai_altdiff.checkpoint.mapped import is_mapped
from flagai_altdiff.cli import main
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.quantized import PRECISIONS, Quantized, fold, is_quantized
from flagai_altdiff.registry import embedded_dir
from tests import tiny

SMALL: dict[str, Any] = {"height": 64, "width": 64, "steps": 6, "seed": 1}
MINI = embedded_dir() / "AltDiffusion-mini"


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def size_of(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(("kind", "most", "bits"), [("int8", 0.008, 8.3), ("int4", 0.11, 4.6)])
@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (nn.Linear(320, 64), noise(3, 320)),
        (nn.Conv2d(64, 32, 3, padding=1), noise(2, 64, 5, 6)),
        (nn.Conv2d(48, 40, 1, stride=2, bias=False), noise(2, 48, 5, 6)),
        (nn.Embedding(300, 100), torch.tensor([[0, 7], [299, 7]])),
    ],
)
def test_a_layer_in_few_bits_is_nearly_the_layer(
    kind: str, most: float, bits: float, layer: Any, given: torch.Tensor
) -> None:
    own = copy.deepcopy(layer)
    assert fold(own, PRECISIONS[kind]) and isinstance(own, Quantized) and isinstance(own, type(layer))
    with torch.no_grad():
        wanted, found = layer(given), own(given)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert 0 < float((found - wanted).norm() / wanted.norm()) < most
    assert own.weight.shape == layer.weight.shape
    groups = layer.weight.shape[1:].numel() % 64
    spare = 64 - groups if kind == "int4" and groups else 0
    rows = layer.weight.shape[0]
    size = sum(tensor.nbytes for tensor in own.buffers())
    assert 8 * size < bits * (layer.weight.numel() + spare * rows) + 8 * 8 * rows
    assert set(own.state_dict()) == set(layer.state_dict()), "its names stay the checkpoint's"


def test_every_number_lies_within_half_a_step() -> None:
    layer = nn.Linear(128, 16, bias=False)
    before = layer.weight.detach().clone()
    before[3] = 1e-6 * before[3]
    before[4] = 0.25
    for kind, levels in (("int8", 255), ("int4", 15)):
        own = nn.Linear(128, 16, bias=False)
        own.weight = nn.Parameter(before.clone())
        assert fold(own, PRECISIONS[kind])
        size = PRECISIONS[kind].group or 128
        spans = before.unflatten(1, (-1, size))  # type: ignore[no-untyped-call]
        steps = (spans.amax(2) - spans.amin(2)).repeat_interleave(size, 1) / levels
        # Ends and steps are rounded themselves where there are 4 bits.
        assert ((own.weight - before).abs() <= 0.5 * steps + 0.005 * before.abs().amax(1, keepdim=True) + 1e-12).all()
        assert own.weight[4].allclose(torch.tensor(0.25), rtol=1e-2)


def test_what_is_thin_stays_as_it_is() -> None:
    for layer in (nn.Conv2d(4, 320, 3), nn.Conv2d(320, 4, 3), nn.LayerNorm(64), nn.Embedding(1, 64)):
        before = type(layer)
        assert not fold(layer, PRECISIONS["int8"]) and type(layer) is before


@pytest.mark.parametrize(("kind", "least"), [("int8", 3.6), ("int4", 6.0)])
def test_the_embedded_model_takes_less_memory_and_draws(kind: str, least: float) -> None:
    plain, few = load_model("AltDiffusion-mini"), load_model("AltDiffusion-mini", quantize=kind)
    for part in ("model", "cond_stage_model"):
        assert size_of(plain.get_submodule(part)) > least * size_of(few.get_submodule(part))
    assert size_of(plain.first_stage_model) == size_of(few.first_stage_model)
    images = [np.asarray(generate(model, "a cat", steps=8, seed=1).images[0], float) for model in (plain, few, few)]
    assert (images[1] == images[2]).all()
    assert 0 < np.abs(images[1] - images[0]).mean() < (3 if kind == "int8" else 25)


def test_both_engines_draw_with_few_bits(model: LatentDiffusion, m9_folder: Path, m18_folder: Path) -> None:
    folder = m9_folder if model.config.cond_stage.has_pooler else m18_folder
    few = load_model(folder, quantize="int8", safety_checker=False)
    engines = ("eager", "packed", "auto")
    eager, packed, auto = (generate(few, tiny.CAT, **SMALL, engine=engine).images[0] for engine in engines)
    assert np.abs(np.asarray(eager, int) - np.asarray(packed, int)).max() <= 2
    assert auto.tobytes() == eager.tobytes(), "packing would take the memory again"
    half = load_model(folder, quantize="int4", safety_checker=False).bfloat16()
    assert generate(half, tiny.CAT, **SMALL, seamless="x").images[0].size == (64, 64)


def test_nothing_of_a_file_stays_mapped_unless_it_may(m9_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flagai_altdiff.checkpoint.mapped._WORTH_MAPPING_BYTES", 1)
    for mapped in (False, True):
        found = load_model(m9_folder, quantize="int8", safety_checker=False, mapped=mapped)
        assert any(is_mapped(tensor) for tensor in found.parameters()) is mapped
        assert not any(is_mapped(tensor) for tensor in found.model.buffers())


def test_few_bits_go_with_little_memory(m9_folder: Path) -> None:
    """The codes come and go as weights do: here copies in another precision show it, as on a GPU."""
    plain, sparing = (
        load_model(m9_folder, quantize="int8", memory=memory, safety_checker=False) for memory in ("auto", "low")
    )
    assert (plain.memory, sparing.memory) == ("normal", "low"), "whoever asks for few bits spares memory already"
    options: dict[str, Any] = {"height": 64, "width": 64, "steps": 2, "seed": 1, "engine": "eager"}
    images = [np.asarray(generate(model, tiny.CAT, **options).images[0], int) for model in (plain, sparing)]
    assert np.abs(images[0] - images[1]).max() <= 1
    layer = next(module for module in sparing.model.modules() if isinstance(module, Quantized))
    assert sparing.keeper is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hook = layer.register_forward_hook(lambda *_: kinds.append((layer.codes.dtype, layer.steps.dtype)))
        kinds: list[tuple[torch.dtype, torch.dtype]] = []
        unet = sparing.model.diffusion_model
        unet(torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 77, sparing.config.unet.context_dim))
    hook.remove()
    assert kinds == [(torch.uint8, torch.bfloat16)]
    sparing.keeper.send_home()
    assert layer.steps.dtype is torch.float32


def test_bad_kinds_are_refused_before_any_work() -> None:
    for kind in ("int2", "", 8, True):
        with pytest.raises(InvalidRequestError, match="int8 or int4"):
            load_model("no such model", quantize=kind)  # type: ignore[arg-type]


def test_weights_that_are_folded_do_not_change(tmp_path: Path) -> None:
    found = load_model("AltDiffusion-mini", quantize="int8")
    assert is_quantized(found)
    for change in (
        lambda: quantize_model(found, "int4"),
        lambda: add_lora(found, tmp_path / "any.safetensors"),
        lambda: add_embedding(found, tmp_path / "any.pt"),
    ):
        with pytest.raises(InvalidRequestError, match="do this first"):
            change()


def test_records_say_it_and_redraw_repeats_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    options = ["--steps", "4", "--n-samples", "1", "--skip-grid"]
    assert main(["generate", "a cat", "--quantize", "int4", *options, "-o", str(tmp_path / "a")]) == 0
    first = tmp_path / "a" / "samples" / "00000.png"
    assert read_record(first)["parts"] == [{"kind": "quantize", "name": "int4", "sha256": ""}]
    assert main(["redraw", str(first), "-o", str(tmp_path / "b")]) == 0
    again = tmp_path / "b" / "samples" / "00000.png"
    assert read_record(again)["parts"] == read_record(first)["parts"]
    from PIL import Image

    with Image.open(first) as one, Image.open(again) as other:
        assert one.tobytes() == other.tobytes()
    assert main(["redraw", str(first), "--quantize", "int8", "-o", str(tmp_path / "c")]) == 2, "not what it was"


def test_another_kind_is_another_run(tmp_path: Path) -> None:
    from flagai_altdiff import Output

    for kind in (None, "int8"):
        found = load_model("AltDiffusion-mini", quantize=kind)
        draw_to_folder(found, "a cat", Output(folder=tmp_path, resume=True), steps=3, seed=1)
    assert len(list((tmp_path / "samples").iterdir())) == 2
