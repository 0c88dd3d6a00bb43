"""The released models at full size, with random weights: written as FlagAI's folders, loaded, one picture each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentencepiece import sentencepiece_model_pb2

from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.config import LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.models import build_model
from flagai_altdiff.sampling.schedule import make_betas, schedule_buffers
from tests import tiny

pytestmark = pytest.mark.full

WEIGHTS_GIB = 5.65
CONFIGS = {
    "AltDiffusion-m9": LatentDiffusionConfig(),
    "AltDiffusion-m18": LatentDiffusionConfig(
        unet=UNetConfig(num_heads=None, num_head_channels=64, use_linear_in_transformer=True, context_dim=1024),
        cond_stage=TextEncoderConfig(project_dim=1024, has_pre_transformation=True, has_pooler=False),
    ),
}

# A process of its own, so that its peak memory is that of loading and drawing.
DRAW = r"""
import json, re, sys, time
from pathlib import Path
from flagai_altdiff import GenerationRequest, generate, load_model
def peak_gib():  # of this program alone; getrusage remembers the process it was forked from
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

start = time.perf_counter()
model = load_model(sys.argv[1], safety_checker=False, mapped=sys.argv[2] == 'mapped')
loaded = time.perf_counter()
after_load = peak_gib()
result = generate(model, GenerationRequest(prompts=("a cat",), height=256, width=256, steps=2, images_per_prompt=1))
print(json.dumps({
    "load_s": loaded - start,
    "draw_s": result.seconds,
    "load_gib": after_load,
    "peak_gib": peak_gib(),
    "size": result.images[0].size,
    "levels": len(result.images[0].getcolors(1 << 24)),
}))
"""


@pytest.mark.parametrize(
    ("name", "way"), [("AltDiffusion-m9", "copied"), ("AltDiffusion-m18", "copied"), ("AltDiffusion-m18", "mapped")]
)
def test_a_full_size_checkpoint_loads_and_draws(name: str, way: str, tmp_path: Path) -> None:
    write_released_folder(folder := tmp_path / name, name)
    done = subprocess.run([sys.executable, "-c", DRAW, str(folder), way], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{name}, {way}: loaded in {report['load_s']:.1f} s, {report['load_gib']:.1f} GiB; ", end="")
    print(f"2 steps of 256 px in {report['draw_s']:.1f} s, peak {report['peak_gib']:.1f} GiB")
    shutil.rmtree(folder)
    assert report["size"] == [256, 256]
    assert report["levels"] > 100
    # What is mapped is not read yet: the health check looks at a few numbers of each. What is copied is there once.
    assert report["load_gib"] < (2.5 if way == "mapped" else 1.35 * WEIGHTS_GIB)


def write_released_folder(folder: Path, name: str) -> None:
    """A folder as FlagAI downloads it, with random weights, and a tokenizer of XLM-R's length."""
    folder.mkdir(parents=True)
    write_released_config(folder / "config.yaml", CONFIGS[name])
    write_long_tokenizer(folder, CONFIGS[name].cond_stage.vocab_size)
    write_random_weights(folder / "model.ckpt", CONFIGS[name])


def write_released_config(path: Path, config: LatentDiffusionConfig) -> None:
    """The config as FlagAI's folders have it: nothing about the text encoder but its class."""
    data = yaml.safe_load(dump_config(config))
    data["model"]["params"]["cond_stage_config"]["params"] = {}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")


def write_long_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of XLM-R's length: a tiny one, and pieces that no text has."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny.sentencepiece_model())
    for i in range(len(proto.pieces) + 2, vocab_size):
        proto.pieces.add(piece=f"▁piece{i}", score=-20.0)
    (folder / "sentencepiece.bpe.model").write_bytes(proto.SerializeToString())


def write_random_weights(path: Path, config: LatentDiffusionConfig) -> None:
    """Fan-in scaled weights under every key of the model."""
    betas = make_betas(config.beta_schedule, config.timesteps, config.linear_start, config.linear_end)
    state = schedule_buffers(betas)
    with torch.device("meta"):
        model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            state[key] = torch.arange(value.shape[1])[None]
        elif value.ndim == 1 and key not in state:
            state[key] = torch.full(value.shape, float(key.endswith("weight")))
        elif key not in state:
            scale = value[0].numel() ** -0.5
            state[key] = torch.empty(value.shape).uniform_(-scale, scale, generator=generator)
    torch.save({"state_dict": state, "global_step": 0}, path)
