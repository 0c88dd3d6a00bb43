"""What is known by name: models in any case, tasks, and answers to names that do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagai_altdiff.errors import FlagAIAltDiffError, RegistryError, UnknownModelError, UnknownTaskError
from flagai_altdiff.registry import MODELS, TASKS, as_task, embedded_dir, find_model, get_model_spec, locate

RELEASED = ("AltDiffusion", "AltDiffusion-m9", "AltDiffusion-m18")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("spelling", [str, str.lower, str.upper, str.swapcase])
def test_a_model_is_found_in_any_case(name: str, spelling: type) -> None:
    assert get_model_spec(spelling(name)) is MODELS[name]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("AltDifusion-m18", "AltDiffusion-m18"),
        ("altdiffusion_m9", "AltDiffusion-m9"),
        ("AltDiffusion-min", "AltDiffusion-mini"),
    ],
)
def test_an_unknown_model_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    assert find_model(name) is None
    with pytest.raises(UnknownModelError, match=f"Did you mean '{nearest}'") as caught:
        get_model_spec(name)
    assert all(known in str(caught.value) for known in MODELS)
    assert isinstance(caught.value, (FlagAIAltDiffError, LookupError))


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(UnknownModelError) as caught:
        get_model_spec("gpt-2")
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize("task", ["title-generation", "lm", "text2image", "", None])
def test_tasks_of_flagai_that_are_not_here(task: str) -> None:
    with pytest.raises(UnknownTaskError, match="text2img") as caught:
        as_task(task)
    assert isinstance(caught.value, RegistryError)


def test_every_spec_is_whole() -> None:
    for name, spec in MODELS.items():
        assert spec.name == name
        assert spec.task in TASKS
        assert spec.languages and spec.licence and spec.size_bytes > 0
        assert {"config.yaml", "config.json"} & {file.name for file in spec.files}
        for file in spec.files:
            assert file.sha256 is None or len(file.sha256) == 64
        assert spec.guidance_scale > 0 and spec.height % 64 == 0 and spec.width % 64 == 0


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_the_originals_defaults(name: str) -> None:
    spec = MODELS[name]
    assert (spec.height, spec.width, spec.steps, spec.guidance_scale) == (512, 512, 50, 7.5)
    assert spec.needs_safety_checker
    assert not spec.embedded


def test_the_embedded_model_needs_no_download() -> None:
    spec = MODELS["AltDiffusion-mini"]
    assert spec.embedded
    assert not spec.needs_safety_checker
    assert embedded_dir().name == "checkpoints"


def test_languages_of_the_released_models() -> None:
    assert len(MODELS["AltDiffusion-m9"].languages) == 9
    assert len(set(MODELS["AltDiffusion-m18"].languages)) == 18
    assert set(MODELS["AltDiffusion-m9"].languages) < set(MODELS["AltDiffusion-m18"].languages)


LEFT_BEHIND: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "a lock": (".altdiff.lock",),
    "hidden files": (".DS_Store", "._model.safetensors", "._config.yaml"),
    "hidden folders": (".cache/model.safetensors", ".git/config"),
    "half a download": ("config.yaml", "sentencepiece.bpe.model", "model.safetensors.partial"),
    "results": ("samples/00000.png",),
}


@pytest.mark.parametrize("left", LEFT_BEHIND)
@pytest.mark.parametrize("written", [str, Path])
def test_a_folder_without_weights_does_not_hide_the_embedded_model(left: str, written: type, tmp_path: Path) -> None:
    for name in LEFT_BEHIND[left]:
        (tmp_path / "altdiffusion-MINI" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "altdiffusion-MINI" / name).write_bytes(b"x")
    (tmp_path / "altdiffusion-MINI").mkdir(exist_ok=True)
    spec, path = locate("AltDiffusion-mini", written(tmp_path))
    assert (spec, path) == (MODELS["AltDiffusion-mini"], embedded_dir() / "AltDiffusion-mini")


@pytest.mark.parametrize(
    "name", ["model.ckpt", "own.safetensors", "unet/diffusion_pytorch_model.bin", "snapshots/a/model.ckpt"]
)
def test_a_folder_with_weights_is_the_users_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "altdiffusion-mini" / name).parent.mkdir(parents=True)
    (tmp_path / "altdiffusion-mini" / name).write_bytes(b"x")
    assert locate("AltDiffusion-mini", tmp_path)[1] == tmp_path / "altdiffusion-mini"


def test_of_two_spellings_the_folder_with_weights_is_taken(tmp_path: Path) -> None:
    for folder in ("ALTDIFFUSION-M9", "altdiffusion-m9"):
        (tmp_path / folder).mkdir()
    assert locate("AltDiffusion-m9", tmp_path)[1] == tmp_path / "ALTDIFFUSION-M9"
    (tmp_path / "altdiffusion-m9" / "model.ckpt").write_bytes(b"x")
    assert locate("AltDiffusion-m9", tmp_path)[1] == tmp_path / "altdiffusion-m9"
    assert locate("AltDiffusion-m18", str(tmp_path))[1] == tmp_path / "AltDiffusion-m18"
