"""Configs as nothing but data: each key once, numbers that are some, ordinary files, at a cost in proportion."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flagai_altdiff.checkpoint.diffusers_folder import read_config as read_diffusers
from flagai_altdiff.checkpoint.json_config import load_json
from flagai_altdiff.checkpoint.ldm_yaml import dump_config, load_config
from flagai_altdiff.checkpoint.plain_yaml import parse_yaml
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import CheckpointError, ConfigError, FlagAIAltDiffError
from flagai_altdiff.loading import load_path
from flagai_altdiff.models import build_model
from flagai_altdiff.plain_data import parse_json
from flagai_altdiff.safety import load_safety_checker
from flagai_altdiff.tokenizer import load_tokenizer
from tests import tiny
from tests.cost import in_proportion
from tests.unit.checkpoint.test_diffusers_folder import RELEASED_M9

CONFIG = dump_config(tiny.tiny_config(tiny.M9))


def write_released(folder: Path) -> Path:
    """A diffusers folder's configs."""
    for name, fields in RELEASED_M9.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(fields))
    return folder


def refused_or_read(read: Callable[[Path], object], path: Path) -> str:
    """What was wrong with a file, if anything."""
    message = ""
    try:
        read(path)
    except FlagAIAltDiffError as error:
        message = str(error)
    assert not message or message.startswith(str(path))
    return message


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for a pipe that nobody writes to."""

    def stop(*args: object) -> None:
        raise AssertionError(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", RELEASED_M9)
def test_a_key_twice_in_a_json_is_an_error(name: str, tmp_path: Path) -> None:
    path = write_released(tmp_path) / name
    text = path.read_text()
    key = json.loads(text).popitem()[0]
    path.write_text(f'{{"{key}": 7, {text[1:]}')
    with pytest.raises(ConfigError, match=rf"{path.name}.*'{key}' stands twice"):
        read_diffusers(tmp_path)
    path.write_text(text[:-1] + ', "z": [{"\\u001b[31m": 1, "\\u001b[31m": 1}]}')
    with pytest.raises(ConfigError, match="stands twice") as caught:
        read_diffusers(tmp_path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.fault(147)
@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("linear_start:", "timesteps: 500\n    linear_start:", "timesteps"),
        ("model_channels:", "model_channels: 64, model_channels:", "model_channels"),
        ("model:", "model: {}\nmodel:", "model"),
        ("model:", '"model": {}\n? model\n: 1\nmodel:', "model"),
    ],
)
def test_a_key_twice_in_a_yaml_is_an_error(old: str, new: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace(old, new, 1) if old != "model_channels:" else json_like(new))
    with pytest.raises(ConfigError, match=rf"config\.yaml.*'{key}' stands twice"):
        load_config(path)


def json_like(insert: str) -> str:
    text = json.dumps(tiny.config_data(tiny.M9))
    return text.replace('"model_channels":', insert.replace("model_channels", '"model_channels"'), 1)


@pytest.mark.fault(147)
def test_configs_that_describe_one_file_must_agree(m9_folder: Path, tmp_path: Path) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    text = (folder / "config.yaml").read_text()
    (folder / "model.yaml").write_text(text.replace("val/loss", "another"))
    assert load_path(folder).config == load_path(folder / "model.ckpt").config
    (folder / "model.yaml").write_text(text.replace('"linear_end": 0.012', '"linear_end": 0.02'))
    for path in (folder, folder / "model.ckpt"):
        with pytest.raises(ConfigError, match="describe different models"):
            load_path(path)
    (folder / "model.yaml").write_text("something: else")  # no config of ours
    assert load_path(folder).config == load_path(m9_folder).config
    (folder / "model.ckpt").rename(folder / "mine.ckpt")
    (folder / "mine.yaml").write_text(text.replace('"linear_end": 0.012', '"linear_end": 0.02'))
    assert load_path(folder / "mine.ckpt").config.linear_end == 0.02  # config.yaml is of another
    (folder / "mine.yml").write_text(text)
    with pytest.raises(ConfigError, match="different models"):
        load_path(folder / "mine.ckpt")


ODD_NUMBERS = [
    "9" * 6000,
    "-" + "9" * 6000,
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "-Infinity",
    "0." + "1" * 6000,
]


@pytest.mark.fault(148)
@pytest.mark.parametrize("number", ODD_NUMBERS, ids=lambda number: number[:9])
@pytest.mark.parametrize("field", ["scaling_factor", "sample_size", "unknown", "_unknown", "block_out_channels"])
def test_numbers_that_are_none_are_refused_in_json(number: str, field: str, tmp_path: Path) -> None:
    path = write_released(tmp_path) / "vae" / "config.json"
    wrapped = f"[{number}]" if field == "block_out_channels" else number
    fields = {key: value for key, value in RELEASED_M9["vae/config.json"].items() if key != field}
    path.write_text(json.dumps(fields)[:-1] + f', "{field}": {wrapped}}}')
    if number.startswith("0.") and field in ("_unknown", "scaling_factor"):
        read_diffusers(tmp_path)  # as good a number as any
        return
    with pytest.raises(ConfigError, match=field) as caught:
        read_diffusers(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.fault(148)
@pytest.mark.parametrize(
    "number", [*ODD_NUMBERS, ".inf", ".nan", "1:" * 3000 + "1", "0x" + "f" * 6000, "1_" * 3000 + "1"]
)
@pytest.mark.parametrize("field", ["timesteps", "scale_factor", "monitor"])
def test_numbers_that_are_none_are_refused_in_yaml(number: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    data = tiny.config_data(tiny.M9)
    data["model"]["params"][field] = "HERE"
    path.write_text(json.dumps(data).replace('"HERE"', number))
    with in_proportion(path.stat().st_size):
        message = refused_or_read(load_config, path)
    if field != "monitor" and not (
        field == "scale_factor" and number.startswith("0.")
    ):  # a word, or a number after all
        assert message.startswith(f"{path}") and field in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-04", 1e-4),
        ("-.5", -0.5),
        ("5", 5),
        ("1_000", 1000),
        ("+3", 3),
        ("true", True),
        ("off", False),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("${a}", "${a}"),
        ("'5'", "5"),
        ("=", "="),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = parse_yaml(f"key: {text}".encode())["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.fault(38)
@pytest.mark.parametrize(
    "text",
    [
        "<<: {a: 1}",
        "a: &x 1\nb: *x",
        "a: !!binary aGk=",
        "a: !!int 1:1:1",
        "!!set {a}",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "a: !<x> 1",
        '"\\UFFFFFFFF"',
        '"\\UD800DC00"',
        "%YAML 99999999999999999999.1\n--- a",
        "--- a\n--- b",
        "a: \x00",
    ],
)
def test_what_is_no_plain_data_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(path)


PARTS = (
    "a,", "[a,", "{a,", "a: ", "- ", "? ", "'a' ", "--- ", "%a b\n", "# \n", "&a b\n", "!a ", "- a\n", "a: b\n", "'",
    "|\n ", ">\n a\n\n", "1_", "1:", "0.0", "...\n", "\n", "\t", "{? ", "[[],", "1e", "*a ", "${a", "? a\n: b\n",
    "${${", "<<: ", "\\x41",
)  # fmt: skip


@pytest.mark.fault(148)
@pytest.mark.parametrize("start", ["", "[", "{", "model: ", '"', "a: |\n "])
def test_a_hostile_yaml_is_refused_at_a_cost_in_proportion(start: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for part in PARTS:
        path.write_bytes((start + part * (1 << 16)).encode()[: 64 << 10])
        with in_proportion(path.stat().st_size), pytest.raises(ConfigError, match=r"config\.yaml"):
            load_config(path)


@pytest.mark.fault(148)
@pytest.mark.parametrize(
    "make",
    [
        lambda n: "[" * n,
        lambda n: '{"a":' * (n // 5),
        lambda n: "[" + "[]," * (n // 3 - 1) + "[]]",
        lambda n: '{"a":[' + "{}," * (n // 3 - 4) + "{}]}",
        lambda n: "{" + ",".join(f'"{i:x}":0' for i in range(n // 10)) + "}",
        lambda n: "{" + '"a":0,' * (n // 6 - 1) + '"a":0}',
        lambda n: '{"a":' + "9" * (n - 6) + "}",
        lambda n: '{"a":0.' + "9" * (n - 8) + "}",
        lambda n: '{"a":"' + "\\u00e4" * (n // 6 - 2) + '"}',
        lambda n: '{"' + "x" * (n - 6) + '":1}',
        lambda n: '{"_class_name":' + "[" * 300 + "]" * 300 + "}",
        lambda n: '{"architectures":[' + "[" * 300 + "]" * 300 + "]}",
    ],
)
def test_a_hostile_json_is_refused_at_a_cost_in_proportion(make: Callable[[int], str], tmp_path: Path) -> None:
    folder = write_released(tmp_path)
    text = make(1_000_000)
    for name in RELEASED_M9:
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with in_proportion(len(text)):
            refused_or_read(read_diffusers, folder)
        (folder / name).write_text(before)


def test_json_is_read_as_it_was() -> None:
    value = {"a": [1, -2.5, 1e-5, True, None, "ä"], "b": {"c": {}}}
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value


@pytest.mark.fault(148)
@pytest.mark.parametrize(
    ("part", "sizes"),
    [
        ("unet", {"channel_mult": (1,) * 8, "num_res_blocks": 10, "transformer_depth": 10}),
        ("unet", {"channel_mult": (1,) * 16}),
        ("unet", {"transformer_depth": 100}),
        ("unet", {"num_res_blocks": 100}),
        ("first_stage", {"ch_mult": (1,) * 8, "num_res_blocks": 30}),
        ("first_stage", {"ch_mult": (1,) * 9}),
        ("first_stage", {"ch_mult": ()}),
        ("unet", {"channel_mult": ()}),
    ],
)
def test_a_config_of_many_layers_is_refused(part: str, sizes: dict[str, object]) -> None:
    """A file of a kilobyte asked for 160,000 of them, each within its limits."""
    kind = {"unet": UNetConfig, "first_stage": AutoencoderConfig}[part]
    with in_proportion(1000), pytest.raises(ConfigError, match=r"layers|mult"):
        kind(**sizes)


@pytest.mark.fault(148)
def test_the_largest_model_that_a_config_may_ask_for_is_built_at_once() -> None:
    every = tuple(2**i for i in range(8))
    configs = [
        LatentDiffusionConfig(unet=UNetConfig(channel_mult=(1,) * 8, num_res_blocks=4, attention_resolutions=every)),
        LatentDiffusionConfig(unet=UNetConfig(channel_mult=(1,), num_res_blocks=1, transformer_depth=52)),
        LatentDiffusionConfig(unet=UNetConfig(channel_mult=(1,) * 4, transformer_depth=7, attention_resolutions=every)),
        LatentDiffusionConfig(first_stage=AutoencoderConfig(ch_mult=(1,) * 8, num_res_blocks=9)),
        LatentDiffusionConfig(cond_stage=TextEncoderConfig(num_hidden_layers=48)),
    ]
    for config in configs:
        with in_proportion(1_000_000):
            build_on_meta(config)


def build_on_meta(config: LatentDiffusionConfig) -> None:
    import torch

    with torch.device("meta"):
        build_model(config)


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.fault(150)
@pytest.mark.parametrize("special", [pipe, device])
def test_pipes_and_devices_are_no_configs(special: Callable[[Path], None], tmp_path: Path) -> None:
    special(tmp_path / "config.yaml")
    special(tmp_path / "config.json")
    with within(20):
        for read in (load_config, load_json):
            path = tmp_path / ("config.yaml" if read is load_config else "config.json")
            with pytest.raises(ConfigError, match=f"{path.name} cannot be read"):
                read(path)
        for name in RELEASED_M9:
            folder = write_released(tmp_path / name.replace("/", "-"))
            special(folder / name)
            with pytest.raises(ConfigError, match=Path(name).name):
                read_diffusers(folder)


@pytest.mark.fault(150)
@pytest.mark.parametrize("special", [pipe, device])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "model.yaml", "model.ckpt", "sentencepiece.bpe.model", "tokenizer.json", "added_tokens.json",
     "tokenizer_config.json"],
)  # fmt: skip
def test_a_model_with_a_pipe_or_device_loads_or_is_refused(
    special: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    folder = tiny.write_flagai_folder(tmp_path / "m", "m9")
    special(folder / name)
    with within(20):
        message = refused_or_read(load_path, folder)
        assert bool(message) == (name in ("model.ckpt", "sentencepiece.bpe.model"))
        for file in (load_tokenizer, load_safety_checker):
            (tmp_path / "s").mkdir(exist_ok=True)
            (tmp_path / "s" / "model.safetensors").write_bytes(b"x")
            special(tmp_path / "s" / "config.json")
            with pytest.raises(CheckpointError):
                file(tmp_path / "s" / "config.json" if file is load_tokenizer else tmp_path / "s")


@pytest.mark.fault(151)
def test_text_of_configs_is_shown_escaped_and_short(tmp_path: Path) -> None:
    hostile = "\x1b[31m" + "x" * 100_000
    variants = []
    for place in ("key", "unet_key", "target", "value"):
        data = tiny.config_data(tiny.M9)
        params = data["model"]["params"]
        if place == "key":
            params[hostile] = 1
        elif place == "unet_key":
            params["unet_config"]["params"][hostile] = 1
        elif place == "target":
            params["unet_config"]["target"] = hostile[:30_000]
        else:
            params["timesteps"] = hostile[:30_000]
        variants.append(data)
    for data in variants:
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(data).replace("x" * 60_000, "x" * 10))
        with pytest.raises(ConfigError, match=r"config\.yaml") as caught:
            load_config(path)
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 4000
    folder = write_released(tmp_path / "d")
    for name in RELEASED_M9:
        before = (folder / name).read_text()
        for fields in ({hostile: 1}, {"_class_name": hostile}, {"act_fn": hostile}, {"architectures": [hostile]}):
            (folder / name).write_text(json.dumps(json.loads(before) | fields))
            message = refused_or_read(read_diffusers, folder)
            assert "\x1b" not in message and len(message) < 1000
        (folder / name).write_text(before)
