"""The config that is printed says what holds, and the docs' configs are configs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from flagai_altdiff.errors import ConfigError
from flagai_altdiff.training.config import StageConfig, TrainConfig, example, parse_config
from flagai_altdiff.training.stages import TRAINABLE

DOCS = Path(__file__).parents[3] / "docs" / "training.md"
WITHOUT_DEFAULT = {
    "teacher": "clip",
    "student": "xlmr",
    "side": "64",
    "caption": "a robot",
    "prior": "kept",
    "prior_caption": "[a heart, a star]",
    "min_side": "64",
    "min_aesthetic": "5",
    "min_text": "3",
    "max_text": "300",
    "fetched": "shards",
    "steps": "20",
}


def test_the_example_is_the_defaults() -> None:
    assert parse_config(yaml.safe_load(example())) == TrainConfig(stages=(StageConfig(),))


def test_every_line_of_the_example_holds_without_its_hash() -> None:
    lines, named = [], set[str]()
    for line in example().splitlines()[1:]:
        if found := re.fullmatch(r"( *)# (\w+):( \S+)?  # .+", line):
            indent, name, value = found.groups()
            named.add(name)
            line = f"{indent}{name}: {value or WITHOUT_DEFAULT[name]}"
        lines.append(line)
    read = parse_config(yaml.safe_load("\n".join(lines)))
    (stage,) = read.stages
    assert named >= WITHOUT_DEFAULT.keys()
    assert stage.settings(512).row == StageConfig().settings(512).row, "what stands there is what holds"
    assert (read.sheets.steps, read.data.prior_caption, read.data.fetched) == (
        20,
        ("a heart", "a star"),
        Path("shards"),
    )


def test_numbers_as_people_write_them() -> None:
    """YAML takes 1e-4 for a text."""
    (stage,) = parse_config(yaml.safe_load("stages: [{stage: lora, learning_rate: 1e-4, ema_decay: .99}]")).stages
    assert (stage.learning_rate, stage.ema_decay) == (1e-4, 0.99)


@pytest.mark.parametrize("stage", ["dreambooth", "quality", "lora"])
def test_with_a_rank_the_lora_is_all_that_learns(stage: str) -> None:
    assert StageConfig(stage=stage, rank=8).settings(512).pattern == TRAINABLE["lora"]
    with pytest.raises(ConfigError, match="nothing but the LoRA learns"):
        StageConfig(stage=stage, rank=8, trainable="unet").settings(512)


def test_the_docs_have_configs() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    whole = [block for block in blocks if "stages:" in block]
    assert len(whole) == 3
    for block in whole:
        parse_config(yaml.safe_load(block))


@pytest.mark.parametrize("wrong", ["{loss: mae}", "{decay: step}", "{stage: paint}", "{batchsize: 3}", "{steps: 0}"])
def test_what_cannot_be_is_named(wrong: str) -> None:
    name = wrong.strip("{}").split(":")[0]
    with pytest.raises(ConfigError, match=name):
        parse_config(yaml.safe_load(f"stages: [{wrong}]"))
