"""The models of one process: which stay, which LoRAs they have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flagai_altdiff import lora
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.loading import load_path
from flagai_altdiff.machine import total_main_memory
from flagai_altdiff.web.settings import Drawing
from flagai_altdiff.web.shelf import Shelf, usual_memory


@pytest.fixture
def robot(m9_folder: Path, tmp_path: Path) -> Path:
    """A LoRA for the tiny m9."""
    model = load_path(m9_folder)
    generator = torch.Generator().manual_seed(0)
    names = lora.make_trainable(model, rank=2, alpha=2, generator=generator)
    for name in names:
        up = model.get_submodule(name.rpartition(".")[0]).parametrizations["weight"][0].up  # type: ignore[index,union-attr]
        up.data.normal_(generator=generator)  # type: ignore[operator,union-attr]
    lora.save_lora(tmp_path / "robot.safetensors", lora.finished(model), model.config)
    return tmp_path / "robot.safetensors"


def test_the_least_recently_used_goes(m9_folder: Path, m18_folder: Path) -> None:
    models = (str(m9_folder), str(m18_folder), "AltDiffusion-mini")
    sizes = {Path(name).name: Shelf(Drawing(models=models), "cpu").get(Path(name).name).size_bytes for name in models}
    shelf = Shelf(Drawing(models=models, max_memory=sum(sizes.values()) - 1), "cpu")
    m9 = shelf.get("AltDiffusion-m9")
    shelf.get("AltDiffusion-m18")
    assert shelf.get("AltDiffusion-m9") is m9  # used again, so the other one is older now
    shelf.get("AltDiffusion-mini")
    assert list(shelf._loaded) == ["AltDiffusion-m9", "AltDiffusion-mini"]
    assert shelf.get("AltDiffusion-m9") is m9


def test_half_of_the_memory_is_for_weights(m9_folder: Path) -> None:
    whole = total_main_memory()
    assert usual_memory("cpu") == whole / 2 and usual_memory("cpu", sharers=4) == whole / 8
    settings = Drawing(models=("AltDiffusion-mini", str(m9_folder)))
    shelf = Shelf(settings, "cpu")
    shelf.get("AltDiffusion-mini")
    shelf.get("AltDiffusion-m9")
    assert list(shelf._loaded) == ["AltDiffusion-mini", "AltDiffusion-m9"]  # there is room for both
    many = replace(settings, sharers=int(whole / 2 / shelf.get("AltDiffusion-m9").size_bytes))
    shelf = Shelf(many, "cpu")
    shelf.get("AltDiffusion-mini")
    shelf.get("AltDiffusion-m9")
    assert list(shelf._loaded) == ["AltDiffusion-m9"]


def test_loras_come_and_go_between_requests(m9_folder: Path, robot: Path) -> None:
    shelf = Shelf(Drawing(models=(str(m9_folder),), loras=(robot,)), "cpu")
    plain = {name: weight.clone() for name, weight in shelf.get("AltDiffusion-m9").model.named_parameters()}

    def changed() -> int:
        return sum(not torch.equal(plain[name], weight) for name, weight in loaded.model.named_parameters())

    loaded = shelf.get("AltDiffusion-m9", (("robot", 0.8),))
    assert changed() > 10 and [added.strength for added in loaded.model.loras] == [0.8]
    loaded = shelf.get("AltDiffusion-m9", (("robot", 0.2),))
    assert [added.strength for added in loaded.model.loras] == [0.2]
    loaded = shelf.get("AltDiffusion-m9")
    assert changed() == 0 and loaded.model.loras == ()


def test_a_model_is_named_by_its_end_only(m9_folder: Path) -> None:
    assert Drawing(models=("altdiffusion-MINI", str(m9_folder))).names == {
        "AltDiffusion-mini": "altdiffusion-MINI",
        "AltDiffusion-m9": str(m9_folder),
    }
    with pytest.raises(InvalidRequestError, match="different names"):
        _ = Drawing(models=("AltDiffusion-m9", str(m9_folder))).names
    with pytest.raises(InvalidRequestError, match="expected one of AltDiffusion-mini"):
        Shelf(Drawing(), "cpu").get("../AltDiffusion-mini")


def test_cards_are_read_without_weights(m9_folder: Path) -> None:
    (mini, m9), missing = Shelf(Drawing(models=("AltDiffusion-mini", str(m9_folder))), "cpu").cards()
    assert (mini.height, mini.steps, mini.guidance_scale, mini.downsampling) == (128, 20, 2.0, 8)
    assert missing == ()
    assert (m9.name, m9.height, m9.timesteps, m9.halvings) == ("AltDiffusion-m9", 512, 1000, 1)
