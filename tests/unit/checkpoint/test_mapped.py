"""A loaded model may be saved over the very files that it was loaded from, in every way, and goes on drawing."""

from __future__ import annotations

import errno
import logging
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flagai_altdiff.checkpoint import mapped
from flagai_altdiff.checkpoint.mapped import fetch, is_mapped, let_go
from flagai_altdiff.checkpoint.reading import read_tensors
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.loading import load_path
from tests import tiny

# What is mapped in a released model, whose files are large, is mapped here too.
PROGRAM = """
import copy, pickle, sys
from pathlib import Path
import safetensors.torch
import torch
from flagai_altdiff import AutoLoader, GenerationRequest, generate, load_model
from flagai_altdiff.checkpoint import mapped
from flagai_altdiff.checkpoint.mapped import is_mapped
mapped._WORTH_MAPPING_BYTES = 0
folder = Path(sys.argv[1])
file, kind = folder / sys.argv[2], "model"
request = GenerationRequest(prompts=("a cat",), height=64, width=64, steps=1, seed=7)
def draw(model):
    return generate(model, request).images[0].tobytes()
model = load_model(folder)
before = draw(model)
parameters = dict(model.named_parameters())
assert any(map(is_mapped, load_model(folder, mapped=True).parameters()))
{steps}
assert draw(model) == before
assert not any(map(is_mapped, model.parameters()))
if kind == "model":
    assert draw(load_model(folder)) == before
print("drawn")
"""

SAVING = {
    "torch.save": "torch.save(model.state_dict(), file)",
    "under state_dict": "torch.save({'state_dict': model.state_dict()}, file)",
    "the old format": "torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)",
    "twice": "torch.save(model.state_dict(), file); torch.save(model.state_dict(), file)",
    "from a part first": """
model.first_stage_model.state_dict()
file.write_bytes(b'')
torch.save(model.state_dict(), file)""",
    "part by part": """
parts = ((name, getattr(model, name)) for name in ('model', 'first_stage_model', 'cond_stage_model'))
torch.save({key: value for name, part in parts for key, value in part.state_dict(prefix=name + '.').items()}, file)""",
    "keep_vars": "torch.save(model.state_dict(keep_vars=True), file)",
    "load_state_dict": """
state = model.state_dict()
model.load_state_dict(state)
torch.save(state, file)""",
    "a deep copy": """
twin = copy.deepcopy(model)
torch.save(twin.state_dict(), file)
assert draw(twin) == before""",
    "a deep copy alone": """
twin = copy.deepcopy(model)
del model, parameters
torch.save(twin.state_dict(), file)
model, parameters = twin, dict(twin.named_parameters())""",
    "after a step": """
for tensor in (*model.parameters(), *model.buffers()):
    tensor.data.mul_(1)
torch.save(model.state_dict(), file)""",
    "a pickle": """
data = pickle.dumps(model.first_stage_model)
torch.save(model.state_dict(), file)
assert not any(map(is_mapped, pickle.loads(data).parameters()))""",
    "other weights in between": """
loader = AutoLoader('text2img', str(folder))
loader.load_pretrain_params(file)
torch.save(loader.get_model().state_dict(), file)""",
    "another model of the file": "torch.save(load_model(folder).state_dict(), file)",
    "before another is loaded": """
state, other = model.state_dict(), load_model(folder)
torch.save(state, file)
assert draw(other) == before""",
    "a file opened before": "with open(file, 'wb') as handle: torch.save(model.state_dict(), handle)",
    "parameters by name": "kind = 'part'; torch.save(parameters, file)",
    "their data": "kind = 'part'; torch.save({k: p.data for k, p in parameters.items()}, file)",
    "halves": "kind = 'part'; torch.save({k: p.half() for k, p in parameters.items()}, file)",
    "a module whole": "kind = 'part'; torch.save(model.model, file)",
    "the model whole": """
kind = 'part'
torch.save(model, file)
assert draw(torch.load(file, weights_only=False)) == before""",
    "emptied": "kind = 'part'; file.write_bytes(b'')",
}


def run(program: str, *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "drawn\n"), done.stderr[-2000:]


@pytest.mark.fault(112)
@pytest.mark.parametrize("way", SAVING)
def test_a_model_is_saved_over_its_own_file(way: str, m9_folder: Path, tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path / "m", "m9")
    run(PROGRAM.replace("{steps}", SAVING[way]), tmp_path / "m", "model.ckpt")


@pytest.mark.fault(112)
def test_a_model_is_saved_over_its_safetensors(tmp_path: Path) -> None:
    tiny.write_flagai_folder(tmp_path / "m", "m18")
    (tmp_path / "m" / "model.ckpt").unlink()
    save_file(tiny.tiny_state("m18"), tmp_path / "m" / "model.safetensors")
    step = "safetensors.torch.save_file(model.state_dict(), file)"
    run(PROGRAM.replace("{steps}", step), tmp_path / "m", "model.safetensors")


@pytest.mark.fault(112)
def test_a_part_is_saved_over_the_part_that_it_came_from(m9_folder: Path, tmp_path: Path) -> None:
    convert(m9_folder, tmp_path / "m", "diffusers")
    step = (
        "from flagai_altdiff.checkpoint.diffusers_keys import to_diffusers\n"
        "state = {'first_stage_model.' + k: v for k, v in model.first_stage_model.state_dict().items()}\n"
        "safetensors.torch.save_file(to_diffusers(state, model.config)['vae'], file)"
    )
    run(PROGRAM.replace("{steps}", step), tmp_path / "m", "vae/diffusion_pytorch_model.safetensors")


@pytest.fixture
def everything_is_worth_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_WORTH_MAPPING_BYTES", 0)


def written(path: Path) -> dict[str, torch.Tensor]:
    state = {
        "a": torch.arange(6.0).reshape(2, 3).T,
        "b": torch.ones(5, dtype=torch.bfloat16),
        "empty": torch.empty(0, 2),
    }
    torch.save({**state, "part of a": state["a"][1:]}, path)
    return {**state, "part of a": state["a"][1:]}


def assert_read(path: Path, expected: dict[str, torch.Tensor]) -> None:
    read = read_tensors(path)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in expected.items())


def test_mapped_and_read_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = written(tmp_path / "m")
    for limit in (0, 1 << 20):
        monkeypatch.setattr(mapped, "_WORTH_MAPPING_BYTES", limit)
        assert is_mapped(read_tensors(tmp_path / "m")["a"]) is (limit == 0)
        assert_read(tmp_path / "m", expected)


def test_what_is_let_go_is_read_again(everything_is_worth_mapping: None, tmp_path: Path) -> None:
    big = torch.arange(1 << 20, dtype=torch.float32)
    torch.save({"a": big, "b": big[:7].clone()}, tmp_path / "m")
    read = read_tensors(tmp_path / "m")
    assert all(map(is_mapped, read.values()))
    before = resident_kib()
    assert torch.equal(read["a"], big)
    looked_at = resident_kib()
    for tensor in read.values():
        let_go(tensor)
    assert resident_kib() < looked_at - 2000 and looked_at > before + 2000
    assert torch.equal(read["a"], big) and torch.equal(read["b"], big[:7])


def test_what_was_written_into_is_kept(everything_is_worth_mapping: None, tmp_path: Path) -> None:
    """A LoRA is added to mapped weights, and the engine that has laid them out lets the weights go."""
    torch.save({"a": torch.zeros(1 << 16)}, tmp_path / "m")
    weight = torch.nn.Parameter(read_tensors(tmp_path / "m")["a"])
    with torch.no_grad():
        weight.add_(1)
    let_go(weight)
    assert weight.min() == 1


def test_what_is_fetched_is_there(everything_is_worth_mapping: None, tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1 << 16)}, tmp_path / "m")
    tensor = read_tensors(tmp_path / "m")["a"]
    fetch(tensor)
    fetch(tensor[1:5])
    fetch(torch.zeros(5))
    assert torch.equal(tensor, torch.arange(1 << 16))


def resident_kib() -> int:
    """Pages of mapped files that this process holds."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssFile:")[1].split()[0])


def test_a_small_file_is_read(m9_folder: Path) -> None:
    assert not any(map(is_mapped, load_path(m9_folder, safety_checker=False).parameters()))


@pytest.mark.fault(113)
@pytest.mark.parametrize(
    "code", [errno.ENODEV, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP]
)
def test_a_file_system_that_cannot_map_is_read(
    code: int,
    everything_is_worth_mapping: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, "No such device")

    expected = written(tmp_path / "m")
    monkeypatch.setattr(mmap, "mmap", refuse)
    caplog.set_level(logging.INFO, "flagai_altdiff")
    assert_read(tmp_path / "m", expected)
    assert [r.levelname for r in caplog.records if "cannot be mapped" in r.getMessage()] == ["INFO"]


def test_too_little_memory_for_mapping_is_no_reason_to_read(
    everything_is_worth_mapping: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    written(tmp_path / "m")
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match="Cannot allocate memory"):
        read_tensors(tmp_path / "m")


DISTANT = ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "fuse.sshfs", "fuse.rclone", "fuse", "virtiofs"]
NEAR = ["ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "fuseblk", "nfsd"]


@pytest.mark.fault(113)
@pytest.mark.parametrize("kind", DISTANT + NEAR)
def test_a_file_on_a_distant_disk_is_read(
    kind: str,
    everything_is_worth_mapping: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = written(tmp_path / "m")
    device = (tmp_path / "m").stat().st_dev
    number = f"{device >> 8 & 0xFFF}:{(device & 0xFF) | (device >> 12 & 0xFFF00)}"
    lines = (
        "22 27 0:999 / /proc rw,relatime - proc proc rw\n"
        f"90 27 {number} / /mnt/a\\040b rw,relatime shared:7 master:3 - {kind} server:/share - rw,vers=4.2\n"
    )
    (tmp_path / "mountinfo").write_text(lines)
    monkeypatch.setattr(mapped, "_MOUNTS", tmp_path / "mountinfo")
    caplog.set_level(logging.INFO, "flagai_altdiff")
    assert is_mapped(read_tensors(tmp_path / "m")["a"]) is (kind in NEAR)
    assert_read(tmp_path / "m", expected)
    assert (f"distant disk ({kind})" in caplog.text) is (kind in DISTANT)


def test_where_nothing_tells_the_file_system_it_is_mapped(
    everything_is_worth_mapping: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "m")
    monkeypatch.setattr(mapped, "_MOUNTS", tmp_path / "absent")
    assert is_mapped(read_tensors(tmp_path / "m")["a"])
