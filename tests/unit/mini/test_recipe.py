"""Training: each stage changes what it names, and an interrupted run ends where an uninterrupted one does."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff import generate, load_model
from flagai_altdiff.config import (
    AltCLIPConfig,
    AutoencoderConfig,
    LatentDiffusionConfig,
    TextEncoderConfig,
    UNetConfig,
    VisionConfig,
)
from flagai_altdiff.errors import InvalidRequestError, TrainingInterrupted
from flagai_altdiff.loading import load_path
from flagai_altdiff.matching import load_matching_model, match
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe import judge, parts, results, stages
from flagai_altdiff.mini.recipe.autoencoder import LATENT_NOISE, autoencoder_task, normalise_latents
from flagai_altdiff.mini.recipe.corpus import Corpus, make_corpus
from flagai_altdiff.mini.recipe.denoiser import denoiser_task, spread, zero_init
from flagai_altdiff.mini.recipe.judge import judge_task
from flagai_altdiff.mini.recipe.matching import student_task, teacher_task
from flagai_altdiff.mini.recipe.pictures import read_pictures
from flagai_altdiff.mini.recipe.run import train_mini
from flagai_altdiff.mini.recipe.saying import Saying
from flagai_altdiff.mini.recipe.stages import STAGES
from flagai_altdiff.mini.recipe.steps import Task
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.recipe.words import majority, words_task
from flagai_altdiff.mini.things.catalogue import Thing
from flagai_altdiff.mini.things.packages import Package
from flagai_altdiff.mini.things.shards import Amount, write_things
from flagai_altdiff.mini.things.sprites import make_sprites
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import MachineConfig, StageSettings
from flagai_altdiff.training.module import Load, StageTraining, trainable_names
from flagai_altdiff.training.run import fit
from tests.things import CODES

AUTOENCODER = AutoencoderConfig(ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2, resolution=128)
DIFFUSION = ("unet", "alignment", "quality", "guidance")
Sprites = Mapping[tuple[str, str], Image.Image]


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


def tiny_matching_model(tokenize: CaptionTokenizer) -> AltCLIP:
    vision = VisionConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    return AltCLIP(AltCLIPConfig(text=text_config(tokenize), vision=vision, projection_dim=8))


@pytest.fixture(scope="module")
def data(few_things: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some pictures of four things."""
    folder = tmp_path_factory.mktemp("things")
    write_things(folder, Amount(renders=12, shapes=0.25))
    return folder


@pytest.fixture(scope="module")
def corpus(data: Path, things: tuple[Thing, ...], tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(read_pictures(data, tmp_path_factory.mktemp("unpacked")), things)


@pytest.fixture(scope="module")
def sprites(archives: dict[Package, Path]) -> Sprites:
    return make_sprites(archives, CODES)


@pytest.fixture(scope="module")
def make_task(tokenize: CaptionTokenizer, corpus: Corpus, sprites: Sprites, things: tuple[Thing, ...]) -> Any:
    """Name of a stage -> its task with tiny parts, and its settings."""

    def make(name: str) -> tuple[Task, StageSettings]:
        settings = tiny(STAGES[name])
        torch.manual_seed(0)
        if name == "judge":
            return judge_task(Judge(), settings, sprites), settings
        if name in parts.TEACHER_STAGES:
            model = tiny_matching_model(tokenize)
            return teacher_task(model, tokenize, corpus, settings, on_one_ground=name == "teacher"), settings
        if name == "student":
            student, teacher = tiny_matching_model(tokenize), tiny_matching_model(tokenize)
            return student_task(student, teacher, tokenize, corpus, settings), settings
        if name in ("words", "polish"):
            student, before = tiny_matching_model(tokenize), tiny_matching_model(tokenize).text_model
            return words_task(student, things, tokenize, settings, before if name == "polish" else None), settings
        if name in DIFFUSION:
            latents = {"mean": torch.randn(len(corpus), 4, 8, 8).half(), "std": torch.rand(len(corpus), 4, 8, 8).half()}
            return denoiser_task(tiny_model(tokenize), tokenize, latents, corpus, settings, ["en", "zh"]), settings
        noise = LATENT_NOISE if name == "decoder" else 0.0
        return autoencoder_task(AutoencoderKL(AUTOENCODER), settings, corpus.pictures, noise), settings

    return make


def train(task: Task, settings: StageSettings, folder: Path) -> list[float]:
    """The losses of its steps."""
    fit(StageTraining(task, settings, task.load()), folder, save_every=1, machine=MachineConfig(accelerator="cpu"))
    return [row["loss"] for row in read_log(folder / "log.csv")]


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("name", STAGES)
def test_a_step_changes_exactly_the_matching_parameters(name: str, make_task: Any, tmp_path: Path) -> None:
    job, settings = make_task(name)
    before = weights(job.model)
    assert all(loss > 0 for loss in train(job, settings, tmp_path))
    changed = {n for n, tensor in job.model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert changed == trainable_names(job.model, settings.pattern)


@pytest.mark.parametrize("name", STAGES)
def test_processes_share_a_step(name: str, make_task: Any) -> None:
    """Each has its rows of the same step, wherever the run begins, and their losses are those of one process."""
    job, _ = make_task(name)
    whole = next(islice(job.load()(0, 0, 1), 2, None))
    shares = [next(iter(job.load()(2, rank, 2))) for rank in range(2)]
    assert all(torch.equal(torch.stack([share[key][0] for share in shares]), whole[key]) for key in job.draw(0))
    if name in parts.TEACHER_STAGES:  # their losses are of the whole batch, which processes gather
        return
    with torch.no_grad():
        losses = torch.cat([job(share, lambda value: (value, 0)) for share in shares])
        torch.testing.assert_close(losses, job(whole, lambda value: (value, 0)), rtol=1e-4, atol=1e-6)
    assert not len(job(next(iter(job.load()(3, 2, 3))), lambda value: (value, 0)))


@pytest.mark.parametrize("name", ["autoencoder", "unet"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(name: str, make_task: Any, tmp_path: Path) -> None:
    whole, settings = make_task(name)
    expected = train(whole, settings, tmp_path / "whole")

    def cut(step: int) -> Mapping[str, Tensor]:
        if step == 2:
            raise RuntimeError("power cut")
        return job.draw(step)

    job, _ = make_task(name)
    with pytest.raises(RuntimeError, match="power cut"):
        train(replace(job, draw=cut), settings, tmp_path / "cut")
    resumed, _ = make_task(name)
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


@pytest.mark.parametrize("name", DIFFUSION)
def test_timesteps_are_spread_over_all_of_them_as_asked(name: str) -> None:
    even = torch.arange(1000) / 1000
    places = spread(even, stages.NOISY[name])
    assert places[0] == 0 and 0.99 < places[-1] < 1 and (places.diff() > 0).all()
    assert (places >= 0.5).float().mean() == pytest.approx(stages.NOISY[name], abs=2e-3)
    torch.testing.assert_close(spread(even, 0.5), even)


def test_the_decoder_learns_to_clear_noise_and_leaves_the_latents(make_task: Any, corpus: Corpus) -> None:
    job, settings = make_task("decoder")
    learns = trainable_names(job.model, settings.pattern)
    assert not any(name.startswith(("encoder.", "quant_conv.")) for name in learns)
    quiet, loud = (job.draw(3) for job in (make_task("autoencoder")[0], job))
    assert not quiet["more"].any() and loud["more"].std(dim=(1, 2, 3)).max() <= 1.2 * LATENT_NOISE
    with torch.no_grad():
        alike, other = (
            {**loud, "more": more, "position": torch.arange(2)} for more in (0 * loud["more"], loud["more"])
        )
        assert not torch.equal(job.losses(alike, lambda v: (v, 0)), job.losses(other, lambda v: (v, 0)))


def test_further_words_are_those_that_may_be_learnt(
    tokenizer_file: Path, things: tuple[Thing, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize, said = CaptionTokenizer(tokenizer_file), set[str]()
    varied = tokenize.varied

    def listening(texts: Sequence[str], rng: random.Random) -> Tensor:
        said.update(text.casefold() for text in texts)
        return varied(texts, rng)

    monkeypatch.setattr(tokenize, "varied", listening)
    job = words_task(tiny_matching_model(tokenize), things, tokenize, tiny(STAGES["words"], batch_size=1024))
    for step in range(4):
        job.draw(step)
    cat = things[0]
    for words in ((cat.names["en"],), cat.words["en"], cat.shared_words["en"]):
        assert {word.casefold() for word in words} <= said
    unseen = {word.casefold() for thing in things for word in thing.unseen_words["en"] if word.endswith("en")}
    assert unseen and not unseen & said


def test_what_is_a_name_elsewhere_is_no_word_for_another_thing(things: tuple[Thing, ...]) -> None:
    cat = replace(things[0], words={**things[0].words, "en": ("pizza de", "puss")})
    pizza = replace(things[1], unseen_words={**things[1].unseen_words, "en": ("My cat en",)})
    saying, rng = Saying((cat, pizza)), random.Random(0)
    said = {saying.of_thing(rng) for _ in range(200_000)}
    assert {(0, "en", "puss"), (0, "en", "the cat en"), (1, "de", "pizza de")} <= said
    assert (0, "en", "pizza de") not in said and (0, "en", "my cat en") not in said
    shapes = {saying.of_shape(rng) for _ in range(1000)}
    assert (2, "en", "circle") in shapes and min(number for number, _, _ in shapes) == 2


@pytest.mark.parametrize("names", [0.1, 0.9])
def test_words_of_things_are_names_as_often_as_was_asked_for(things: tuple[Thing, ...], names: float) -> None:
    saying, rng = Saying(things, names=names), random.Random(0)
    drawn = [saying.of_thing(rng) for _ in range(4000)]
    named = sum(things[number].names[language].casefold() in text.casefold() for number, language, text in drawn)
    assert named / len(drawn) == pytest.approx(0.9 * names, abs=0.06), "some names are worn"


def test_what_is_preferred_is_drawn_more_often_but_for_names_of_two_things(things: tuple[Thing, ...]) -> None:
    cat, pizza = (
        replace(thing, names={**thing.names, code: "kot"}) for thing, code in zip(things, ("pl", "tr"), strict=False)
    )
    saying, rng = Saying((cat, pizza)), random.Random(0)
    preferred = {"kot", "cat en"}
    saying.prefer(lambda some: [50.0 if word in preferred else 1.0 for _, _, word in some])
    drawn = Counter(saying.of_thing(rng) for _ in range(20_000))
    assert drawn[0, "en", "cat en"] > 20 * drawn[1, "en", "pizza en"] > 0
    assert drawn[0, "pl", "kot"] < 3 * drawn[1, "en", "pizza en"]


def test_polishing_keeps_to_what_names_meant_and_sees_most_of_what_is_far_off(
    tokenizer_file: Path, things: tuple[Thing, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenize, weighed = CaptionTokenizer(tokenizer_file), list[tuple[Any, list[float]]]()
    prefer = Saying.prefer

    def listening(saying: Saying, weigh: Any) -> None:
        def noted(words: Any) -> list[float]:
            weighed.append((words, list(weigh(words))))
            return weighed[-1][1]

        prefer(saying, noted)

    monkeypatch.setattr(Saying, "prefer", listening)
    before = (model := tiny_matching_model(tokenize)).text_model
    piece = tokenize([things[0].names["th"]])[0, 1]
    for _ in range(2):
        words_task(model, things, tokenize, tiny(STAGES["polish"]), before)
        table = model.text_model.roberta.embeddings.word_embeddings.weight
        assert table.std() > 0.5, "nothing is made smaller"
        model.text_model = deepcopy(before)
        model.text_model.roberta.embeddings.word_embeddings.weight.data[piece] *= -5
    (names, first), (_, second) = weighed[0], weighed[3]
    has_piece = [piece in ids for ids in tokenize([word for _, _, word in names])]
    assert min(first) >= 1 and any(has_piece) and not all(has_piece)
    rise = [after / earlier for earlier, after in zip(first, second, strict=True)]
    worse = [r for r, has in zip(rise, has_piece, strict=True) if has]
    others = [r for r, has in zip(rise, has_piece, strict=True) if not has]
    assert sum(worse) / len(worse) > 1.2 * sum(others) / len(others)


def test_the_majority_of_languages_says_what_a_thing_means() -> None:
    torch.manual_seed(0)
    said = torch.randn(1, 5, 3, 8).repeat(4, 1, 1, 1) + 0.01 * torch.randn(4, 5, 3, 8)
    true = said[0].clone()
    said[2, 1] = said[2, 3]
    meant, alike = majority(said)
    torch.testing.assert_close(meant, true, rtol=0, atol=0.1)
    assert alike.logical_not().nonzero().tolist() == [[2, 1]]


def test_learning_further_words_begins_with_what_names_mean(tokenizer_file: Path, things: tuple[Thing, ...]) -> None:
    """Though the embeddings are made smaller, which a normalisation follows."""
    tokenize = CaptionTokenizer(tokenizer_file)
    tower = (model := tiny_matching_model(tokenize)).text_model
    table, ids = tower.roberta.embeddings.word_embeddings.weight, tokenize([thing.names["th"] for thing in things])
    states, noise = tower(ids), table.std().item()
    words_task(model, things, tokenize, tiny(STAGES["words"]))
    assert table.std().item() < 0.1 * noise
    torch.testing.assert_close(tower(ids), states, rtol=1e-3, atol=1e-2)


def test_a_fresh_unet_predicts_zero(tokenize: CaptionTokenizer) -> None:
    model = tiny_model(tokenize)
    zero_init(model.model.diffusion_model)
    with torch.no_grad():
        output = model.apply_model(torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 8))
    assert output.abs().max() == 0


def test_a_run_is_not_mixed_up_with_another(few_things: None, data: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InvalidRequestError, match="resume"):
        train_mini(out=tmp_path / "models", work=tmp_path)
    with pytest.raises(InvalidRequestError, match="autoencoder"):
        train_mini(out=tmp_path / "models", work=tmp_path / "new", names=["sculpture"])
    train_mini(out=tmp_path / "models", work=tmp_path, data=data, names=["tokenizer"], resume=True)
    assert (tmp_path / "sentencepiece.bpe.model").exists()


def test_the_recipe_is_that_of_the_embedded_models() -> None:
    config = load_model("AltDiffusion-mini").config
    assert stages.mini_config(config.cond_stage.vocab_size) == config
    matching = load_matching_model("AltCLIP-mini").config
    assert stages.matching_config(matching.text.vocab_size) == matching


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch, few_things: None, archives: dict[Package, Path]) -> None:
    """All of the recipe, with tiny parts, few steps and little data."""
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, tiny(stage, steps=3))
    monkeypatch.setattr(stages, "AUTOENCODER", replace(stages.AUTOENCODER, ch=4, norm_groups=2))
    monkeypatch.setattr(stages, "TEXT_ENCODER", replace(stages.TEXT_ENCODER, hidden_size=16, intermediate_size=16))
    monkeypatch.setattr(stages, "VISION", replace(stages.VISION, hidden_size=12, intermediate_size=16))
    monkeypatch.setattr(stages, "UNET", replace(stages.UNET, model_channels=8, norm_groups=4))
    monkeypatch.setattr(parts, "STATISTICS_IMAGES", 4)
    monkeypatch.setattr(parts, "fetch", lambda folder: archives)
    monkeypatch.setattr(judge, "FRESH", 8)
    for count in ("ON_THE_WAY", "AT_THE_END", "NAMES_AT_THE_END", "_SHEET_THINGS"):
        monkeypatch.setattr(results, count, 1)
    monkeypatch.setattr(results, "_SHOWN_IN_ALL", CODES[:1])
    monkeypatch.setattr(results, "LANGUAGES", {code: LANGUAGES[code] for code in ("en", "zh")})
    for cached in (parts.corpus, parts.sprites, parts.tokenizer):
        cached.cache_clear()


@pytest.mark.usefixtures("small_recipe")
def test_the_whole_recipe_in_sittings(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To folders that draw and match; the first sittings end as soon as they train."""
    work, out = tmp_path / "work", tmp_path / "models"

    def sitting() -> None:
        train_mini(out=out, work=work, data=data, resume=True)

    original = Task.load

    def interrupted(job: Task) -> Load:
        def load(first: int, rank: int, world: int) -> Iterator[Mapping[str, object]]:
            batches = original(job)(first, rank, world)
            yield next(iter(batches))
            os.kill(os.getpid(), signal.SIGTERM)
            yield from batches

        return load

    for _ in STAGES:
        with monkeypatch.context() as during:
            during.setattr(Task, "load", interrupted)
            with pytest.raises(TrainingInterrupted):
                sitting()
    sitting()
    assert not list(work.rglob("*.ckpt")), "a finished stage keeps no state"
    result = generate(load_path(out / "AltDiffusion-mini"), "cat en", steps=2, height=64, width=64)
    assert result.images[0].size == (64, 64)
    assert match(load_matching_model(out / "AltCLIP-mini"), ["cat en"], result.images).shape == (1, 1)
    assert {path.stem for path in (work / "tables").glob("*.json")} == {*DIFFUSION, "student", "model"}
    assert all((out / "AltDiffusion-mini" / sheet).is_file() for sheet in ("things.png", "languages.png"))
    files = [out / "AltDiffusion-mini" / "model.safetensors", out / "AltCLIP-mini" / "model.safetensors"]
    first = [file.read_bytes() for file in files]
    sitting()
    assert [file.read_bytes() for file in files] == first, "finished stages are not trained again"
