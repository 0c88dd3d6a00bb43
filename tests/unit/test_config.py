"""config.yaml is data: every known target is read, nothing is imported, nonsense is refused before it costs memory."""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flagai_altdiff.checkpoint.ldm_yaml import TARGETS, dump_config, load_config, parse_config
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import ConfigError, UnknownTargetError
from tests import tiny

PARTS = {UNetConfig: "unet_config", AutoencoderConfig: "first_stage_config", TextEncoderConfig: "cond_stage_config"}


def changed(path: str, value: object, variant: tiny.Variant = tiny.M9) -> dict[str, Any]:
    """A FlagAI config with the value at ``a.b.c`` below model.params replaced."""
    data = copy.deepcopy(tiny.config_data(variant))
    place = data["model"]["params"]
    *parents, last = path.split(".")
    for name in parents:
        place = place[name]
    place[last] = value
    return data


def part_of(config: LatentDiffusionConfig, key: str) -> object:
    return {
        "unet_config": config.unet,
        "first_stage_config": config.first_stage,
        "cond_stage_config": config.cond_stage,
    }[key]


@pytest.mark.parametrize("target", TARGETS)
def test_every_known_target_is_read_and_survives_a_round_trip(target: str, tmp_path: Path) -> None:
    key = PARTS[type(TARGETS[target]({}, "test"))]
    config = parse_config(changed(f"{key}.target", target))
    assert isinstance(part_of(config, key), tuple(PARTS))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_released_configs_are_read(variant: str, tmp_path: Path) -> None:
    tiny.write_config(tmp_path / "config.yaml", tiny.VARIANTS[variant])
    config = load_config(tmp_path / "config.yaml")
    m18 = variant == "m18"
    assert config.unet.num_heads == (None if m18 else 8)
    assert config.unet.num_head_channels == (64 if m18 else None)
    assert config.unet.use_linear_in_transformer is m18
    assert config.cond_stage.has_pre_transformation is m18
    assert config.cond_stage.project_dim == config.unet.context_dim
    assert config.first_stage.downsampling == 8
    assert config.unet.channel_mult == (1, 2)
    assert config.scale_factor == 0.18215


@pytest.mark.parametrize(
    "config",
    [
        LatentDiffusionConfig(),
        LatentDiffusionConfig(
            parameterization="v", scale_factor=0.5, timesteps=500, beta_schedule="cosine", use_ema=True
        ),
        LatentDiffusionConfig(
            unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
            cond_stage=TextEncoderConfig(
                project_dim=1024, has_pre_transformation=True, has_pooler=False, layer_norm_eps=1e-12
            ),
        ),
        LatentDiffusionConfig(first_stage=AutoencoderConfig(resolution=32, attn_resolutions=(16,), ch_mult=(1, 2, 4))),
    ],
)
def test_dump_and_load_agree(config: LatentDiffusionConfig, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_models_target_is_not_needed() -> None:
    data = tiny.config_data(tiny.M9)
    expected = parse_config(data)
    data["model"]["target"] = "ldm.models.diffusion.ddpm.LatentDiffusion"
    assert parse_config(data) == expected
    del data["model"]["target"]
    assert parse_config(data) == expected


@pytest.mark.fault(38)
@pytest.mark.parametrize("key", PARTS.values())
@pytest.mark.parametrize(
    "target", ["os.system", "canary_of_the_tests.Thing", "FLAGAI.model.mm.Unets.Unet.UNetModel", "", None, 7, ["a"]]
)
def test_an_unknown_target_is_refused_and_never_imported(
    key: str, target: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "imported"
    (tmp_path / "canary_of_the_tests.py").write_text(f"open({str(canary)!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownTargetError, match=key) as caught:
        parse_config(changed(f"{key}.target", target), "some.yaml")
    assert "some.yaml" in str(caught.value)
    assert next(iter(TARGETS)) in str(caught.value)
    assert not canary.exists()
    assert "canary_of_the_tests" not in sys.modules


def test_a_target_of_another_part_is_refused() -> None:
    with pytest.raises(UnknownTargetError, match="unet_config"):
        parse_config(changed("unet_config", changed("timesteps", 1)["model"]["params"]["first_stage_config"]))


@pytest.mark.parametrize(
    "path",
    [
        "surprise",
        "unet_config.params.surprise",
        "first_stage_config.params.surprise",
        "first_stage_config.params.ddconfig.surprise",
        "cond_stage_config.params.surprise",
    ],
)
def test_an_unknown_parameter_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match="unknown parameter surprise"):
        parse_config(changed(path, 1))


@pytest.mark.parametrize(
    "path",
    [
        "monitor",
        "ckpt_path",
        "scheduler_config",
        "unet_config.params.use_fp16",
        "unet_config.params.fp16",
        "unet_config.params.use_hypernetwork",
        "first_stage_config.params.lossconfig",
        "cond_stage_config.params.name",
        "cond_stage_config.params.ckpt_path",
    ],
)
def test_parameters_without_meaning_are_accepted(path: str) -> None:
    assert parse_config(changed(path, "/nowhere/at/all")) == parse_config(tiny.config_data(tiny.M9))


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("timesteps", "1000", "timesteps"),
        ("timesteps", 0, "timesteps"),
        ("timesteps", 1000.0, "timesteps"),
        ("timesteps", True, "timesteps"),
        ("timesteps", 10**9, "timesteps"),
        ("scale_factor", float("nan"), "scale_factor"),
        ("scale_factor", float("inf"), "scale_factor"),
        ("scale_factor", 0, "scale_factor"),
        ("scale_factor", "0.18", "scale_factor"),
        ("parameterization", "score", "parameterization"),
        ("use_ema", "yes", "use_ema"),
        ("unet_config.params.model_channels", -32, "model_channels"),
        ("unet_config.params.model_channels", 40, "norm groups"),
        ("unet_config.params.model_channels", None, "model_channels"),
        ("unet_config.params.channel_mult", "1,2", "channel_mult"),
        ("unet_config.params.channel_mult", [1] * 99, "channel_mult"),
        ("unet_config.params.channel_mult", [1, 0], "channel_mult"),
        ("unet_config.params.num_heads", 7, "heads"),
        ("unet_config.params.use_spatial_transformer", False, "use_spatial_transformer"),
        ("unet_config.params.context_dim", 65, "context_dim"),
        ("unet_config.params.in_channels", 9, "channels"),
        ("unet_config.params", "model_channels", "mapping"),
        ("unet_config", "UNet", "unet_config"),
        ("first_stage_config.params.ddconfig.ch", 100, "norm groups"),
        ("first_stage_config.params.ddconfig.double_z", False, "double_z"),
        ("cond_stage_config.params", {"hidden_size": 100, "num_attention_heads": 3, "project_dim": 64}, "hidden_size"),
    ],
)
def test_wrong_values_are_refused(path: str, value: object, word: str) -> None:
    data = changed(path, value)
    if path == "unet_config.params.context_dim":
        data["model"]["params"]["cond_stage_config"]["params"] = {"project_dim": 64}
    with pytest.raises(ConfigError, match=word):
        parse_config(data)


@pytest.mark.parametrize(
    ("path", "value"),
    [("unet_config.params.norm_groups", 3), ("cond_stage_config.params", {"project_dim": 9}), ("timesteps", 200_000)],
)
def test_sizes_that_contradict_each_other_are_refused_with_the_file(path: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps(changed(path, value)))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(("channels", "said"), [(9, True), (5, False)])
def test_a_unet_made_for_inpainting_alone_is_refused_with_another_way(channels: int, said: bool) -> None:
    with pytest.raises(ConfigError, match=f"takes {channels} and gives 4 channels") as caught:
        parse_config(changed("unet_config.params.in_channels", channels))
    assert ("made for inpainting" in str(caught.value) and "--mask FILE" in str(caught.value)) is said


WIDTHS = (
    "unet_config.params.model_channels",
    "first_stage_config.params.ddconfig.ch",
    "cond_stage_config.params.hidden_size",
)
COUNTS = (
    "unet_config.params.num_res_blocks",
    "unet_config.params.transformer_depth",
    "first_stage_config.params.ddconfig.num_res_blocks",
    "cond_stage_config.params.num_hidden_layers",
)


@pytest.mark.fault(39)
@pytest.mark.parametrize(("path", "value"), [(p, 32 * 10**9) for p in WIDTHS] + [(p, 100_000) for p in COUNTS])
def test_absurd_sizes_are_refused(path: str, value: int) -> None:
    with pytest.raises(ConfigError):
        parse_config(changed(path, value))


def test_missing_parts_are_named(tmp_path: Path) -> None:
    data = tiny.config_data(tiny.M9)
    del data["model"]["params"]["timesteps"]
    with pytest.raises(ConfigError, match="timesteps is missing"):
        parse_config(data)
    for key in PARTS.values():
        data = tiny.config_data(tiny.M9)
        del data["model"]["params"][key]
        with pytest.raises(ConfigError, match=key):
            parse_config(data)
    nothings: list[object] = [None, 7, "model", [], {}, {"model": None}, {"model": {"params": None}}, {1: 2}]
    for nothing in nothings:
        with pytest.raises(ConfigError):
            parse_config(nothing)


BOMB = (
    "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nmodel: [*b, *b, *b, *b, *b, *b, *b]\n"
)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "alias"),
        ("model: !!python/object/apply:os.system ['touch {canary}']\n", "python/object"),
        ("model: !!python/name:os.system\n", "python/name"),
        ("model: !Secret 7\n", "Secret"),
        ("model: {a: [}\n", "YAML"),
        ("[" * 50, "YAML"),
        ("\t- model", "YAML"),
        ("", "model"),
        ("just text", "model"),
        ("0", "expected a mapping"),
        ("true", "expected a mapping"),
        ("2024-01-01", "expected a mapping"),
        ("- 1\n- 2\n", "mapping"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(text: str, word: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("{canary}", str(canary)))
    with pytest.raises(ConfigError, match=word) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert not canary.exists()


@pytest.mark.fault(38)
@pytest.mark.parametrize("opener", ["[", "{", "- "])
def test_deep_nesting_is_refused_at_once(opener: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(opener * 3000)
    start = time.process_time()
    with pytest.raises(ConfigError):
        load_config(path)
    assert time.process_time() - start < 1


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


@pytest.mark.fault(38)
def test_a_huge_file_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with path.open("wb") as file:
        file.truncate(3 << 20)
    with pytest.raises(ConfigError, match="bytes"):
        load_config(path)


def test_interpolations_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMESTEPS_OF_THE_TEST", "1000")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(changed("timesteps", "${oc.env:TIMESTEPS_OF_THE_TEST}")))
    with pytest.raises(ConfigError, match="timesteps"):
        load_config(path)


def test_heads_are_divided_as_released() -> None:
    assert [UNetConfig().heads(c) for c in (320, 640, 1280)] == [8, 8, 8]
    m18 = replace(UNetConfig(), num_heads=None, num_head_channels=64)
    assert [m18.heads(c) for c in (320, 640, 1280)] == [5, 10, 20]
    both = changed("unet_config.params.num_head_channels", 16)
    assert parse_config(both).unet.heads(64) == 4  # the channels per head win over num_heads
    unset = changed("unet_config.params.num_head_channels", -1)
    assert parse_config(unset).unet.heads(64) == 8


@pytest.mark.parametrize("field", ["linear_start", "linear_end"])
@pytest.mark.parametrize("value", [1.0, 5.0, 1e300])
def test_a_noise_schedule_that_cannot_be_is_refused(field: str, value: float) -> None:
    fields: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=field):
        LatentDiffusionConfig(**fields)
