"""Any layout to any other, and back to the same picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from flagai_altdiff.cli import main
from flagai_altdiff.convert import TARGET_LAYOUTS, convert
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import load_path
from flagai_altdiff.pipeline import generate
from flagai_altdiff.request import GenerationRequest


def picture(path: Path) -> np.ndarray:
    request = GenerationRequest(prompts=("a cat",), height=64, width=64, steps=2, seed=7)
    return np.asarray(generate(load_path(path, safety_checker=False), request).images[0]).astype(int)


def target(folder: Path, layout: str) -> Path:
    return folder / ("model.safetensors" if layout == "single" else layout)


def test_a_round_trip_through_every_layout_keeps_every_weight(variant_folder: Path, tmp_path: Path) -> None:
    chain = [variant_folder, *(target(tmp_path / str(i), to) for i, to in enumerate((*TARGET_LAYOUTS, "flagai")))]
    for (source, goal), layout in zip(pairwise(chain), (*TARGET_LAYOUTS, "flagai"), strict=True):
        convert(source, goal, layout)
    first, last = (load_path(p, safety_checker=False) for p in (chain[0], chain[-1]))
    assert first.config == last.config
    for (key, a), (_, b) in zip(first.state_dict().items(), last.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert np.array_equal(picture(chain[0]), picture(chain[-1]))


@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
def test_half_precision_halves_the_files_and_keeps_the_picture(m18_folder: Path, tmp_path: Path, layout: str) -> None:
    whole, half = target(tmp_path / "whole", layout), target(tmp_path / "half", layout)
    convert(m18_folder, whole, layout)
    convert(m18_folder, half, layout, half=True)
    sizes = [sum(p.stat().st_size for p in root.parent.rglob("*.safetensors")) for root in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert np.abs(picture(whole) - picture(half)).mean() < 3


def test_nothing_is_overwritten_or_half_written(m9_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(m9_folder, tmp_path / "there", "flagai")
    with pytest.raises(CheckpointError, match=r"\.safetensors"):
        convert(m9_folder, tmp_path / "model.ckpt", "single")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(tmp_path / "nothing", tmp_path / "new", "flagai")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_files_have_the_usual_permissions(m9_folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for layout in TARGET_LAYOUTS:
        convert(m9_folder, target(tmp_path / f"to-{layout}", layout), layout)
    modes = {p.stat().st_mode for p in tmp_path.rglob("*") if p.is_file()}
    assert modes == {plain.stat().st_mode}


def test_the_command(m9_folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(m9_folder), str(tmp_path / "d"), "--to", "diffusers"]) == 0
    assert (tmp_path / "d" / "model_index.json").is_file()
    assert main(["convert", str(m9_folder), str(tmp_path / "d"), "--to", "diffusers"]) == 1


@pytest.mark.fault(146)
@pytest.mark.parametrize("content", ['{"foo": 9999}', "junk"])
def test_another_tokenizers_tokens_beside_a_single_file_are_refused(
    content: str, m9_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(CheckpointError):
        convert(m9_folder, tmp_path / "x.safetensors", "single")
    assert [path.name for path in tmp_path.iterdir()] == ["added_tokens.json"]


@pytest.mark.fault(146)
def test_what_a_killed_conversion_reserved_gives_way(m9_folder: Path, tmp_path: Path) -> None:
    (
        tmp_path / "new"
    ).mkdir()  # an empty folder of the user's stays, but this one was reserved by a process that is gone
    (tmp_path / ".new.0123456789abcdef.tmp").mkdir()
    convert(m9_folder, tmp_path / "new", "flagai")
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and (tmp_path / "new" / "config.yaml").is_file()
