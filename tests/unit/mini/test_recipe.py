"""Training: each stage changes what it names, and an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flagai_altdiff import generate, load_model
from flagai_altdiff.config import AutoencoderConfig, LatentDiffusionConfig, TextEncoderConfig, UNetConfig
from flagai_altdiff.errors import InvalidRequestError, TrainingInterrupted
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.captions import caption
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe import denoiser, loop, parts, stages
from flagai_altdiff.mini.recipe.alignment import alignment_loss
from flagai_altdiff.mini.recipe.autoencoder import autoencoder_loss, normalise_latents
from flagai_altdiff.mini.recipe.denoiser import denoiser_loss, zero_init
from flagai_altdiff.mini.recipe.judge import judge_loss
from flagai_altdiff.mini.recipe.parts import PARTS, train_mini
from flagai_altdiff.mini.recipe.stages import STAGES, Stage
from flagai_altdiff.mini.recipe.text_encoder import CaptionTokenizer, TextWithHeads, normalise_states, text_loss
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import all_scenes, training_scenes
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation

AUTOENCODER = AutoencoderConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2, resolution=128)


def tiny(stage: Stage) -> Stage:
    return replace(stage, batch=2, shards=1, steps=4, warmup=1)


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


def task(name: str, tokenize: CaptionTokenizer) -> tuple[torch.nn.Module, loop.StepLoss, Stage]:
    stage = tiny(STAGES[name])
    torch.manual_seed(0)
    if name == "judge":
        judge = Judge()
        return judge, judge_loss(judge, stage, all_scenes()), stage
    if name == "text_encoder":
        text = TextWithHeads(text_config(tokenize))
        return text, text_loss(text, tokenize, stage, training_scenes()), stage
    if name == "alignment":
        encoder = RobertaSeriesModelWithTransformation(text_config(tokenize))
        return encoder, alignment_loss(encoder, tokenize, stage, training_scenes()[:6]), stage
    if name in ("unet", "refinement"):
        model = tiny_model(tokenize)
        latent_cache = {"mean": torch.randn(6, 4, 8, 8).half(), "std": torch.rand(6, 4, 8, 8).half()}
        return model, denoiser_loss(model, tokenize, latent_cache, training_scenes()[:6], stage, name), stage
    autoencoder = AutoencoderKL(AUTOENCODER)
    return autoencoder, autoencoder_loss(autoencoder, stage, training_scenes(), name), stage


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_changes_exactly_the_matching_parameters(name: str, tokenize: CaptionTokenizer, tmp_path: Path) -> None:
    module, step_loss, stage = task(name, tokenize)
    before = weights(module)
    state = loop.TrainingState(name, stage, module, tmp_path)
    for _ in range(2):
        numbers = state.update(step_loss)
        assert numbers["loss"] > 0
    changed = {n for n, tensor in module.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == set(state.parameters) == set(loop.select_trainable(module, stage.trains))
    assert changed


@pytest.mark.parametrize("name", ["autoencoder_32", "unet"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    name: str, tokenize: CaptionTokenizer, tmp_path: Path
) -> None:
    whole, step_loss, stage = task(name, tokenize)
    loop.train(loop.TrainingState(name, stage, whole, tmp_path), step_loss)

    interrupted, step_loss, _ = task(name, tokenize)
    state = loop.TrainingState(name, stage, interrupted, tmp_path / "two")
    state.log_path.parent.mkdir()
    for _ in range(3):
        with pytest.raises(TrainingInterrupted):
            loop.train(state, step_loss, deadline=time.time())
    assert state.step == 3
    resumed, step_loss, _ = task(name, tokenize)
    state = loop.TrainingState(name, stage, resumed, tmp_path / "two")
    loop.train(state, step_loss)
    assert state.step == stage.steps
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key


def test_the_learning_rate_warms_up_and_falls() -> None:
    stage = Stage(trains="", steps=100, batch=1, learning_rate=1.0, warmup=10, final_rate=0.1)
    rates = [loop.rate_at(stage, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


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
        monkeypatch.setitem(STAGES, name, replace(stage, batch=2, shards=1, steps=3, warmup=1))
    monkeypatch.setattr(stages, "AUTOENCODER", replace(stages.AUTOENCODER, ch=4, norm_groups=2))
    monkeypatch.setattr(stages, "TEXT_ENCODER", replace(stages.TEXT_ENCODER, hidden_size=16, intermediate_size=16))
    monkeypatch.setattr(stages, "UNET", replace(stages.UNET, model_channels=8, norm_groups=4))
    monkeypatch.setattr(denoiser, "CACHE_SIZE", 4)
    monkeypatch.setattr(parts, "STATISTICS_IMAGES", 4)
    monkeypatch.setattr(parts, "STATISTICS_CAPTIONS", 20)
    few = training_scenes()[:8]
    monkeypatch.setattr(parts, "training_scenes", lambda: few)


@pytest.mark.usefixtures("small_recipe")
def test_the_whole_recipe_in_sittings(tokenizer_file: Path, tmp_path: Path) -> None:
    """To a folder that draws; the first sittings end as soon as they train."""
    work, out = tmp_path / "work", tmp_path / "model"
    work.mkdir()
    shutil.copyfile(tokenizer_file, work / tokenizer_file.name)
    names = [name for name in PARTS if name != "measure"]
    sittings = 0
    for sitting in range(100):
        minutes = 0.0 if sitting < 8 else None
        try:
            train_mini(out=out, work=work, parts=names, minutes=minutes, resume=True)
        except TrainingInterrupted:
            sittings += 1
        else:
            break
    assert sittings == 8
    assert not list(work.glob("*.state.safetensors")), "a finished stage keeps no state"
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
    stage = replace(STAGES["alignment"], batch=24, steps=60, warmup=5, learning_rate=3e-3, text_drop=0.2)
    loop.train(
        loop.TrainingState("alignment", stage, encoder, tmp_path), alignment_loss(encoder, tokenize, stage, scenes)
    )
    assert spread() < 0.6 * before
