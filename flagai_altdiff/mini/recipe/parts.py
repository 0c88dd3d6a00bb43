"""Trains AltDiffusion-mini from nothing: each stage resumes where it stopped and is skipped when its result exists."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.checkpoint.saving import half_precision
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.hub import record_missing
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.accuracy import as_table, measure
from flagai_altdiff.mini.batches import draw_batch
from flagai_altdiff.mini.contact_sheet import contact_sheet
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe import stages
from flagai_altdiff.mini.recipe.alignment import alignment_task
from flagai_altdiff.mini.recipe.autoencoder import (
    autoencoder_task,
    normalise_latents,
    quiet_posterior,
    use_channels_last,
)
from flagai_altdiff.mini.recipe.denoiser import cached_scenes, denoiser_task, fill_latent_cache, make_look, zero_init
from flagai_altdiff.mini.recipe.judge import judge_task
from flagai_altdiff.mini.recipe.stages import IMAGE_SIDE, STAGES, mini_config
from flagai_altdiff.mini.recipe.steps import Task, save_whole
from flagai_altdiff.mini.recipe.text_encoder import (
    CaptionTokenizer,
    TextWithHeads,
    draw_caption,
    normalise_states,
    text_task,
)
from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene, all_scenes, training_scenes
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation
from flagai_altdiff.registry import MODELS
from flagai_altdiff.training.config import MachineConfig, StageSettings
from flagai_altdiff.training.module import StageTraining
from flagai_altdiff.training.processes import is_first, meet, started, wait_until
from flagai_altdiff.training.run import STATES, fit

AUTOENCODER_STAGES = ("autoencoder_32", "autoencoder_64", "autoencoder")
SAVE_EVERY, LOOK_EVERY = 300, 2000
STATISTICS_IMAGES, STATISTICS_CAPTIONS = 512, 2000
SHEET_SCENES = [
    Scene(shape="star", colour="yellow", background="blue"),
    Scene(shape="heart", colour="red", background="white", size="large"),
    Scene(shape="house", colour="white", background="green", size="large"),
    Scene(shape="crescent", colour="yellow", background="black", position="left"),
    Scene(shape="flower", colour="purple", background="yellow", size="large"),
    Scene(shape="ring", colour="green", background="orange", position="right"),
    Scene(shape="cross", colour="blue", background="red"),
    Scene(shape="triangle", colour="orange", background="purple", size="small"),
]

logger = logging.getLogger(__name__)


def train_mini(
    *, out: Path, work: Path = Path("runs/AltDiffusion-mini"), parts: Sequence[str] = (), resume: bool = False
) -> None:
    """Train AltDiffusion-mini and write it as a model folder. Under torchrun all processes take part.

    Args:
        out: Folder of the model: ``config.yaml``, ``model.safetensors``, ``sentencepiece.bpe.model``.
        work: Folder for what takes long to make; a run that was stopped goes on from there.
        parts: Keys of ``PARTS``; all of them unless given. A part makes what it needs of earlier ones.
        resume: Go on with the run in ``work``; without it, ``work`` must be new or empty.

    Raises:
        InvalidRequestError: Unknown part, or a run that would be mixed up with another.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
        NotFiniteError: The loss is no number any more.
        DiskError: A state cannot be saved.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InvalidRequestError("stage", ", ".join(unknown), f"expected some of {', '.join(PARTS)}")
    if not resume and work.is_dir() and any(work.iterdir()) and is_first():
        raise InvalidRequestError(
            "work", str(work), "it holds a run; add --resume to go on with it, or name another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    for name in parts or PARTS:
        logger.info("part: %s", name)
        PARTS[name](Place(work=work, out=out))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run keeps its files.

    Attributes:
        work: Folder of states and results of the stages.
        out: Folder of the finished model.
    """

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


def tokenizer(place: Place) -> CaptionTokenizer:
    """Write the tokenizer, or read the one that is there."""
    path = place.work / "sentencepiece.bpe.model"
    if is_first() and not path.exists():
        build_tokenizer(path)
    wait_until(path.exists)
    return CaptionTokenizer(path)


def text_encoder(place: Place) -> RobertaSeriesModelWithTransformation:
    """Train the text encoder on captions in all languages."""
    torch.manual_seed(1)
    tokenize = tokenizer(place)
    model = TextWithHeads(mini_config(tokenize.vocab_size).cond_stage)
    scenes = training_scenes()

    def normalise() -> None:
        rng = random.Random("text statistics")
        drawn = rng.choices(scenes, k=STATISTICS_CAPTIONS)
        normalise_states(model.encoder, tokenize([draw_caption(scene, rng)[0] for scene in drawn]))

    run_stage("text_encoder", model, lambda settings: text_task(model, tokenize, settings, scenes), place, normalise)
    return model.encoder


def judge(place: Place) -> Judge:
    """Train the judge; it is no part of the model and may see every scene."""
    torch.manual_seed(2)
    model = Judge()
    use_channels_last(model)
    run_stage("judge", model, lambda settings: judge_task(model, settings, all_scenes()), place)
    return model


def autoencoder(place: Place) -> AutoencoderKL:
    """Train the autoencoder on squares of 32, then 64 px, then on whole images."""
    torch.manual_seed(0)
    model = AutoencoderKL(stages.AUTOENCODER)
    quiet_posterior(model)
    use_channels_last(model)
    scenes = training_scenes()

    def normalise() -> None:
        rng = random.Random("latent statistics")
        normalise_latents(model, draw_batch(rng.choices(scenes, k=STATISTICS_IMAGES), rng))

    for name in AUTOENCODER_STAGES:
        finish = normalise if STAGES[name].side == IMAGE_SIDE else lambda: None
        run_stage(name, model, lambda settings: autoencoder_task(model, settings, scenes), place, finish)
    return model


def assembled(place: Place) -> LatentDiffusion:
    """The model with its trained text encoder and autoencoder, and a fresh UNet."""
    torch.manual_seed(3)
    model = build_model(mini_config(tokenizer(place).vocab_size))
    model.first_stage_model.load_state_dict(autoencoder(place).state_dict())
    model.cond_stage_model.load_state_dict(text_encoder(place).state_dict())
    zero_init(model.model.diffusion_model)
    use_channels_last(model)
    return model


def unet(place: Place) -> LatentDiffusion:
    """Train the UNet."""
    return train_unet("unet", place)


def aligned_text_encoder(place: Place) -> RobertaSeriesModelWithTransformation:
    """Bring the languages closer together, with the UNet as it is."""
    encoder, tokenize = text_encoder(place), tokenizer(place)
    scenes = training_scenes()
    run_stage("alignment", encoder, lambda settings: alignment_task(encoder, tokenize, settings, scenes), place)
    return encoder


def refined(place: Place) -> LatentDiffusion:
    """Train the UNet further, on the aligned text states."""
    return train_unet("refinement", place)


def before(name: str, place: Place) -> LatentDiffusion:
    """The model as a stage of the UNet finds it."""
    if name == "unet":
        return assembled(place)
    model = unet(place)
    model.cond_stage_model.load_state_dict(aligned_text_encoder(place).state_dict())
    return model


def train_unet(name: str, place: Place) -> LatentDiffusion:
    """Train the UNet."""
    model, tokenize = before(name, place), tokenizer(place)

    def task(settings: StageSettings) -> Task:
        latents = fill_latent_cache(model.first_stage_model, place.work / "latents.safetensors")
        return denoiser_task(model, tokenize, latents, cached_scenes(), settings)

    run_stage(name, model, task, place, make_look=lambda: make_look(model, tokenize, judge(place)))
    return model


def export(place: Place) -> None:
    """Write the model folder, and the judge in the precision that the package carries."""
    model, halves = refined(place), {name: tensor.half() for name, tensor in judge(place).state_dict().items()}
    if is_first():
        write_model(model, place)
        save_whole(halves, place.work / "judge_half.safetensors")


def write_model(model: LatentDiffusion, place: Place) -> None:
    """Write weights (half precision; the noise schedule in float32), config, tokenizer, and the record of all three."""
    save_whole(half_precision(model.state_dict()), place.out / "model.safetensors", {"format": "pt"})
    (place.out / "config.yaml").write_text(dump_config(model.config), encoding="utf-8")
    shutil.copyfile(place.work / "sentencepiece.bpe.model", place.out / "sentencepiece.bpe.model")
    (place.out / MANIFEST_NAME).unlink(missing_ok=True)
    record_missing(place.out)


def measure_all(place: Place) -> None:
    """Measure the written model in every language and draw its contact sheet."""
    if not is_first():
        return
    model = load_path(place.out, MODELS["AltDiffusion-mini"])
    rows = [measure(model, language) for language in LANGUAGES]
    (place.work / "accuracy.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    logger.info("accuracy in per cent:\n%s", as_table(rows))
    contact_sheet(model, SHEET_SCENES).quantize(128).save(place.out / "contact_sheet.png", optimize=True)


PARTS: dict[str, Callable[[Place], object]] = {
    "tokenizer": tokenizer,
    "judge": judge,
    "autoencoder": autoencoder,
    "text_encoder": text_encoder,
    "unet": unet,
    "alignment": aligned_text_encoder,
    "refinement": refined,
    "export": export,
    "measure": measure_all,
}
"""Parts of the recipe, in order."""
