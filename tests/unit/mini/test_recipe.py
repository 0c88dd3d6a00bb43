"""Training: each stage changes what it names, and an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flagai_altdiff import generate, load_model
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import InvalidRequestError, TrainingInterrupted
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe import denoiser, parts, stages
from flagai_altdiff.mini.recipe.alignment import alignment_task
from flagai_altdiff.mini.recipe.autoencoder import autoencoder_task, normalise_latents
from flagai_altdiff.mini.recipe.denoiser import denoiser_task, zero_init
from flagai_altdiff.mini.recipe.judge import judge_task
from flagai_altdiff.mini.recipe.parts import PARTS, train_mini
from flagai_altdiff.mini.recipe.stages import STAGES
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.text_encoder import CaptionTokenizer, TextWithHeads, normalise_states, text_task
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import all_scenes, training_scenes
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import MachineConfig, StageSettings
from flagai_altdiff.training.module import Load, StageTraining, trainable_names
from flagai_altdiff.training.run import fit

AUTOENCODER = AutoencoderConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2, resolution=128)


def tiny(settings: StageSettings, **changes: Any) -> StageSettings:
    few: dict[str, Any] = {"batch_size": 2, "steps": 4, "warmup_steps": 0, **changes}
    return replace(settings, row=replace(settings.row, **few))


@pytest.fixture(scope="module")
def tokenize(tokenizer_file: Path) -> CaptionTokenizer:
    return CaptionTokenizer(tokenizer_file)


def text_config(tokenize: CaptionTokenizer) -> TextEncoderConfig:
    return TextEncoderConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        vocab_size=tokenize.vocab_size,
        max_position_embeddings=80,
        project_dim=8,
        has_pooler=False,
    )


def tiny_model(tokenize: CaptionTokenizer) -> LatentDiffusion:
    torch.manual_seed(0)
    return build_model(
        LatentDiffusionConfig(
            unet=UNetConfig(
                model_channels=8, channel_mult=(1, 2), num_res_blocks=1, num_heads=2, context_dim=8, norm_groups=4
            ),
            first_stage=AUTOENCODER,
            cond_stage=text_config(tokenize),
            parameterization="v",
        )
    )


def task(name: str, tokenize: CaptionTokenizer) -> tuple[Task, StageSettings]:
    settings = tiny(STAGES[name])
    torch.manual_seed(0)
    if name == "judge":
        return judge_task(Judge(), settings, all_scenes()), settings
    if name == "text_encoder":
        return text_task(TextWithHeads(text_config(tokenize)), tokenize, settings, training_scenes()), settings
    if name == "alignment":
        encoder = RobertaSeriesModelWithTransformation(text_config(tokenize))
        return alignment_task(encoder, tokenize, settings, training_scenes()[:6]), settings
    if name in ("unet", "refinement"):
        latent_cache = {"mean": torch.randn(6, 4, 8, 8).half(), "std": torch.rand(6, 4, 8, 8).half()}
        return denoiser_task(tiny_model(tokenize), tokenize, latent_cache, training_scenes()[:6], settings), settings
    return autoencoder_task(AutoencoderKL(AUTOENCODER), settings, training_scenes()), settings


def train(task: Task, settings: StageSettings, folder: Path) -> list[float]:
    """The losses of its steps."""
    fit(StageTraining(task, settings, task.load()), folder, save_every=1, machine=MachineConfig(accelerator="cpu"))
    return [row["loss"] for row in read_log(folder / "log.csv")]


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_changes_exactly_the_matching_parameters(name: str, tokenize: CaptionTokenizer, tmp_path: Path) -> None:
    job, settings = task(name, tokenize)
    before = weights(job.model)
    assert all(loss > 0 for loss in train(job, settings, tmp_path))
    changed = {n for n, tensor in job.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trainable_names(job.model, settings.pattern)


@pytest.mark.parametrize("name", STAGES)
def test_processes_share_a_step(name: str, tokenize: CaptionTokenizer) -> None:
    """Each has its rows of the same step, wherever the run begins, and their losses are those of one process."""
    job, _ = task(name, tokenize)
    whole = next(islice(job.load()(0, 0, 1), 3, None))
    shares = [next(iter(job.load()(3, rank, 2))) for rank in range(2)]
    assert all(torch.equal(torch.stack([share[key][0] for share in shares]), whole[key]) for key in job.draw(0))
    with torch.no_grad():
        losses = torch.cat([job(share, lambda value: (value, 0)) for share in shares])
        torch.testing.assert_close(losses, job(whole, lambda value: (value, 0)), rtol=1e-4, atol=1e-6)
    assert not len(job(next(iter(job.load()(3, 2, 3))), lambda value: (value, 0)))


@pytest.mark.parametrize("name", ["autoencoder", "unet"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    name: str, tokenize: CaptionTokenizer, tmp_path: Path
) -> None:
    whole, settings = task(name, tokenize)
    expected = train(whole, settings, tmp_path / "whole")

    def cut(step: int) -> Mapping[str, Tensor]:
        if step == 2:
            raise RuntimeError("power cut")
        return job.draw(step)

    job, _ = task(name, tokenize)
    with pytest.raises(RuntimeError, match="power cut"):
        train(replace(job, draw=cut), settings, tmp_path / "cut")
    resumed, _ = task(name, tokenize)
    assert train(resumed, settings, tmp_path / "cut") == expected
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[key]), key


def test_normalised_latents_give_the_same_images() -> None:
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(AUTOENCODER)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        before, kept = autoencoder.decode(autoencoder.encode(images).mode()), autoencoder.encode(images)
        normalise_latents(autoencoder, images)
        after, latents = autoencoder.decode(autoencoder.encode(images).mode()), autoencoder.encode(images)
    assert torch.allclose(before, after, atol=1e-4)
    assert latents.mean.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert torch.allclose(latents.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    noise_to_signal = kept.std / kept.mean.std(dim=(0, 2, 3))[:, None, None]
    assert torch.allclose(latents.std, noise_to_signal, rtol=1e-3)


def test_normalised_text_states_have_unit_variance(tokenize: CaptionTokenizer) -> None:
    torch.manual_seed(0)
    encoder = TextWithHeads(text_config(tokenize)).encoder
    ids = tokenize(["a red star on a blue background", "ein roter Stern", "星"])
    normalise_states(encoder, ids)
    with torch.no_grad():
        states = encoder(ids[:, : int((ids != 1).sum(dim=1).max()) + 1]).flatten(0, 1)
    assert states.mean(dim=0).abs().max() < 1e-4
    assert torch.allclose(states.std(dim=0), torch.ones(8), atol=1e-3)


def test_a_fresh_unet_predicts_zero(tokenize: CaptionTokenizer) -> None:
    model = tiny_model(tokenize)
    zero_init(model.model.diffusion_model)
    with torch.no_grad():
        output = model.apply_model(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 8))
    assert output.abs().max() == 0


def test_a_run_is_not_mixed_up_with_another(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InvalidRequestError, match="resume"):
        train_mini(out=tmp_path / "model", work=tmp_path)
    with pytest.raises(InvalidRequestError, match="text_encoder"):
        train_mini(out=tmp_path / "model", work=tmp_path / "new", parts=["sculpture"])
    train_mini(out=tmp_path / "model", work=tmp_path, parts=["tokenizer"], resume=True)
    assert (tmp_path / "sentencepiece.bpe.model").exists()
    assert "unet" in PARTS


def test_the_recipe_is_that_of_the_embedded_model() -> None:
    config = load_model("AltDiffusion-mini").config
    assert stages.mini_config(config.cond_stage.vocab_size) == config


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the recipe, with tiny parts, few steps and little data."""
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, tiny(stage, steps=3))
    monkeypatch.setattr(stages, "AUTOENCODER", replace(stages.AUTOENCODER, ch=4, norm_groups=2))
    monkeypatch.setattr(stages, "TEXT_ENCODER", replace(stages.TEXT_ENCODER, hidden_size=16, intermediate_size=16))
    monkeypatch.setattr(stages, "UNET", replace(stages.UNET, model_channels=8, norm_groups=4))
    monkeypatch.setattr(denoiser, "CACHE_SIZE", 4)
    monkeypatch.setattr(parts, "STATISTICS_IMAGES", 4)
    monkeypatch.setattr(parts, "STATISTICS_CAPTIONS", 20)
    few = training_scenes()[:8]
    monkeypatch.setattr(parts, "training_scenes", lambda: few)


@pytest.mark.usefixtures("small_recipe")
def test_the_whole_recipe_in_sittings(tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a folder that draws; the first sittings end as soon as they train."""
    work, out = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    shutil.copyfile(tokenizer_file, work / tokenizer_file.name)
    names = [name for name in PARTS if name != "measure"]
    original = Task.load

    def interrupted(job: Task) -> Load:
        def load(first: int, rank: int, world: int) -> Iterator[Mapping[str, object]]:
            batches = original(job)(first, rank, world)
            yield next(iter(batches))
            os.kill(os.getpid(), signal.SIGTERM)
            yield from batches

        return load

    for _ in range(8):
        with monkeypatch.context() as during:
            during.setattr(Task, "load", interrupted)
            with pytest.raises(TrainingInterrupted):
                train_mini(out=out, work=work, parts=names, resume=True)
    train_mini(out=out, work=work, parts=names, resume=True)
    assert not list(work.rglob("*.ckpt")), "a finished stage keeps no state"
    result = generate(load_path(out), "a red star", steps=2, height=64, width=64)
    assert result.images[0].size == (64, 64)
    first = (out / "model.safetensors").read_bytes()
    train_mini(out=out, work=work, parts=names, resume=True)
    assert (out / "model.safetensors").read_bytes() == first, "finished stages are not trained again"


def test_alignment_brings_the_languages_together(tokenize: CaptionTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = RobertaSeriesModelWithTransformation(text_config(tokenize))
    scenes = training_scenes()[:4]
    captions = tokenize([caption(scenes[0], code) for code in LANGUAGES])

    def spread() -> float:
        with torch.no_grad():
            return float(encoder(captions)[:, -1].std(dim=0).mean())

    before = spread()
    changes = {"batch_size": 24, "steps": 60, "warmup_steps": 5, "learning_rate": 3e-3, "text_drop": 0.2}
    settings = tiny(STAGES["alignment"], **changes)
    train(alignment_task(encoder, tokenize, settings, scenes), settings, tmp_path)
    assert spread() < 0.6 * before
