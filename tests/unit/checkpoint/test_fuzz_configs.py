"""Configs with fields that they should not have: each is read or refused, at a cost in proportion.

``ALTDIFF_FUZZ_EXAMPLES=20000`` makes a long run of it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagai_altdiff.checkpoint.diffusers_folder import read_config
from flagai_altdiff.checkpoint.ldm_yaml import dump_config, load_config
from flagai_altdiff.config import LatentDiffusionConfig
from flagai_altdiff.errors import FlagAIAltDiffError
from flagai_altdiff.models import build_model
from flagai_altdiff.safety import load_safety_checker
from tests import tiny
from tests.cost import in_proportion
from tests.unit.checkpoint.test_diffusers_folder import RELEASED_M9

EXAMPLES = int(os.environ.get("ALTDIFF_FUZZ_EXAMPLES", "60"))

SIZES = st.one_of(
    st.integers(-2, 130),
    st.sampled_from(
        [256, 512, 4096, 65_536, 1_000_000, 10**6 + 1, 2**31, 2**62, 2**64, 10**19, 10**39, 10**41, 10**400]
    ),
)
NUMBERS = st.one_of(SIZES, st.floats(), st.sampled_from([1e-300, 1e300, 5e-324]))
TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "x" * 3000, "\x1b[31m", "${oc.env:HOME}", "<<", "null", "1e400", "a.b" * 300, "_target_", "\ud800"]
    ),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(TEXTS, inner, max_size=3),
        st.builds(lambda value, times: [value] * times, NUMBERS, st.sampled_from([8, 16, 17, 500])),
        st.builds(
            lambda value, depth: functools.reduce(lambda v, _: [v], range(depth), value), inner, st.integers(9, 99)
        ),
    ),
    max_leaves=6,
)


def places(data: object) -> list[tuple[Any, Any]]:
    """Every (container, key) in nested data."""
    pairs = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    return [place for key, value in pairs for place in ((data, key), *places(value))]


def changed(draw: st.DataObject, original: dict[str, Any]) -> dict[str, Any]:
    """A config with some of its values exchanged, left out or added."""
    data = copy.deepcopy(original)
    for _ in range(draw.draw(st.integers(1, 4))):
        found = places(data)
        if not found:
            break
        container, key = draw.draw(st.sampled_from(found))
        kind = draw.draw(st.sampled_from(["size", "value", "remove", "add", "repeat"]))
        if kind == "remove":
            del container[key]
        elif kind == "add" and isinstance(container, dict):
            container[draw.draw(TEXTS)] = draw.draw(VALUES)
        elif kind == "repeat" and isinstance(container[key], list):
            container[key] = container[key] * draw.draw(st.integers(0, 20))
        else:
            container[key] = draw.draw(SIZES if kind == "size" else VALUES)
    return data


def twice(draw: st.DataObject, text: str) -> str:
    """JSON text, perhaps with a part of it repeated: keys that stand twice."""
    if draw.draw(st.booleans()):
        return text
    start = draw.draw(st.integers(0, len(text)))
    return text[:start] + text[start : start + draw.draw(st.integers(1, 60))] + text[start:]


def check(read: Callable[[], object], where: Path, size: int) -> None:
    """Read a config; what it describes must be built at once."""
    message, config = "", None
    with in_proportion(size):
        try:
            config = read()
        except FlagAIAltDiffError as error:
            message = str(error)
        if isinstance(config, LatentDiffusionConfig):
            with torch.device("meta"):
                build_model(config)
    assert not message or (message.startswith(str(where)) and len(message) < 5000)
    assert all(char.isprintable() or char == "\n" for char in message)


def run(survives: Callable[..., None]) -> None:
    settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))(
        given(st.data())(survives)
    )()


@pytest.mark.fault(148)
@pytest.mark.parametrize("form", ["JSON", "YAML"])
def test_any_config_yaml_is_read_or_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    build_model(tiny.tiny_config(tiny.M9))  # what is loaded once is not what a file costs
    originals = [tiny.config_data(tiny.M9), yaml.safe_load(dump_config(tiny.tiny_config(tiny.M18)))]

    def survives(draw: st.DataObject) -> None:
        data = changed(draw, draw.draw(st.sampled_from(originals)))
        text = json.dumps(data) if form == "JSON" else yaml.safe_dump(data)
        path.write_text(twice(draw, text), encoding="utf-8", errors="replace")
        check(lambda: load_config(path), path, path.stat().st_size)

    run(survives)


@pytest.mark.fault(148)
@pytest.mark.parametrize("name", RELEASED_M9)
def test_any_diffusers_config_is_read_or_refused(name: str, tmp_path: Path) -> None:
    for file, fields in RELEASED_M9.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(fields))
    build_model(tiny.tiny_config(tiny.M9))

    def survives(draw: st.DataObject) -> None:
        text = twice(draw, json.dumps(changed(draw, RELEASED_M9[name])))
        (tmp_path / name).write_text(text)
        check(lambda: read_config(tmp_path), tmp_path, len(text))

    run(survives)


@pytest.mark.fault(148)
def test_any_safety_checker_config_is_read_or_refused(tmp_path: Path) -> None:
    folder = tiny.write_safety_checker(tmp_path / "checker", 2.0, safetensors=True)
    original = json.loads((folder / "config.json").read_text())
    load_safety_checker(folder)

    def survives(draw: st.DataObject) -> None:
        text = twice(draw, json.dumps(changed(draw, original)))
        (folder / "config.json").write_text(text)
        check(lambda: load_safety_checker(folder), folder, len(text))

    run(survives)
