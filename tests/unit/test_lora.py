"""LoRAs: files of every naming, what they change, and that others read ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagai_altdiff import lora
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.models import LatentDiffusion
from tests import tiny

RANK, ALPHA = 3, 6.0


def trained(name: str = "m18") -> tuple[LatentDiffusion, LatentDiffusion, dict[str, lora.Addition]]:
    """A model, the same with a LoRA merged into it, and the LoRA."""
    plain, merged = tiny.fresh_model(name), tiny.fresh_model(name)
    lora.make_trainable(merged, rank=RANK, alpha=ALPHA, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in merged.named_parameters():
        if parameter_name.endswith(".up"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    additions = lora.finished(merged, merge=True)
    return plain, merged, additions


def differences(one: LatentDiffusion, other: LatentDiffusion) -> dict[str, float]:
    theirs = other.state_dict()
    found = {name: float((weight.float() - theirs[name]).abs().max()) for name, weight in one.state_dict().items()}
    return {name: difference for name, difference in found.items() if difference > 1e-5}


@pytest.mark.parametrize("name", ["m9", "m18"])
def test_what_was_trained_is_added_again(name: str, tmp_path: Path) -> None:
    plain, merged, additions = trained(name)
    assert set(differences(plain, merged)) == set(additions) and len(additions) > 20
    lora.save_lora(tmp_path / "x.safetensors", additions, plain.config)
    lora.add_lora(plain, tmp_path / "x.safetensors")
    assert differences(plain, merged) == {}


def test_a_lora_begins_as_nothing_and_leaves_the_names_alone() -> None:
    model, names = tiny.fresh_model("m9"), set(tiny.fresh_model("m9").state_dict())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    x, t, cond = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, model.config.unet.context_dim)
    with torch.no_grad():
        expected = model.apply_model(x, t, cond)
        lora.make_trainable(model, rank=RANK, alpha=ALPHA, generator=torch.Generator())
        torch.testing.assert_close(model.apply_model(x, t, cond), expected)
    lora.finished(model)
    assert set(model.state_dict()) == names
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("strength", [0.0, 0.5, -1.0])
def test_strength(strength: float, tmp_path: Path) -> None:
    plain, merged, additions = trained()
    changed = tiny.fresh_model("m18")
    lora.save_lora(tmp_path / "x.safetensors", additions, plain.config)
    lora.add_lora(changed, tmp_path / "x.safetensors", strength)
    for name in additions:
        expected = plain.get_parameter(name).lerp(merged.get_parameter(name), strength)
        torch.testing.assert_close(changed.get_parameter(name), expected, atol=1e-5, rtol=1e-4)


def spelled(
    additions: dict[str, lora.Addition], config: Any, spell: Callable[[str, str], tuple[str, str]]
) -> dict[str, Tensor]:
    """The additions under other names; alpha is worked into ``up``."""
    tensors: dict[str, Tensor] = {}
    for name, addition in additions.items():
        ((theirs, _),) = to_diffusers({name: torch.empty(0, 0)}, config)["unet"].items()
        down, up = spell(
            theirs.removesuffix(".weight"), name.removesuffix(".weight").removeprefix("model.diffusion_model.")
        )
        tensors |= {down: addition.down.clone(), up: addition.scale * addition.up}
    return tensors


def old_processor(theirs: str, ours: str) -> tuple[str, str]:
    attention, _, leaf = theirs.replace(".to_out.0", ".to_out").rpartition(".")
    return tuple(f"unet.{attention}.processor.{leaf}_lora.{part}.weight" for part in ("down", "up"))  # type: ignore[return-value]


SPELLINGS: dict[str, Callable[[str, str], tuple[str, str]]] = {
    "peft": lambda theirs, ours: (f"unet.{theirs}.lora_A.weight", f"unet.{theirs}.lora_B.weight"),
    "diffusers": lambda theirs, ours: (f"unet.{theirs}.lora.down.weight", f"unet.{theirs}.lora.up.weight"),
    "attention processors": old_processor,
    "kohya with LDM's names": lambda theirs, ours: (
        f"lora_unet_{ours.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{ours.replace('.', '_')}.lora_up.weight",
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("safetensors", [True, False])
def test_files_of_other_programs_are_read(spelling: str, safetensors: bool, tmp_path: Path) -> None:
    plain, merged, additions = trained()
    tensors = spelled(additions, plain.config, SPELLINGS[spelling])
    path = tmp_path / "theirs"
    if safetensors:
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    lora.add_lora(plain, path)
    assert differences(plain, merged) == {}


def test_diffusers_reads_ours(tmp_path: Path) -> None:
    plain, _, additions = trained()
    lora.save_lora(tmp_path / "x.safetensors", additions, plain.config)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(tmp_path / "x.safetensors"))  # type: ignore[no-untyped-call]
    assert len(state) == 2 * len(additions) and set(alphas.values()) == {ALPHA}
    found: dict[str, lora.Addition] = {}
    for name, addition in additions.items():
        ((theirs, _),) = to_diffusers({name: torch.empty(0, 0)}, plain.config)["unet"].items()
        found |= {f"unet.{theirs.removesuffix('.weight')}": addition}
    for key, tensor in state.items():
        module = key.replace(".lora.down.weight", "").replace(".lora.up.weight", "").replace(".processor.", ".")
        module = module.replace("_lora.down.weight", "").replace("_lora.up.weight", "")
        match = next(a for name, a in found.items() if name.removesuffix(".0") == module.removesuffix(".0"))
        assert torch.equal(tensor.flatten(1), match.down if "down.weight" in key else match.up)


def test_files_for_something_else_are_named(tmp_path: Path) -> None:
    plain, _, additions = trained()
    lora.save_lora(tmp_path / "x.safetensors", additions, plain.config)
    tensors = load_file(tmp_path / "x.safetensors")
    down = next(key for key in tensors if key.endswith("lora_down.weight"))

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, tmp_path / "y.safetensors")
        before = {name: weight.clone() for name, weight in plain.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            lora.add_lora(plain, tmp_path / "y.safetensors")
        assert all(torch.equal(weight, before[name]) for name, weight in plain.state_dict().items())

    refused({**tensors, down: torch.zeros(RANK, 7)}, r"another model: .* \[3, 7\]")
    refused({key: value for key, value in tensors.items() if key != down}, "a truncated LoRA")
    refused(
        {**tensors, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(1, 1)}, "text encoder"
    )
    refused({"a": torch.zeros(1)}, "is no LoRA")
    refused({"lora_unet_x.hada_w1_a": torch.zeros(1)}, "is LoHa")
