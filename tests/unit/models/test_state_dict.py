"""Full-size models have exactly the keys, types and shapes of the released files (built on the meta device: no
memory)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flagai_altdiff.config import LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.registry import DRAWING, MODELS
from tests import tiny

DATA = Path(__file__).parents[2] / "data"
M9 = LatentDiffusionConfig()
M18 = LatentDiffusionConfig(
    unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
    cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
)
RELEASED = {"AltDiffusion": (M9, "m9"), "AltDiffusion-m9": (M9, "m9"), "AltDiffusion-m18": (M18, "m18")}


def on_meta(config: LatentDiffusionConfig) -> LatentDiffusion:
    with torch.device("meta"):
        return build_model(config)


def listed(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    rows = (line.split("\t") for line in (DATA / f"state_dict_AltDiffusion-{name}.tsv").read_text().splitlines())
    return {key: (dtype, tuple(map(int, shape.split("x")))) for key, dtype, shape in rows}


def test_every_released_model_has_a_list() -> None:
    assert set(RELEASED) == {name for name, spec in MODELS.items() if spec.task == DRAWING and not spec.embedded}


@pytest.mark.parametrize("name", RELEASED)
def test_keys_types_and_shapes_are_those_of_the_released_file(name: str) -> None:
    config, family = RELEASED[name]
    state = {k: (str(v.dtype).removeprefix("torch."), tuple(v.shape)) for k, v in on_meta(config).state_dict().items()}
    expected = listed(family)
    assert len(expected) == 1342
    assert set(state) == set(expected)
    assert {k: v for k, v in state.items() if expected[k] != v} == {}


@pytest.mark.parametrize(("config", "unet", "text"), [(M9, 859_520_964, 560_678_656), (M18, 865_910_724, 560_941_824)])
def test_numbers_of_parameters(config: LatentDiffusionConfig, unet: int, text: int) -> None:
    model = on_meta(config)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(model.model) == unet
    assert count(model.first_stage_model) == 83_653_863
    assert abs(count(model.cond_stage_model) - text) < 10_000


def test_the_tiny_models_have_the_same_names_as_far_as_they_go(variant: str) -> None:
    full = {k.split(".")[-1] for k in listed(variant)}
    assert {k.split(".")[-1] for k in tiny.tiny_state(variant)} <= full
