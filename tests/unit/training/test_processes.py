"""Several processes: as good as one, however they are started, and whatever ends them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flagai_altdiff.cli.common import command_that_goes_on
from flagai_altdiff.errors import ConfigError
from flagai_altdiff.training.callbacks import latest_state, read_log
from flagai_altdiff.training.config import parse_config
from flagai_altdiff.training.session import train
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
Config = dict[str, Any]
STEPS = 20


def losses(output: Path) -> list[float]:
    (log,) = output.glob("1-*/log.csv")
    return [row["loss"] for row in read_log(log)]


def learnt(output: Path) -> dict[str, torch.Tensor]:
    """What the newest state has: the weights that learn, and their averages."""
    (folder,) = output.glob("1-*/states")
    state = latest_state(folder)
    assert state is not None
    weights: dict[str, torch.Tensor] = torch.load(state, weights_only=False)["state_dict"]
    return weights


def config(model: Path | str, source: Path, stage: str, *, data: Any = None, towers: Any = None, **more: Any) -> Config:
    side = {} if stage in ("teacher", "contrastive") else {"side": 64}
    how = {"stage": stage, "steps": STEPS, "batch_size": 4, "warmup_steps": 1, "learning_rate": 1e-3, **side, **more}
    return {
        "model": str(model),
        "stages": [how],
        "data": {"source": str(source), **(data or {})},
        "save_every": 3,
        "sheets": {"every": 0, "prompts": ["a cat"], "steps": 1},
        "machine": {"accelerator": "cpu"},
        **(towers or {}),
    }


def changed(data: Config, output: Path, stage: Config | None = None, **machine: Any) -> Config:
    """A config with another output, and what else is to differ."""
    (before,) = data["stages"]
    return {
        **data,
        "output": str(output),
        "stages": [{**before, **(stage or {})}],
        "machine": {**data["machine"], **machine},
    }


@pytest.fixture(scope="session")
def every_kind(
    m9_folder: Path,
    m18_folder: Path,
    clip_folder: Path,
    xlmr_folder: Path,
    image_folder: Path,
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Config]:
    """Each kind of stage, on ten images of which two are broken; no batch size divides what there is."""
    folder = tmp_path_factory.mktemp("kinds")
    match = tiny.write_altclip_folder(folder / "match")
    towers = {"teacher": str(clip_folder), "student": str(xlmr_folder)}
    prior = {"prior": str(folder / "prior"), "prior_caption": "a cat", "prior_count": 3}
    both = r"cond_stage_model\.|model\.diffusion_model\."
    return {
        "teacher": config("x", text_file, "teacher", towers=towers),
        "teacher, cosine": config("x", text_file, "teacher", towers=towers, batch_size=3, loss="cosine"),
        "contrastive": config(match, image_folder, "contrastive"),
        "contrastive, a few": config(match, image_folder, "contrastive", batch_size=3),
        "alignment": config(m9_folder, image_folder, "alignment"),
        "quality": config(m18_folder, image_folder, "quality", batch_size=3, min_snr_gamma=5.0, noise_offset=0.1),
        "cached": config(m9_folder, image_folder, "guidance", data={"cache": True, "crop": "centre"}),
        "text encoder": config(m9_folder, image_folder, "guidance", trainable=both, data={"workers": 1}),
        "dreambooth": config(m9_folder, image_folder, "dreambooth", ema_decay=0.9, prior_weight=0.5, data=prior),
        "lora": config(m9_folder, image_folder, "lora", rank=4, batch_size=3),
    }


# Two are as good as one

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
RUNS = """
import json, logging, sys, torch
torch.set_num_threads(1)
from flagai_altdiff.training.config import parse_config
from flagai_altdiff.training.session import train
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
for data in json.loads(open(sys.argv[1]).read()):
    train(parse_config(data))
"""


def test_two_processes_are_as_good_as_one(
    every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    """Also where they accumulate batches, of which some have no sample for one of them, or for none."""
    pairs = {name: (data, {"accumulate": 2}) for name, data in every_kind.items() if "contrastive" not in name}
    # Texts are compared with the images of their part of a batch only, so that both must have the same parts.
    pairs["contrastive"] = (every_kind["contrastive"], {})
    pairs["contrastive, parts"] = (changed(every_kind["contrastive"], tmp_path, {"accumulate": 3}), {})
    pairs["contrastive, a few"] = (every_kind["contrastive, a few"], {})
    pairs["quality, cut"] = (every_kind["quality"], {"accumulate": 2})
    pairs["contrastive, cut"] = (changed(every_kind["contrastive"], tmp_path, {"ema_decay": 0.9}), {})
    (tmp_path / "runs.py").write_text(RUNS)
    two = [
        changed(data, tmp_path / "two" / name, stage, devices=2, strategy="fsdp" if "cut" in name else "auto")
        for name, (data, stage) in pairs.items()
    ]
    (tmp_path / "two.json").write_text(json.dumps(two))
    words = [sys.executable, *TORCHRUN, str(tmp_path / "runs.py"), str(tmp_path / "two.json")]
    with (
        open(tmp_path / "errors", "w+") as errors,
        subprocess.Popen(words, env=script_environment, stderr=errors) as process,
    ):
        for name, (data, _) in pairs.items():
            train(parse_config(changed(data, tmp_path / "one" / name)))
        process.wait(timeout=300)
    assert process.returncode == 0, (tmp_path / "errors").read_text()[-3000:]
    for name in pairs:
        expected, found = losses(tmp_path / "one" / name), losses(tmp_path / "two" / name)
        assert len(expected) == STEPS and found == pytest.approx(expected, rel=1e-5), name
        weights, others = learnt(tmp_path / "one" / name), learnt(tmp_path / "two" / name)
        assert weights.keys() == others.keys()
        apart = sum(float((others[key].float() - weights[key].float()).square().sum()) for key in weights)
        assert apart < 1e-7 * sum(float(tensor.float().square().sum()) for tensor in weights.values()), name


def until_lines(output: Path, count: int, process: subprocess.Popen[Any]) -> list[float]:
    """Wait until a run has logged so many steps; the losses so far."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        if list(output.glob("1-*/log.csv")) and len(losses(output)) >= count:
            return losses(output)
        time.sleep(0.02)
    raise AssertionError(f"after {process.poll()}: no {count} steps in {output}")


# What ends them

ENDS = """
import json, logging, os, resource, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from flagai_altdiff.errors import DiskError, NotFiniteError, TrainingInterrupted
from flagai_altdiff.training import session
from flagai_altdiff.training.config import parse_config
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
data, output, rank = json.loads(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
real, act = session.batches, {}

def batches(*args, **more):
    for number, batch in enumerate(real(*args, **more)):
        act.get(number, lambda: None)()
        yield batch

def run(name, resume=False, **stage):
    (before,) = data["stages"]
    session.train(parse_config({**data, "output": str(output / name), "stages": [{**before, **stage}]}), resume=resume)

def expect(kind, name, **more):
    try:
        run(name, **more)
    except kind as error:
        (output / f"{name} {rank}").write_text(str(error))
    else:
        raise AssertionError(name)

session.batches = batches
run("whole")

if rank == 1:
    act[14] = lambda: os.kill(os.getpid(), signal.SIGTERM)
expect(TrainingInterrupted, "asked")
act.clear()
run("asked", resume=True)

expect(NotFiniteError, "wild", learning_rate=10.0, warmup_steps=8, clip_norm=0.0, steps=300)

def small_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if rank == 0:
    act[10] = lambda: small_files(10_000)
expect(DiskError, "full")
small_files(resource.RLIM_INFINITY)
act.clear()
run("full", resume=True)
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_whatever_ends_one_process_ends_all_and_loses_nothing(
    strategy: str, every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    data = changed(every_kind["lora"], tmp_path, {"accumulate": 2, "steps": 12}, devices=2, strategy=strategy)
    (tmp_path / "ends.py").write_text(ENDS)
    words = [sys.executable, *TORCHRUN, str(tmp_path / "ends.py"), json.dumps(data), str(tmp_path)]
    done = subprocess.run(words, env=script_environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = {name: [(tmp_path / f"{name} {rank}").read_text() for rank in (0, 1)] for name in ("asked", "wild", "full")}
    assert said["asked"][0] == said["asked"][1] and "stopped after step 7; its state is saved" in said["asked"][0]
    assert "loss of step" in said["wild"][0] or "weights after step" in said["wild"][0]
    assert said["wild"][0] == said["wild"][1] and "is the last good state" in said["wild"][0]
    good = Path(said["wild"][0].split("; ")[1].partition(" is the last good state")[0])
    assert all(tensor.isfinite().all() for tensor in torch.load(good, weights_only=False)["state_dict"].values())
    assert said["full"][0] == said["full"][1] and "step-00000006.ckpt cannot be saved" in said["full"][0]
    for name in ("asked", "full"):
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        weights = learnt(tmp_path / name)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in learnt(tmp_path / "whole").items())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_two_processes_that_lightning_started_go_on(
    how: signal.Signals, every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    steps = 5 * STEPS  # so many that a busy machine does not end the run before it hears of the signal
    data = changed(every_kind["contrastive"], tmp_path / "run", {"accumulate": 2, "steps": steps}, devices=2)
    (tmp_path / "my.yaml").write_text(json.dumps(data))
    words = [sys.executable, "-m", "flagai_altdiff", "train", str(tmp_path / "my.yaml")]

    def begin(*more: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*words, *more], env=script_environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True
        )

    process = begin()
    until_lines(tmp_path / "run", 7, process)
    os.killpg(process.pid, how)
    errors = process.communicate(timeout=120)[1]
    before = losses(tmp_path / "run")
    assert 7 <= len(before) < steps
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert errors.count(f"Go on with: altdiff train {tmp_path / 'my.yaml'} --resume") == 1
    state = latest_state(tmp_path / "run" / "1-contrastive" / "states")
    assert state is not None
    again = begin("--resume")
    output, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors[-3000:]
    assert output.split() == [str(tmp_path / "run" / "1-contrastive" / "model")]
    found = losses(tmp_path / "run")
    assert len(found) == steps and found[: len(before)] == before  # of which those behind the state were made again


KILLED = """
import json, os, signal, sys, threading, time, warnings, torch
torch.set_num_threads(1)
warnings.simplefilter("ignore")
from pathlib import Path
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import parse_config
from flagai_altdiff.training.session import train

def watch(output):
    while not [log for log in output.glob("1-*/log.csv") if len(read_log(log)) >= 5]:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)

for data in json.loads(Path(sys.argv[1]).read_text()):
    if (child := os.fork()) == 0:
        threading.Thread(target=watch, args=(Path(data["output"]),), daemon=True).start()
        train(parse_config(data))
        os._exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_every_stage_that_was_killed_goes_on_bit_for_bit(
    every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    kinds = {
        name: every_kind[name] for name in ("teacher", "contrastive", "cached", "text encoder", "dreambooth", "lora")
    }
    how = {"accumulate": 2, "steps": 9, "decay": "cosine"}
    cut = {name: changed(data, tmp_path / "cut" / name, how) for name, data in kinds.items()}
    (tmp_path / "cut.json").write_text(json.dumps(list(cut.values())))
    words = [sys.executable, "-c", KILLED, str(tmp_path / "cut.json")]
    done = subprocess.run(words, env=script_environment, text=True, capture_output=True, timeout=300)
    assert done.stdout.split() == ["-9"] * len(kinds), done.stderr[-3000:]
    for name, data in cut.items():
        before = losses(tmp_path / "cut" / name)
        assert 5 <= len(before) < 9
        train(parse_config(data), resume=True)
        train(parse_config({**data, "output": str(tmp_path / "whole" / name)}))
        expected = losses(tmp_path / "whole" / name)
        assert losses(tmp_path / "cut" / name) == expected and expected[: len(before)] == before, name
        weights = learnt(tmp_path / "cut" / name)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in learnt(tmp_path / "whole" / name).items())


# However they are started


@pytest.mark.parametrize("how", ["two nodes", "slurm"])
def test_other_ways_to_start_them(
    how: str, every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    data = changed(every_kind["teacher"], tmp_path / "run", {"steps": 3}, nodes=2)
    (tmp_path / "my.yaml").write_text(json.dumps(data))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    train_it = ["-m", "flagai_altdiff", "train", str(tmp_path / "my.yaml")]
    processes = []
    for rank in ("0", "1"):
        environment, words = dict(script_environment), train_it
        if how == "slurm":
            slurm = {"JOB_ID": "4242", "JOB_NAME": "train", "NTASKS": "2", "NTASKS_PER_NODE": "1", "NNODES": "2"}
            slurm |= {"PROCID": rank, "NODEID": rank, "LOCALID": "0", "NODELIST": "localhost,localhost"}
            environment |= {f"SLURM_{name}": value for name, value in slurm.items()} | {"MASTER_PORT": port}
        else:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "here"]
            words = [*TORCHRUN[:2], "--nnodes", "2", "--nproc-per-node", "1", *meeting, "--node-rank", rank, *train_it]
        pipe = subprocess.PIPE
        processes.append(
            subprocess.Popen([sys.executable, *words], env=environment, text=True, stdout=pipe, stderr=pipe)
        )
    train(parse_config({**data, "output": str(tmp_path / "one"), "machine": {"accelerator": "cpu"}}))
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert sorted(output.split() for output, _ in said) == [[], [str(tmp_path / "run" / "1-teacher" / "model")]]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    "environment",
    [{"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}, {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}],
)
def test_other_processes_than_were_started_are_refused(
    environment: dict[str, str], every_kind: dict[str, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"machine: 2 processes were started, and devices=1 times nodes=1 is 1"):
        train(parse_config(changed(every_kind["lora"], tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "altdiff train my.yaml --resume"),
        ({"SLURM_NTASKS": "2"}, "srun altdiff train my.yaml --resume"),
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"},
            "torchrun --standalone --nproc-per-node 2 -m flagai_altdiff train my.yaml --resume",
        ),
    ],
)
def test_the_command_that_goes_on_is_the_launchers(
    environment: dict[str, str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["altdiff", "train", "my.yaml"])
    assert command_that_goes_on() == command


def test_a_single_number_cannot_be_cut(
    every_kind: dict[str, Config], tmp_path: Path, script_environment: dict[str, str]
) -> None:
    data = changed(every_kind["contrastive"], tmp_path / "run", {"trainable": ".*"}, devices=2, strategy="fsdp")
    (tmp_path / "my.yaml").write_text(json.dumps(data))
    words = [sys.executable, "-m", "flagai_altdiff", "train", str(tmp_path / "my.yaml")]
    done = subprocess.run(words, env=script_environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and "machine.strategy=fsdp cannot cut logit_scale" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
