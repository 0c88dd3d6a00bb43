"""What is written loads again; nothing of the user's is replaced; a failure or a killed process leaves nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flagai_altdiff.checkpoint import saving
from flagai_altdiff.checkpoint.saving import save_folder, save_single, write_safetensors
from flagai_altdiff.cli import main
from flagai_altdiff.convert import TARGET_LAYOUTS, convert
from flagai_altdiff.errors import CheckpointError, ConfigError
from flagai_altdiff.files import new_files, new_folder
from flagai_altdiff.loading import load_path
from flagai_altdiff.safety import load_safety_checker
from flagai_altdiff.tokenizer import Tokenizer, load_tokenizer
from tests import tiny

LARGE = "model.diffusion_model.input_blocks.0.0.weight"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def target_of(folder: Path, layout: str, name: str = "new") -> Path:
    return folder / (f"{name}.safetensors" if layout == "single" else name)


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
@pytest.mark.parametrize("value", [7e4, -65520.0, 1e-9])
def test_weights_that_half_precision_cannot_hold_are_named(value: float, layout: str, tmp_path: Path) -> None:
    state = dict(tiny.tiny_state("m9"))
    state[LARGE] = torch.full_like(state[LARGE], value)
    source = tiny.write_flagai_folder(tmp_path / "m", "m9", state)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"{LARGE}.*without half precision"):
        convert(source, target_of(tmp_path, layout), layout, half=True)
    assert main(["convert", str(source), str(target_of(tmp_path, layout)), "--to", layout, "--half"]) == 1
    assert sorted(tmp_path.rglob("*")) == before
    convert(source, target_of(tmp_path, layout), layout)


def test_the_largest_weight_of_half_precision_is_held(tmp_path: Path) -> None:
    state = dict(tiny.tiny_state("m9"))
    state[LARGE] = torch.full_like(state[LARGE], 65519.0)
    convert(tiny.write_flagai_folder(tmp_path / "m", "m9", state), tmp_path / "h", "flagai", half=True)
    assert load_file(tmp_path / "h" / "model.safetensors")[LARGE].isfinite().all()


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "file", "empty", "link", "loop", "pipe"])
def test_whatever_lies_at_the_target_stays(kind: str, layout: str, m9_folder: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path, layout)
    if kind == "folder":
        (target / "mine").mkdir(parents=True)
    elif kind == "empty":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(target if kind == "loop" else "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="exists already"):
        convert(m9_folder, target, layout)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path / "nowhere").exists()


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
def test_targets_that_cannot_be_are_refused_before_any_work(layout: str, m9_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    targets = [
        target_of(tmp_path / "file", layout),
        target_of(tmp_path / "file" / "below", layout),
        target_of(tmp_path, layout, "n" * 300),
        target_of(tmp_path / ("n" * 300), layout),
        target_of(tmp_path, layout, "ä" * 140),
        target_of(tmp_path, layout, "a\0b"),
        target_of(tmp_path, layout, "\ud83d"),
    ]
    for target in targets:
        with pytest.raises(CheckpointError, match="cannot be written"):
            convert(m9_folder, target, layout)
    assert tree(tmp_path) == {"file": b"mine"}
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
@pytest.mark.parametrize("name", ["a b", "ü.v2", "model.ckpt", "x" * 200, "-h", "a\nb", "config"])
def test_odd_names_are_written_and_load(name: str, layout: str, m9_folder: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path / "sub" / "folder", layout, name)
    convert(m9_folder, target, layout)
    assert load_path(target, safety_checker=False).config == load_path(m9_folder, safety_checker=False).config


@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
def test_a_target_inside_the_source_leaves_the_source_as_it_was(layout: str, tmp_path: Path) -> None:
    source = tiny.write_flagai_folder(tmp_path / "m", "m9")
    with pytest.raises(CheckpointError, match=r"exists already|safetensors"):
        convert(source, source, layout)
    before = tree(source)
    target = target_of(source, layout, "unet")
    convert(source, target, layout)
    assert before.items() <= tree(source).items()
    for path in (source, target):
        assert load_path(path, safety_checker=False).config == load_path(source / "model.ckpt").config


def test_a_checkpoint_is_converted_in_place(tmp_path: Path) -> None:
    source = tiny.write_flagai_folder(tmp_path / "m", "m9")
    convert(source, source / "model.safetensors", "single")
    (source / "model.ckpt").unlink()
    assert load_path(source, safety_checker=False).config == load_path(source / "model.safetensors").config


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", ["flagai", "diffusers"])
def test_a_name_of_another_model_is_refused(layout: str, m9_folder: Path, tmp_path: Path) -> None:
    """It would be written, and never load: ``load_model`` refuses m9's weights under m18's name."""
    with pytest.raises(CheckpointError, match="called AltDiffusion-m18, but holds"):
        convert(m9_folder, tmp_path / "AltDiffusion-m18", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
def test_tensors_that_share_memory_are_written(layout: str, tmp_path: Path) -> None:
    """As trainers leave them: one flat buffer with views, or two names for one tensor."""
    state = dict(tiny.tiny_state("m9"))
    flat = torch.randn(4096 * 4)
    twins = [key for key, value in state.items() if value.numel() <= 4096 and "." in key][:40]
    for i, key in enumerate(twins):
        shape = state[key].shape
        state[key] = flat[i : i + shape.numel()].reshape(shape)
    source = tiny.write_flagai_folder(tmp_path / "m", "m9", state)
    convert(source, target_of(tmp_path, layout), layout)
    written = load_path(target_of(tmp_path, layout), safety_checker=False).state_dict()
    assert all(torch.equal(written[key], state[key]) for key in twins)


def test_one_copy_of_shared_memory_is_enough(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"a": base, "b": base[2:5], "c": base.reshape(3, 4).T, "d": base[:0], "e": base[11:], "f": torch.ones(3)}
    write_safetensors(tmp_path / "m.safetensors", state)
    read = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(read[key], value) for key, value in state.items())


@pytest.mark.fault(146)
def test_what_would_load_as_another_model_is_not_written(
    m9_folder: Path, m18_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read back before they have their names."""
    save, dump = save_file, yaml.safe_dump

    def damaged(tensors: dict[str, torch.Tensor], file: Path, **kwargs: Any) -> None:
        save({key: value[:1] if key == LARGE else value for key, value in tensors.items()}, file, **kwargs)

    def changed(data: object, **kwargs: Any) -> str:
        return str(dump(data, **kwargs)).replace("timesteps: 1000", "timesteps: 999")

    def lost(source: Path, target: Path) -> None:
        Path(target).touch()

    places: list[tuple[Any, str]] = [(saving, "save_file"), (yaml, "safe_dump"), (shutil, "copyfile")]
    for (module, name), wrong in zip(places, (damaged, changed, lost), strict=True):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            for layout in ("flagai", "single"):
                with pytest.raises(CheckpointError, match="is not written"):
                    convert(m9_folder, target_of(tmp_path, layout), layout)
                assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(146)
def test_what_a_layout_cannot_express_is_not_written(tmp_path: Path) -> None:
    source = tiny.write_flagai_folder(tmp_path / "m", "m9")
    tiny.write_config(source / "config.yaml", tiny.M9, beta_schedule="sqrt")
    with pytest.raises(ConfigError, match="beta_schedule"):
        convert(source, tmp_path / "d", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.fault(147)
@pytest.mark.parametrize("there", ["sentencepiece.bpe.model", "tokenizer.json", "tokenizer/sentencepiece.bpe.model"])
def test_another_tokenizer_at_the_target_is_refused(there: str, m9_folder: Path, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "other", seed=1)
    other = load_path_tokenizer(tmp_path / "other")
    (tmp_path / "t" / there).parent.mkdir(parents=True)
    if there == "tokenizer.json":
        other.to_transformers().save_pretrained(tmp_path / "t")
    else:
        shutil.copy(tmp_path / "other" / "sentencepiece.bpe.model", tmp_path / "t" / there)
    before = tree(tmp_path / "t")
    with pytest.raises(CheckpointError, match="another tokenizer than the model's"):
        convert(m9_folder, tmp_path / "t" / "new.safetensors", "single")
    assert tree(tmp_path / "t") == before


@pytest.mark.parametrize("there", ["sentencepiece.bpe.model", "tokenizer.json"])
def test_the_same_tokenizer_at_the_target_serves(there: str, m9_folder: Path, tmp_path: Path) -> None:
    if there == "tokenizer.json":
        load_path_tokenizer(m9_folder).to_transformers().save_pretrained(tmp_path)
    else:
        shutil.copy(m9_folder / there, tmp_path)
    before = tree(tmp_path)
    for name in ("one", "two"):
        convert(m9_folder, tmp_path / f"{name}.safetensors", "single")
        load_path(tmp_path / f"{name}.safetensors", safety_checker=False)
    assert tree(tmp_path).keys() == before.keys() | {"one.safetensors", "one.yaml", "two.safetensors", "two.yaml"}
    assert before.items() <= tree(tmp_path).items()


def load_path_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder / "sentencepiece.bpe.model")


@pytest.mark.fault(146)
@pytest.mark.parametrize("name", ["new.yaml", "sentencepiece.bpe.model", "new.yml"])
def test_what_lies_beside_a_single_file_stays(name: str, m9_folder: Path, tmp_path: Path) -> None:
    text = (m9_folder / "config.yaml").read_text().replace("0.012", "0.02")
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError):
        convert(m9_folder, tmp_path / "new.safetensors", "single")
    assert tree(tmp_path) == {name: text.encode()}


@pytest.mark.fault(146)
def test_a_config_of_another_model_beside_an_own_name_is_of_no_concern(m9_folder: Path, tmp_path: Path) -> None:
    tiny.write_config(tmp_path / "config.yaml", tiny.M9, linear_end=0.02)
    with pytest.raises(CheckpointError, match="different models"):
        convert(m9_folder, tmp_path / "model.safetensors", "single")
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    convert(m9_folder, tmp_path / "new.safetensors", "single")
    assert load_path(tmp_path / "new.safetensors", safety_checker=False).config.linear_end == 0.012


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", ["flagai", "single"])
@pytest.mark.parametrize("kind", ["empty folder", "folder", "file", "link"])
def test_a_target_that_appears_meanwhile_stays(kind: str, layout: str, m9_folder: Path, tmp_path: Path) -> None:
    target = target_of(tmp_path, layout)

    def appear(written: Path) -> None:
        if "folder" in kind:
            target.mkdir()
        if kind == "folder":
            (target / "mine").touch()
        elif kind == "file":
            target.write_text("mine")
        elif kind == "link":
            target.symlink_to("nowhere")

    save: Callable[..., None] = save_single if layout == "single" else save_folder
    with pytest.raises(CheckpointError, match="exists already"):
        save(target, tiny.tiny_config(tiny.M9), tiny.tiny_state("m9"), check=appear)
    assert sorted(p.name for p in tmp_path.iterdir()) == [target.name]
    assert target.is_symlink() == (kind == "link") and target.is_file() == (kind == "file")
    assert (
        target.is_file() or target.is_symlink() or [p.name for p in target.iterdir()] == ["mine"] * (kind == "folder")
    )


@pytest.mark.fault(146)
def test_a_file_that_appears_beside_a_single_one_undoes_all(tmp_path: Path) -> None:
    (tmp_path / "same").write_text("same")
    with pytest.raises(FileExistsError, match="c"), new_files(tmp_path / "z") as made:  # noqa: PT012
        for name in ("a", "b", "c", "same", "z"):
            (made / name).write_text(name if name == "same" else "new")
        (tmp_path / "c").write_text("mine")
    assert tree(tmp_path) == {"c": b"mine", "same": b"same"}


class Interrupting:
    """A function of the system that is interrupted before its n-th call."""

    def __init__(self, real: Callable[..., Any], count: int) -> None:
        self.real, self.left = real, count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return self.real(*args, **kwargs)


@pytest.mark.fault(146)
@pytest.mark.parametrize("new", [new_folder, new_files])
@pytest.mark.parametrize("function", ["link", "rename", "mkdir"])
def test_an_interruption_undoes_all(
    function: str, new: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(1, 6):
        target = tmp_path / str(count) / "deep" / "z"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, Interrupting(getattr(os, function), count))
            try:
                with new(target) as made:
                    for name in ("a", "b", "z"):
                        (made / name).write_text("new")
            except KeyboardInterrupt:
                assert list(tmp_path.iterdir()) == []
        shutil.rmtree(target.parent.parent, ignore_errors=True)


KILLED = """
import os, signal, sys
from flagai_altdiff.convert import convert
source, target, layout, function, count = sys.argv[1:]
real, left = getattr(os, function), int(count)
def kill(*args, **kwargs):
    global left
    left -= str(args[0]) == target or function == "link"
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(os, function, kill)
convert(source, target, layout)
"""


@pytest.mark.fault(153)
@pytest.mark.parametrize(
    ("layout", "function", "count"),
    [
        ("flagai", "mkdir", 1),
        ("diffusers", "mkdir", 1),
        ("diffusers", "link", 3),
        *(("single", "link", n) for n in (2, 3, 4)),
    ],
)
def test_a_killed_conversion_blocks_nothing_and_its_rest_is_removed(
    layout: str, function: str, count: int, m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    target = target_of(tmp_path, layout)
    arguments = [sys.executable, "-c", KILLED, str(m9_folder), str(target), layout, function, str(count)]
    done = subprocess.run(arguments, env=script_environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert any(p.name.startswith(".new") and p.name.endswith(".tmp") for p in tmp_path.iterdir())
    convert(m9_folder, target, layout)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    load_path(target, safety_checker=False)


@pytest.mark.fault(153)
def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom flagai_altdiff.files import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as made:\n print(made, flush=True)\n time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "new")], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        made = Path(other.stdout.readline().strip())
        for name in (".new.x.tmp", ".new.0123456789abcdef.tmp.mine", ".newer.0123456789abcdef.tmp"):
            (tmp_path / name).mkdir()  # not ours
        (tmp_path / ".new.0123456789abcdef.tmp").symlink_to(tmp_path / ".new.x.tmp")
        try:
            with new_folder(tmp_path / "new") as own:
                (own / "file").touch()
            assert made.is_dir() and len(list(tmp_path.iterdir())) == 6
        finally:
            other.kill()
    (tmp_path / "new" / "file").unlink()
    (tmp_path / "new").rmdir()
    with new_folder(tmp_path / "new"):
        pass
    assert not made.exists() and len(list(tmp_path.iterdir())) == 5


FULL = """
import resource, sys
from flagai_altdiff.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(["convert", *sys.argv[2:]]))
"""


@pytest.mark.fault(146)
@pytest.mark.parametrize("layout", TARGET_LAYOUTS)
@pytest.mark.parametrize("limit", [0, 100, 100_000])
def test_a_disk_that_refuses_is_named_and_nothing_is_left(
    limit: int, layout: str, m9_folder: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    target = target_of(tmp_path / "deep", layout)
    arguments = [sys.executable, "-c", FULL, str(limit), str(m9_folder), str(target), "--to", layout]
    done = subprocess.run(arguments, env=script_environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(146)
def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    state = {"a.b": torch.empty(1 << 50, dtype=torch.float32, device="meta")}
    with pytest.raises(CheckpointError, match=r"takes 4503599\.6 GB"):
        save_folder(tmp_path / "new", tiny.tiny_config(tiny.M9), state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault(112)
def test_a_safety_checker_is_saved_over_its_own_file(tmp_path: Path) -> None:
    folder = tiny.write_safety_checker(tmp_path / "c", 2.0)
    network = load_safety_checker(folder).network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    (folder / "pytorch_model.bin").write_bytes(b"")
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert load_safety_checker(folder).network.state_dict().keys() == before.keys()
