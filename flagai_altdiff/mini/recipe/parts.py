"""Trains the embedded models from nothing: a stage resumes where it stopped, and is skipped when its result exists."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from flagai_altdiff.mini.accuracy import measure, questions
from flagai_altdiff.mini.judge import SEEN, Judge
from flagai_altdiff.mini.recipe import stages
from flagai_altdiff.mini.recipe.autoencoder import (
    LATENT_NOISE,
    autoencoder_task,
    normalise_latents,
    quiet_posterior,
    use_channels_last,
)
from flagai_altdiff.mini.recipe.corpus import Corpus, make_corpus
from flagai_altdiff.mini.recipe.denoiser import denoiser_task, fill_latent_cache, zero_init
from flagai_altdiff.mini.recipe.judge import Sprites, judge_task, share_right
from flagai_altdiff.mini.recipe.matching import student_task, teacher_task
from flagai_altdiff.mini.recipe.pictures import read_pictures
from flagai_altdiff.mini.recipe.stages import NOISY, STAGES, matching_config, mini_config
from flagai_altdiff.mini.recipe.steps import Task, save_whole
from flagai_altdiff.mini.recipe.texts import CaptionTokenizer
from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer
from flagai_altdiff.mini.recipe.words import words_task
from flagai_altdiff.mini.things.catalogue import FILE, make_catalogue, read_catalogue
from flagai_altdiff.mini.things.packages import fetch
from flagai_altdiff.mini.things.shards import ARCHIVES, REPORT, write_things
from flagai_altdiff.mini.things.sprites import make_sprites
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.registry import MODELS
from flagai_altdiff.training.config import MachineConfig, StageSettings
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.processes import is_first, meet, started, wait_until
from flagai_altdiff.training.run import STATES, fit

TEACHER_STAGES = ("teacher_first", "teacher")
AUTOENCODER_STAGES = ("autoencoder_64", "autoencoder", "decoder")
SAVE_EVERY, LOOK_EVERY, LOOK_PROMPTS = 200, 1000, 90
STATISTICS_IMAGES = 512
_LATENTS = "latents_{}.safetensors"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run keeps its files.

    Attributes:
        data: Folder of the things' shards, written if it has none.
        work: Folder of states and results of the stages.
        out: Folder of the finished models.
    """

    data: Path
    work: Path
    out: Path


def run_stage(
    name: str,
    module: nn.Module,
    make_task: Callable[[StageSettings], Task],
    place: Place,
    finish: Callable[[], None] = lambda: None,
    make_look: Callable[[], Callable[[], dict[str, float]]] | None = None,
) -> None:
    """Load the result of a stage into ``module``, training it first if need be.

    Args:
        name: Key of ``STAGES``.
        module: Changed in place.
        make_task: Makes what the engine asks for, if there is training to do.
        place: Where results and states lie.
        finish: Called on the trained module before it is saved.
        make_look: Makes a measurement of the averaged weights, taken on the way.
    """
    path, folder = place.work / f"{name}.safetensors", place.work / name
    if not path.exists():
        task = make_task(STAGES[name])
        training = StageTraining(task, STAGES[name], task.load())
        look = make_look() if make_look else None

        def report(step: int) -> None:
            assert look is not None
            with training.averaged():
                shares = " ".join(f"{key} {value:.3f}" for key, value in look().items())
            logger.info("%s, step %d: %s", name, step, shares)

        fit(
            training,
            folder,
            save_every=SAVE_EVERY,
            machine=MachineConfig(accelerator="cpu", devices=started() or 1),
            sheet_every=LOOK_EVERY if look else 0,
            draw_sheet=report,
        )
        training.take_average()
        if is_first():
            finish()
            save_whole(module.state_dict(), path)
            shutil.rmtree(folder / STATES)
        meet()
    module.load_state_dict(load_file(path))


@cache
def corpus(place: Place) -> Corpus:
    """The pictures and their words; fetched, composed and unpacked by the first who asks."""
    if is_first() and not (place.data / REPORT).is_file():
        write_things(place.data)
    unpacked = place.work / "unpacked"
    if is_first():
        read_pictures(place.data, unpacked)
    wait_until((unpacked / "facts.json").exists)
    return make_corpus(read_pictures(place.data, unpacked), read_catalogue(place.data / FILE))


@cache
def sprites(place: Place) -> Sprites:
    """All things, cut out."""
    corpus(place)
    archives = fetch(place.data / ARCHIVES)
    return make_sprites(archives, [thing.code for thing in make_catalogue(archives)])


@cache
def tokenizer(place: Place) -> CaptionTokenizer:
    """Write the tokenizer, or read the one that is there."""
    path = place.work / "sentencepiece.bpe.model"
    if is_first() and not path.exists():
        build_tokenizer(path, tuple(corpus(place).things.values()))
    wait_until(path.exists)
    return CaptionTokenizer(path)


def judge(place: Place) -> Judge:
    """Train the judge; it is no part of the models and may see everything."""
    torch.manual_seed(2)
    model = Judge()
    use_channels_last(model)

    def finish() -> None:
        shares = share_right(model.eval(), sprites(place)).tolist()
        words = " ".join(f"{name} {share:.4f}" for name, share in zip(SEEN, shares, strict=True))
        logger.info("the judge is right on fresh pictures: %s", words)

    run_stage("judge", model, lambda settings: judge_task(model, settings, sprites(place)), place, finish)
    return model


def autoencoder(place: Place) -> AutoencoderKL:
    """Train the autoencoder on squares of 64 px, then on whole images, then its decoder on latents with noise."""
    torch.manual_seed(0)
    model = AutoencoderKL(stages.AUTOENCODER)
    quiet_posterior(model)
    use_channels_last(model)

    def normalise() -> None:
        chosen = random.Random("latent statistics").sample(range(len(pictures)), STATISTICS_IMAGES)
        normalise_latents(model, pictures.batch(chosen))

    pictures = corpus(place).pictures

    def task(settings: StageSettings) -> Task:
        noise = LATENT_NOISE if settings.row.name == "decoder" else 0.0
        return autoencoder_task(model, settings, pictures, latent_noise=noise)

    for name in AUTOENCODER_STAGES:
        run_stage(name, model, task, place, normalise if name == "autoencoder" else lambda: None)
    return model


def _fresh_matching_model(place: Place, seed: int) -> AltCLIP:
    torch.manual_seed(seed)
    tokenize = tokenizer(place)
    model = AltCLIP(matching_config(tokenize.vocab_size))
    model.text_tokenizer = tokenize.tokenizer
    return model


def teacher(place: Place) -> AltCLIP:
    """Train both towers of the English teacher on pictures, then also on pictures that are harder to tell apart."""
    model = _fresh_matching_model(place, 1)

    def task(settings: StageSettings) -> Task:
        on_one_ground = settings.row.name == "teacher"
        return teacher_task(model, tokenizer(place), corpus(place), settings, on_one_ground=on_one_ground)

    for name in TEACHER_STAGES:
        run_stage(name, model, task, place)
    return model


def student(place: Place) -> AltCLIP:
    """Train a text tower in 18 languages on what the teacher says; the image tower is the teacher's."""
    old, model = teacher(place), _fresh_matching_model(place, 4)
    fresh = model.text_model.roberta.state_dict()
    model.load_state_dict(old.state_dict())
    model.text_model.roberta.load_state_dict(fresh)

    def task(settings: StageSettings) -> Task:
        return student_task(model, old, tokenizer(place), corpus(place), settings)

    run_stage("student", model, task, place)
    return model


def unet(place: Place) -> LatentDiffusion:
    """Train the UNet on what the English teacher says: a drawing model of one language."""
    torch.manual_seed(3)
    model = build_model(mini_config(tokenizer(place).vocab_size))
    model.first_stage_model.load_state_dict(autoencoder(place).state_dict())
    model.cond_stage_model.load_state_dict(teacher(place).text_model.state_dict())
    zero_init(model.model.diffusion_model)
    return train_unet("unet", model, place, ["en"])


def with_student(place: Place) -> LatentDiffusion:
    """The drawing model that hears the student in place of the teacher."""
    model = unet(place)
    model.cond_stage_model.load_state_dict(student(place).text_model.state_dict())
    return model


def alignment(place: Place) -> LatentDiffusion:
    """Concept alignment: nothing but the keys and values learn.

    From whole images: this UNet has seen no smaller ones, where the papers' knew both sizes. Tried on images of 64 px,
    the model drew 10 of 100 things afterwards that it had drawn 87 of.
    """
    return train_unet("alignment", with_student(place), place, list(LANGUAGES))


def quality(place: Place) -> LatentDiffusion:
    """Quality improvement: the whole UNet."""
    return train_unet("quality", alignment(place), place, list(LANGUAGES))


def guidance(place: Place) -> LatentDiffusion:
    """The whole UNet with a tenth of the texts dropped."""
    return train_unet("guidance", quality(place), place, list(LANGUAGES))


def words(place: Place) -> AltCLIP:
    """Teach the student further words for things; the states of names stay, so that the UNet is as good as it was."""
    model = student(place)

    def task(settings: StageSettings) -> Task:
        return words_task(model, list(corpus(place).things.values()), tokenizer(place), settings)

    run_stage("words", model, task, place)
    return model


def polish(place: Place) -> AltCLIP:
    """The same once more, with most of what came out farthest off."""
    model = words(place)

    def task(settings: StageSettings) -> Task:
        things, before = list(corpus(place).things.values()), student(place).text_model
        return words_task(model, things, tokenizer(place), settings, before)

    run_stage("polish", model, task, place)
    return model


def train_unet(name: str, model: LatentDiffusion, place: Place, languages: Sequence[str]) -> LatentDiffusion:
    """Train a part of the UNet or all of it."""
    use_channels_last(model)

    def task(settings: StageSettings) -> Task:
        pictures, path = corpus(place).pictures, place.work / _LATENTS.format(settings.side)
        latents = fill_latent_cache(model.first_stage_model, pictures, path, settings.side)
        return denoiser_task(model, tokenizer(place), latents, corpus(place), settings, languages, NOISY[name])

    run_stage(name, model, task, place, make_look=lambda: make_look(model, place, languages))
    return model


def make_look(model: LatentDiffusion, place: Place, languages: Sequence[str]) -> Callable[[], dict[str, float]]:
    """A measurement on the way: some things by their names, judged."""
    model.text_tokenizer, model.spec = tokenizer(place).tokenizer, MODELS["AltDiffusion-mini"]
    things, eye = list(corpus(place).things.values()), judge(place)
    asked = [one for code in languages for one in questions("ground", things, code, LOOK_PROMPTS // len(languages))]

    def look() -> dict[str, float]:
        return {name: right.float().mean().item() for name, right in measure(model, asked, judge=eye).items()}

    return look
