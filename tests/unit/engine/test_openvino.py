"""The engine that OpenVINO runs: what it adds to the contract."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import openvino_telemetry
import pytest
import torch

from flagai_altdiff.added import PRECISION, AddedPart
from flagai_altdiff.cli import main
from flagai_altdiff.engine import EagerEngine, openvino
from flagai_altdiff.engine.graphs import Graphs
from flagai_altdiff.engine.openvino import OpenVinoEngine, has_half_precision
from flagai_altdiff.errors import InvalidRequestError, MissingDependencyError
from flagai_altdiff.images import load_image
from flagai_altdiff.loading import load_path
from flagai_altdiff.metadata import read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import generate, prepare
from tests import tiny


@torch.no_grad()
def test_a_changed_weight_is_seen() -> None:
    model = tiny.fresh_model("m9").eval()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    before = OpenVinoEngine(model).decode(latents)
    bias = model.first_stage_model.decoder.conv_out.bias
    assert bias is not None
    bias += 1
    torch.testing.assert_close(OpenVinoEngine(model).decode(latents), before + 1, rtol=1e-4, atol=1e-4)


def test_a_graph_is_made_once_for_a_shape_and_few_are_kept(m9: LatentDiffusion) -> None:
    graphs, made = Graphs(), []
    part = m9.first_stage_model
    for side in (8, 16, 8, 24, 16):
        graphs.of(part, [torch.zeros(1, 4, side, side)], "f32", lambda module: made.append(module) or module)  # type: ignore[func-returns-value, return-value]
    assert len(made) == 4


@torch.no_grad()
def test_threads_take_turns() -> None:
    model = tiny.fresh_model("m9").eval()
    latents = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found: dict[int, torch.Tensor] = {}

    def draw(row: int) -> None:
        with torch.no_grad():
            found[row] = OpenVinoEngine(model).decode(latents[row])

    threads = [threading.Thread(target=draw, args=(row,)) for row in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row in range(4):
        torch.testing.assert_close(found[row], EagerEngine(model).decode(latents[row]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*arguments: object, **more: object) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr(openvino_telemetry.Telemetry, "init", told)
    OpenVinoEngine(tiny.fresh_model("m9").eval()).decode(torch.zeros(1, 4, 8, 8))


@torch.no_grad()
def test_half_precision_is_used_where_it_is_asked_for_and_there(m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False)
    assert OpenVinoEngine(model).precision == "f32"
    model.autocast_dtype = torch.float16
    engine = OpenVinoEngine(model)
    assert engine.precision == ("bf16" if has_half_precision() else "f32")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(engine.decode(latents), EagerEngine(model).decode(latents), rtol=0.1, atol=0.1)
    notes = prepare(model, tiny.CAT, engine="openvino", height=64, width=64)[1]
    assert ("precision" in {note.kind for note in notes}) != has_half_precision()


@pytest.mark.filterwarnings("error::torch.jit._trace.TracerWarning")
def test_it_draws_when_asked_by_name(m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False)
    ours, plain = (
        generate(model, tiny.CAT, engine=engine, height=64, width=64, steps=2, seed=1).images[0]
        for engine in ("openvino", "eager")
    )
    apart = torch.tensor(list(ours.tobytes())).sub(torch.tensor(list(plain.tobytes()))).abs()
    assert apart.max() <= 1


def test_half_precision_is_recorded_and_redrawn(m9_folder: Path, tmp_path: Path) -> None:
    typed = ["-m", str(m9_folder), "-H", "64", "-W", "64", "-s", "2", "-n", "1", "--engine", "openvino", "--fp16"]
    assert main(["generate", tiny.CAT, *typed, "-o", str(tmp_path)]) == 0
    path = tmp_path / "samples" / "00000.png"
    parts = [AddedPart(**part) for part in read_record(path).get("parts", ())]
    assert parts == ([AddedPart(kind=PRECISION, name="bfloat16", sha256="")] if has_half_precision() else [])
    assert main(["redraw", str(path), "-m", str(m9_folder), "-o", str(tmp_path)]) == 0
    assert load_image(tmp_path / "samples" / "00001.png").tobytes() == load_image(path).tobytes()
    assert main(["redraw", str(path), "-m", str(m9_folder), "-o", str(tmp_path), "--engine", "eager"]) == 0
    assert read_record(tmp_path / "samples" / "00002.png").get("engine", "auto") == "eager"


def test_what_it_cannot_run_is_refused(m9: LatentDiffusion) -> None:
    with pytest.raises(InvalidRequestError, match="edges"):
        generate(m9, tiny.CAT, engine="openvino", height=64, width=64, steps=1, window=64, seamless="x")


def test_without_openvino_the_error_says_what_to_type(m9: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino._core.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="pip install openvino"):
        prepare(m9, "a cat", engine="openvino")
