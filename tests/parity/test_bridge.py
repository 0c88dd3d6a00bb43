"""A model as a pipeline of diffusers and back: the same weights in memory, the same picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import flagai_altdiff
from flagai_altdiff import from_diffusers, generate, to_diffusers
from flagai_altdiff.convert import convert
from flagai_altdiff.errors import CheckpointError
from flagai_altdiff.models import LatentDiffusion
from tests import tiny

SEED, STEPS, SCALE, SIDE = 7, 4, 5.0, 64


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, model: LatentDiffusion, prompt: str) -> np.ndarray[Any, Any]:
    cells = SIDE // model.config.first_stage.downsampling
    noise = torch.randn(1, model.channels, cells, cells, generator=torch.Generator().manual_seed(SEED))
    image = pipeline(
        prompt, latents=noise, num_inference_steps=STEPS, guidance_scale=SCALE, height=SIDE, width=SIDE
    ).images[0]
    return np.asarray(image).astype(int)


def ours(model: LatentDiffusion, prompt: str) -> np.ndarray[Any, Any]:
    options: dict[str, Any] = {"steps": STEPS, "guidance_scale": SCALE, "height": SIDE, "width": SIDE}
    return np.asarray(generate(model, prompt, seed=SEED, **options).images[0]).astype(int)


@pytest.mark.parametrize("name", ["m9", "m18"])
def test_the_same_picture_from_the_same_memory(name: str, request: pytest.FixtureRequest) -> None:
    model: LatentDiffusion = request.getfixturevalue(name)
    pipeline = quiet(to_diffusers(model))
    own = {weight.data_ptr() for weight in model.parameters()}
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert all(weight.data_ptr() in own for weight in part.parameters())
    for prompt in (tiny.CAT, "一只戴着帽子的小狗"):
        assert np.abs(drawn(pipeline, model, prompt) - ours(model, prompt)).max() <= 1
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    back = from_diffusers(pipeline)
    assert back.config == model.config
    assert all(weight.data_ptr() in own for weight in back.parameters())
    assert (ours(back, tiny.CAT) == ours(model, tiny.CAT)).all()


def test_other_schedulers_and_pipelines(m9: LatentDiffusion) -> None:
    pipeline = quiet(to_diffusers(m9, diffusers.StableDiffusionImg2ImgPipeline))
    assert isinstance(pipeline, diffusers.StableDiffusionImg2ImgPipeline)
    pipeline = quiet(to_diffusers(m9))
    pipeline.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    assert drawn(pipeline, m9, tiny.CAT).shape == (SIDE, SIDE, 3)
    with pytest.raises(ValueError, match="clip_skip"):
        pipeline(tiny.CAT, clip_skip=1, num_inference_steps=1, height=SIDE, width=SIDE)
    pipeline.text_encoder = None
    with pytest.raises(CheckpointError, match="not AltDiffusion's"):
        from_diffusers(pipeline)


def test_a_converted_folder_opens_in_diffusers(m9_folder: Path, m9: LatentDiffusion, tmp_path: Path) -> None:
    convert(m9_folder, tmp_path / "folder", "diffusers")
    assert "import flagai_altdiff" in (tmp_path / "folder" / "README.md").read_text()
    assert flagai_altdiff.__version__
    pipeline = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "folder"))
    assert pipeline.tokenizer.model_max_length == 77
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    assert np.abs(drawn(pipeline, m9, tiny.CAT) - ours(m9, tiny.CAT)).max() <= 1
    pipeline.save_pretrained(tmp_path / "again")
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again"))
    assert (drawn(again, m9, tiny.CAT) == drawn(pipeline, m9, tiny.CAT)).all()
    assert (ours(from_diffusers(again), tiny.CAT) == ours(m9, tiny.CAT)).all()
