"""A LoRA that was trained here gives in diffusers and peft what it gives here, and the reverse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers

from flagai_altdiff import lora
from flagai_altdiff.checkpoint.diffusers_folder import write_folder
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.models import LatentDiffusion
from tests import tiny
from tests.parity.test_diffusers import assert_close

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(params=["m9", "m18"])
def model(request: pytest.FixtureRequest) -> LatentDiffusion:
    return tiny.fresh_model(request.param)


@pytest.fixture
def unet(model: LatentDiffusion, tmp_path: Path) -> Any:
    """The same weights in diffusers."""
    write_folder(tmp_path / "model", model.config, to_diffusers(model.state_dict(), model.config), [])
    return UNet2DConditionModel.from_pretrained(tmp_path / "model", subfolder="unet").eval()


def inputs(model: LatentDiffusion) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 8, generator=generator)
    return x, torch.tensor([3, 700]), torch.randn(2, 77, model.config.unet.context_dim, generator=generator)


def moved(before: torch.Tensor, after: torch.Tensor) -> None:
    assert float((after - before).abs().max() / before.abs().max()) > 0.05, "the comparison says nothing"


@torch.no_grad()
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_ours_in_diffusers(strength: float, model: LatentDiffusion, unet: Any, tmp_path: Path) -> None:
    trained = tiny.fresh_model("m18" if model.config.cond_stage.has_pre_transformation else "m9")
    lora.make_trainable(trained, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(1))
    for name, parameter in trained.named_parameters():
        if name.endswith(".up"):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    lora.save_lora(tmp_path / "robot.safetensors", lora.finished(trained), model.config)
    before = model.apply_model(*inputs(model))
    lora.add_lora(model, tmp_path / "robot.safetensors", strength)
    ours = model.apply_model(*inputs(model))
    moved(before, ours)

    state, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / "robot.safetensors")
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=unet, adapter_name="robot")
    unet.set_adapters(["robot"], [strength])
    assert_close(ours, unet(*inputs(model)).sample)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [4, 12])
@pytest.mark.parametrize("way", ["diffusers' training script", "diffusers, the UNet alone", "peft's folder"])
def test_theirs_here(way: str, alpha: int, model: LatentDiffusion, unet: Any, tmp_path: Path) -> None:
    """Files of these have no alpha of their own: it stands in the header, or in a file beside."""
    before = model.apply_model(*inputs(model))
    settings = peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=ATTENTION, init_lora_weights="gaussian")
    wrapped = peft.get_peft_model(unet, settings) if way == "peft's folder" else unet
    if wrapped is unet:
        unet.add_adapter(settings)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    match way:
        case "peft's folder":
            wrapped.save_pretrained(tmp_path / "lora")
        case "diffusers, the UNet alone":
            unet.save_lora_adapter(tmp_path / "lora")
        case _:
            layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet))
            metadata = unet.peft_config["default"].to_dict()
            StableDiffusionPipeline.save_lora_weights(
                tmp_path / "lora", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata
            )
    (file,) = lora.lora_files(tmp_path / "lora")
    lora.add_lora(model, file)
    ours = model.apply_model(*inputs(model))
    moved(before, ours)
    assert_close(ours, unet(*inputs(model)).sample)
