"""LoRAs: files of every naming, what they change, and that others read ours."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from flagai_altdiff import AutoLoader, add_lora, lora, remove_loras
from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers
from flagai_altdiff.config import RELEASED, LatentDiffusionConfig
from flagai_altdiff.errors import CheckpointError, InvalidRequestError
from flagai_altdiff.loading import load_path
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


@pytest.mark.fault(42)
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
    refused({**tensors, "lora_unet_of_another_kind.lora_down.weight": torch.zeros(1, 1)}, "no place for: lora_unet_of")
    refused({"a": torch.zeros(1)}, "is no LoRA")
    refused({**tensors, down: torch.full_like(tensors[down], float("nan"))}, "is broken: .* has NaN")
    refused({**tensors, down: torch.zeros(RANK)}, "must be matrices")
    refused({**tensors, down.replace("lora_down.weight", "alpha"): torch.ones(2)}, "its alpha a number")
    refused({"lora_unet_x.hada_w1_a": torch.zeros(1)}, "is LoHa")


@pytest.mark.parametrize(
    "key",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight",
    ],
)
def test_what_is_for_clip_is_left_out_and_named(key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, merged, additions = trained()
    lora.save_lora(tmp_path / "x.safetensors", additions, plain.config)
    save_file({**load_file(tmp_path / "x.safetensors"), key: torch.zeros(1, 1)}, tmp_path / "y.safetensors")
    lora.add_lora(plain, tmp_path / "y.safetensors")
    assert differences(plain, merged) == {}
    assert "1 keys are left out" in caplog.text and "XLM-R" in caplog.text and key[:40] in caplog.text


STABLE_DIFFUSION: dict[str, dict[str, Any]] = {
    "1.x": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "2.x": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}


@pytest.mark.fault(42)
@pytest.mark.parametrize(
    ("version", "model", "fits"),
    [
        ("1.x", "AltDiffusion-m9", True),
        ("1.x", "AltDiffusion", True),
        ("2.x", "AltDiffusion-m18", True),
        ("2.x", "AltDiffusion-m9", False),
        ("1.x", "AltDiffusion-m18", False),
    ],
)
def test_loras_of_stable_diffusion_fit_at_full_size(version: str, model: str, fits: bool, tmp_path: Path) -> None:
    """Every attention of Stable Diffusion's UNet, with kohya's names; the two kinds are of different widths."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(sample_size=64, **STABLE_DIFFUSION[version])
    tensors = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.ones(1, module.in_features)
            tensors[f"{key}.lora_up.weight"] = torch.ones(module.out_features, 1)
            tensors[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "sd.safetensors")
    config = RELEASED[model]
    assert isinstance(config, LatentDiffusionConfig)
    if fits:
        assert len(lora.read_lora(tmp_path / "sd.safetensors", config)) == len(tensors) // 3 == 128
    else:
        with pytest.raises(CheckpointError, match=r"another model: .*(768|1024).*(768|1024)"):
            lora.read_lora(tmp_path / "sd.safetensors", config)


def test_a_lora_is_taken_off_to_the_bit(tmp_path: Path) -> None:
    path, model = written(tmp_path), tiny.fresh_model("m9")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_lora(model, path, 0.7, removable=True)
    add_lora(model, path, -0.3, removable=True)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    remove_loras(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert model.loras == () and not model.before_loras
    add_lora(model, path)
    for act in (lambda: remove_loras(model), lambda: add_lora(model, path, removable=True)):
        with pytest.raises(InvalidRequestError, match="removable"):
            act()


def written(folder: Path, name: str = "m9") -> Path:
    """A LoRA's file."""
    folder.mkdir(exist_ok=True)
    plain, _, additions = trained(name)
    lora.save_lora(folder / "robot.safetensors", additions, plain.config)
    return folder / "robot.safetensors"


def test_a_model_knows_what_was_added_to_it(tmp_path: Path) -> None:
    path, model = written(tmp_path), tiny.fresh_model("m9")
    assert tiny.fresh_model("m9").loras == ()
    add_lora(model, str(path), 0.5)
    add_lora(model, path, -0.5)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [str(added) for added in model.loras] == [f"robot:{s} ({digest[:10]})" for s in ("0.5", "-0.5")]
    assert differences(model, tiny.fresh_model("m9")) == {}
    assert model.state_dict().keys() == tiny.fresh_model("m9").state_dict().keys()


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 11, -80])
def test_a_strength_out_of_range_changes_nothing(strength: float, tmp_path: Path) -> None:
    path, model = written(tmp_path), tiny.fresh_model("m9")
    with pytest.raises(InvalidRequestError, match="from -10 to 10"):
        add_lora(model, path, strength)
    assert differences(model, tiny.fresh_model("m9")) == {} and model.loras == ()


def test_convolutions_are_written_as_such(tmp_path: Path) -> None:
    """diffusers and A1111 add them to convolutions, as which m9 has these projections."""
    tensors = load_file(written(tmp_path))
    model = tiny.fresh_model("m9")
    down, up = (tensors[f"lora_unet_down_blocks_0_attentions_0_proj_in.lora_{part}.weight"] for part in ("down", "up"))
    width = model.get_parameter("model.diffusion_model.input_blocks.1.1.proj_in.weight").shape[0]
    assert (down.shape, up.shape) == ((RANK, width, 1, 1), (width, RANK, 1, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "with use_rslora"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_q": 3}}, "with alpha_pattern"),
        (None, "settings .* cannot be read"),
    ],
)
def test_settings_of_peft_that_are_not_understood(
    settings: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    plain, _, additions = trained("m9")
    save_file(spelled(additions, plain.config, SPELLINGS["peft"]), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{" if settings is None else json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        add_lora(plain, tmp_path / "adapter_model.safetensors")


def test_auto_loader_adds_what_lies_in_lora_dir(m9_folder: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "loras")
    written(tmp_path / "twice").rename(tmp_path / "twice" / "a.safetensors")
    written(tmp_path / "twice")
    (tmp_path / "twice" / "notes.txt").touch()
    for place, count in ((path, 1), (tmp_path / "loras", 1), (tmp_path / "twice", 2)):
        model = AutoLoader("text2img", str(m9_folder), lora_dir=place, safety_checker=False).get_model()
        assert [added.strength for added in model.loras] == [1.0] * count
        assert differences(model, load_path(m9_folder, safety_checker=False))
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="is no LoRA: expected a file"):
            AutoLoader("text2img", str(m9_folder), lora_dir=place)


def test_a_trained_lora_learns_only_its_own(m9_folder: Path) -> None:
    model = load_path(m9_folder, safety_checker=False)
    names: list[str] = lora.make_trainable(model, rank=2, alpha=2.0, generator=torch.Generator())
    assert all(re.fullmatch(lora.TRANSFORMERS, name) for name in names)
    for kind in ("attn1.to_q", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"):
        assert any(f".{kind}." in name for name in names), kind
