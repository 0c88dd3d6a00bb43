"""``altdiff generate --from-file FILE --devices N``: the same files, however many processes draw, whoever is killed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flagai_altdiff.cli import main
from flagai_altdiff.evaluation.references import find_images, open_images
from flagai_altdiff.images import load_image
from flagai_altdiff.metadata import read_record
from flagai_altdiff.training.data.opening import open_examples
from tests.processes import Nursery

ORDINARY = ["-H", "64", "-W", "64", "--steps", "2", "-n", "1", "--no-safety-checker"]
SMALL = [*ORDINARY, "--batch-size", "2"]
COUNT = 40
SHARDS = ("--format", "webdataset", "--shard-size", "6")
STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in STARTED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines with and without seeds and options of their own."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {
            "prompt": f"a cat, number {n}",
            **({"seed": 1000 - n} if n % 5 == 0 else {}),
            **({"steps": 3, "negative_prompt": "blurry"} if 10 <= n < 13 else {}),
        }
        for n in range(COUNT)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def words(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return ["generate", "--from-file", str(prompts), "-m", str(model), "-o", str(out), *SMALL, *more]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def one(m9_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process makes that nothing disturbs, in both formats."""
    home = tmp_path_factory.mktemp("one")
    for name, more in (("png", ()), ("webdataset", SHARDS)):
        assert main(words(m9_folder, prompts, home / name, "--devices", "1", *more)) == 0
    return {name: home / name for name in ("png", "webdataset")}


def test_one_process_draws_every_line_once(one: dict[str, Path]) -> None:
    files = sorted((one["png"] / "samples").iterdir())
    assert [path.name for path in files] == [f"{n:05d}.png" for n in range(COUNT)]
    records = [read_record(path) for path in files]
    assert [record["prompt"] for record in records] == [f"a cat, number {n}" for n in range(COUNT)]
    assert [record["seed"] for record in records] == [1000 - n if n % 5 == 0 else 34234 + n for n in range(COUNT)]
    assert [record["steps"] for record in records] == [3 if 10 <= n < 13 else 2 for n in range(COUNT)]
    assert sorted(path.name for path in one["png"].iterdir()) == ["run.json", "samples"]


def test_the_same_pictures_as_an_ordinary_call(one: dict[str, Path], m9_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "p.txt"
    text.write_text("a dog\na hen\na fox\n")
    ordinary = ["-m", str(m9_folder), "--from-file", str(text), *SMALL[:6], "-n", "2", "--no-safety-checker"]
    assert main(["generate", *ordinary, "-o", str(tmp_path / "a"), "--seed-mode", "per_image"]) == 0
    assert main(["generate", *ordinary, "-o", str(tmp_path / "b"), "--devices", "1"]) == 0
    for n in range(3):
        a, b = (load_image(tmp_path / name / "samples" / f"{n:05d}.png") for name in "ab")
        assert a.tobytes() == b.tobytes()


def test_a_picture_of_a_run_is_drawn_again_alone(one: dict[str, Path], m9_folder: Path, tmp_path: Path) -> None:
    for n in (5, 11, 38):  # a seed of its own, options of its own, neither
        file = one["png"] / "samples" / f"{n:05d}.png"
        assert main(["redraw", str(file), "-m", str(m9_folder), "-o", str(tmp_path / str(n))]) == 0
        (again,) = (tmp_path / str(n) / "samples").iterdir()
        assert load_image(again).tobytes() == load_image(file).tobytes()


RANKS = """
import os, signal, sys
from flagai_altdiff.batch import drawing
from flagai_altdiff.cli import main

lots, victims, count, *words = sys.argv[1:]
draw, begun = drawing.draw, []

def killed_in_the_middle(*args):
    begun.append(args)
    for number, event in enumerate(draw(*args)):
        if len(begun) > int(lots) and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield event

children = []
for rank in range(int(count)):
    child = os.fork()
    if child == 0:
        os.environ["LOCAL_RANK"] = str(rank)
        if rank < int(victims):
            drawing.draw = killed_in_the_middle
        os._exit(main(words))
    children.append(child)
print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""
"""Processes that somebody else starts, as Lightning knows them by LOCAL_RANK, without the seconds that imports take.

The first few are killed in the middle of a lot, after as many lots as are told.
"""


@pytest.mark.parametrize(("kind", "count", "victims"), [("png", 2, 1), ("png", 4, 4), ("webdataset", 4, 1)])
def test_killed_processes_are_resumed_without_drawing_twice(
    kind: str,
    count: int,
    victims: int,
    one: dict[str, Path],
    m9_folder: Path,
    prompts: Path,
    tmp_path: Path,
    fresh_process: Nursery,
) -> None:
    out = tmp_path / "out"
    more = SHARDS if kind == "webdataset" else ()
    command = words(m9_folder, prompts, out, "--devices", str(count), *more)
    done = fresh_process.run(RANKS, 4, victims, count, *command, cwd=tmp_path, timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-9"] * victims + ["0"] * (count - victims), "nobody waits for the dead, or ends too"
    there = {path: path.stat() for path in out.rglob("*.*") if path.suffix in (".png", ".tar") and path.name[0] != "."}
    assert 0 < len(there) < len(hashes(one[kind])) - 1
    done = fresh_process.run(RANKS, 0, 0, count, *command, "--resume", cwd=tmp_path, timeout_s=300)
    assert done.stdout.split() == ["0"] * count, done.stderr
    assert hashes(out) == hashes(one[kind])
    for path, before in there.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not ready():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)


def start(command: list[str], environment: dict[str, str], *before: str) -> subprocess.Popen[str]:
    line = [sys.executable, *before, "-m", "flagai_altdiff", *command]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def members(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that draw, in the order in which they were started."""
    found = psutil.Process(process.pid).children()
    return sorted((p for p in found if "spawn_main" in " ".join(p.cmdline())), key=lambda p: p.create_time())


def test_a_process_that_is_killed_is_started_again(
    one: dict[str, Path], m9_folder: Path, prompts: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    process = start(words(m9_folder, prompts, tmp_path / "out", "--devices", "2"), script_environment)
    try:
        wait_for(lambda: len(list(tmp_path.glob("out/samples/*.png"))) >= 6, process)
        members(process)[1].send_signal(signal.SIGKILL)
        out, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "process 1 was killed (SIGKILL); it is started again" in error
    assert out.split() == [str(tmp_path / "out")] and f"{COUNT} pictures are there, after" in error
    assert hashes(tmp_path / "out") == hashes(one["png"])


def test_processes_end_soon_after_who_started_them(
    m9_folder: Path, prompts: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    process = start(words(m9_folder, prompts, tmp_path / "out", "--devices", "2"), script_environment)
    try:
        wait_for(lambda: len(list(tmp_path.glob("out/samples/*.png"))) >= 2, process)
        left = members(process)
    finally:
        process.kill()
    gone, alive = psutil.wait_procs(left, timeout=30)
    assert len(gone) == 2 and not alive
    assert len(list(tmp_path.glob("out/samples/*.png"))) < COUNT


@pytest.mark.full
def test_under_torchrun(
    one: dict[str, Path], m9_folder: Path, prompts: Path, tmp_path: Path, script_environment: dict[str, str]
) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(words(m9_folder, prompts, tmp_path / "out"), script_environment, *launch)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "share 0 of 2" in error and "share 1 of 2" in error
    assert hashes(tmp_path / "out") == hashes(one["png"])


@pytest.mark.parametrize("kind", ["torchrun", "srun", "by hand"])
def test_machines_share_the_work_by_number(
    kind: str,
    one: dict[str, Path],
    m9_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = {
        "torchrun": {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"},
        "srun": {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"},
        "by hand": {},
    }[kind]
    for name, value in {**told, "SLURM_JOB_NAME": "draw"}.items():
        monkeypatch.setenv(name, value)
    more = ["--nodes", "2"] if kind == "by hand" else []
    for node in ("1", "0"):
        for name in ("RANK", "GROUP_RANK", "SLURM_PROCID", "SLURM_NODEID") if told else ("NODE_RANK",):
            monkeypatch.setenv(name, node)
        if kind == "torchrun":
            monkeypatch.setenv("LOCAL_RANK", "0")
        assert main(words(m9_folder, prompts, tmp_path / "out", *more)) == 0
        assert f"share {node} of 2: " in capsys.readouterr().err
        assert (hashes(tmp_path / "out") == hashes(one["png"])) == (node == "0")


def test_shards_are_what_training_and_evaluation_read(one: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(one["webdataset"], tmp_path / "shards")  # training notes beside them what lies where
    shards = sorted(folder.glob("*.tar"))
    with tarfile.open(shards[0]) as tar:
        names = tar.getnames()
    assert names[:3] == ["000000.png", "000000.txt", "000000.json"] and len(names) == 18
    pngs = [load_image(path).tobytes() for path in sorted((one["png"] / "samples").iterdir())]
    examples = open_examples(folder)
    assert len(examples) == COUNT and not list(examples.left_out.lines())
    read = [examples[n] for n in range(COUNT)]
    assert [example.image.tobytes() for example in read if example.image] == pngs
    assert [example.captions[0].text for example in read] == [f"a cat, number {n}" for n in range(COUNT)]
    places, images, broken = open_images(find_images(folder))
    assert places == [*range(COUNT)] and not broken
    assert [image.tobytes() for image in images] == pngs


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "0"], "--devices=0: expected a whole number, at least 1"),
        (["--devices", "1", "--best", "1"], "--best=1: it is not for runs of many pictures"),
        (["--devices", "1", "--seed", "-1"], "--seed=-1: a run needs a seed"),
        (["--devices", "1", "--seed-mode", "batch"], "--seed-mode='batch': a picture of a run has a seed of its own"),
        (["--devices", "1", "--n-iter", "2"], "--n-iter=2: a run goes through its file once"),
        (["--shard-size", "5"], "--shard-size=5: it is for --format webdataset"),
        (["--devices", "1", "--eta", "2"], "--eta=2.0"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(
    more: list[str], message: str, m9_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(m9_folder, prompts, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_line_that_the_model_cannot_draw_is_named_before_anything_is_drawn(
    m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # long paths are shortened
    path = Path("p.jsonl")
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "width": 72}\n')
    assert main(words(m9_folder, path, tmp_path / "out", "--devices", "1")) == 2
    assert "--from-file='p.jsonl': line 3: width=72: this model draws multiples of 16 px" in capsys.readouterr().err
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "engine": "compile", "cache_interval": 2}\n')
    assert main(words(m9_folder, path, tmp_path / "out", "--devices", "1")) == 2
    assert "line 2: engine='compile': it runs the UNet as a whole" in capsys.readouterr().err
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "width": 8192, "height": 8192, "images_per_prompt": 500}\n')
    assert main(words(m9_folder, path, tmp_path / "out", "--devices", "1")) == 2
    assert "line 2: drawing 2 images of 8192x8192 at once needs about" in capsys.readouterr().err
    assert main(["generate", "-m", str(m9_folder), "--from-file", str(path), "-o", "out", *ORDINARY]) == 2
    assert "request 2: drawing 500 images of 8192x8192 at once needs about" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_more_processes_than_pictures(m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    assert main(words(m9_folder, tmp_path / "p.txt", tmp_path / "out", "--devices", "200")) == 0
    error = capsys.readouterr().err
    assert "share the work" not in error and "1 picture is there, after" in error


def test_more_threads_than_cores_are_advised_against(
    m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    command, cores = words(m9_folder, tmp_path / "p.txt", tmp_path / "out", "--devices", "2"), os.cpu_count() or 1
    assert main([*command, "--threads", str(cores)]) == 0
    assert f"2 processes of {cores} threads on {cores} cores: more than the cores" in capsys.readouterr().err


def test_what_the_embedded_model_does_not_know_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("\n".join(["a cat", *(f"florbnax{letter}" for letter in "abcdefg"), "florbnaxa"]))
    command = words(Path("AltDiffusion-mini"), tmp_path / "p.txt", tmp_path / "out", "--devices", "1")
    assert main([*command, "-H", "32", "-W", "32", "--steps", "1"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "florbnax" in line or "The same is true" in line]
    assert len(said) == 6 and said[-1] == "The same is true of 2 more."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "b", "sampler": "dpmp"}', "line 2: unknown sampler 'dpmp'. Did you mean"),
        (
            '{"promt": "b"}',
            """line 2: it has no prompt; expected {"prompt": "a cat"} and other options of a request beside it; """
            "it has 'promt'",
        ),
        ('{"prompt": "b", "outpath": "x"}', "line 2: outpath='x': there is no such option"),
        ('{"prompt": "b", "steps": 4, "ddim_steps": 5}', "line 2: ddim_steps=5: it is another name of steps"),
    ],
)
def test_a_wrong_line_is_named(
    line: str, message: str, m9_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    assert main(words(m9_folder, path, tmp_path / "out", "--devices", "1")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["generate", "-m", str(m9_folder), "--from-file", str(path), "-o", str(tmp_path), *ORDINARY]) == 2
    assert message.removeprefix("line 2: ") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (None, "--nodes=2: which of them is this? Begin the command with NODE_RANK=0, or up to 1 on the others"),
        ("abc", "NODE_RANK='abc': expected the number of this machine, from 0 to 1"),
        ("5", "NODE_RANK='5': expected the number of this machine, from 0 to 1"),
    ],
)
def test_each_machine_must_know_its_number(
    number: str | None,
    message: str,
    m9_folder: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NODE_RANK", raising=False)
    if number is not None:
        monkeypatch.setenv("NODE_RANK", number)
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "2", "--nodes", "2")) == 2
    assert message in capsys.readouterr().err


def test_a_folder_has_one_run(
    one: dict[str, Path], m9_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(one["png"])
    assert main(words(m9_folder, prompts, one["png"], "--devices", "1", "--steps", "4")) == 2
    assert "it has another run (its steps is 2, not 4); name another folder" in capsys.readouterr().err
    assert main(words(m9_folder, prompts, one["png"], "--devices", "1", "--eta", "0.5")) == 2
    assert "it has another run (its eta is left open, not 0.5); name another folder" in capsys.readouterr().err
    (tmp_path / "p.jsonl").write_text(prompts.read_text() + '{"prompt": "one more"}\n')
    assert main(words(m9_folder, tmp_path / "p.jsonl", one["png"], "--devices", "1")) == 2
    assert "it has another run (it began with another file of prompts, or" in capsys.readouterr().err
    assert main(words(m9_folder, prompts, one["png"], "--devices", "1")) == 0
    assert "0 drawn, 40 were there" in capsys.readouterr().err
    assert hashes(one["png"]) == before
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "00000.png").write_bytes(b"mine")
    assert main(words(m9_folder, prompts, tmp_path, "--devices", "1")) == 2
    assert "it has pictures of other calls" in capsys.readouterr().err


def test_other_calls_keep_out_of_its_folder(
    one: dict[str, Path], m9_folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = hashes(one["png"])
    assert main(["generate", "a cat", "-m", str(m9_folder), "-o", str(one["png"]), *ORDINARY]) == 2
    assert "a run of many pictures has it for itself (run.json); name another one" in capsys.readouterr().err
    assert hashes(one["png"]) == before


def test_a_run_goes_on_with_the_memory_that_it_began_with(
    m9_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "1", "--memory", "low")) == 0
    capsys.readouterr()
    (tmp_path / "out" / "samples" / "00005.png").unlink()
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "1")) == 0  # auto: normal, here
    assert "1 drawn" in capsys.readouterr().err
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "1", "--memory", "lowest")) == 2
    assert "it has another run (its memory is 'low', not 'lowest')" in capsys.readouterr().err


def test_what_a_disk_damaged_is_drawn_again(
    one: dict[str, Path], m9_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(words(m9_folder, prompts, out, "--devices", "1", *SHARDS)) == 0
    shard = out / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-2000])
    (out / "00002.tar").unlink()
    (out / f".00003.tar.{'0' * 16}.tmp").write_bytes(b"of a process that was killed")
    assert main(words(m9_folder, prompts, out, "--devices", "1", *SHARDS)) == 0
    assert hashes(out) == hashes(one["webdataset"])


def test_a_full_disk_is_said_once(
    m9_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flagai_altdiff.batch.places.save_png", refuse)
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "1")) == 1
    error = capsys.readouterr().err
    assert error.count("No space left on device. What was drawn stays; see to it") == 1 and "Traceback" not in error
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["run.json"]
    assert os.environ.get("LOCAL_RANK") is None


def test_a_process_that_is_none_of_them_is_refused(
    m9_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert main(words(m9_folder, prompts, tmp_path / "out", "--devices", "2")) == 1
    assert "this is process 2, by LOCAL_RANK and NODE_RANK: there are 2 x 1 processes" in capsys.readouterr().err


def test_long_runs_say_how_they_get_on(
    m9_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flagai_altdiff.batch.drawing._REPORT_EVERY", 20)
    assert main([*words(m9_folder, prompts, tmp_path / "out", "--devices", "1"), "-v"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "share 0 of 1" in line]
    assert [line.split(": ")[-1].split(" drawn")[0] for line in said] == ["21", "40", "40"]  # as lots end
