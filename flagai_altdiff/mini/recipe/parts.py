"""Trains AltDiffusion-mini from nothing: each stage resumes where it stopped and is skipped when its result exists."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn

from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.checkpoint.saving import half_precision
from flagai_altdiff.errors import InvalidRequestError, TrainingInterrupted
from flagai_altdiff.hub import record_missing
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.accuracy import as_table, measure
from flagai_altdiff.mini.batches import draw_batch
from flagai_altdiff.mini.contact_sheet import contact_sheet
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.recipe import loop, stages
from flagai_altdiff.mini.recipe.alignment import alignment_loss
from flagai_altdiff.mini.recipe.autoencoder import (
    autoencoder_loss,
    normalise_latents,
    quiet_posterior,
    use_channels_last,
)
from flagai_altdiff.mini.recipe.denoiser import cached_scenes, denoiser_loss, fill_latent_cache, make_look, zero_init
from flagai_altdiff.mini.recipe.judge import judge_loss
from flagai_altdiff.mini.recipe.stages import IMAGE_SIDE, STAGES, mini_config
from flagai_altdiff.mini.recipe.text_encoder import (
    CaptionTokenizer,
    TextWithHeads,
    draw_caption,
    normalise_states,
    text_loss,
)
from flagai_altdiff.mini.recipe.tokenizer import build_tokenizer
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene, all_scenes, training_scenes
from flagai_altdiff.models import LatentDiffusion, build_model
from flagai_altdiff.models.autoencoder import AutoencoderKL
from flagai_altdiff.models.text_encoder import RobertaSeriesModelWithTransformation
from flagai_altdiff.registry import MODELS

AUTOENCODER_STAGES = ("autoencoder_32", "autoencoder_64", "autoencoder")
LOOK_EVERY = 2000
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
    *,
    out: Path,
    work: Path = Path("runs/AltDiffusion-mini"),
    parts: Sequence[str] = (),
    minutes: float | None = None,
    resume: bool = False,
) -> None:
    """Train AltDiffusion-mini and write it as a model folder.

    Args:
        out: Folder of the model: ``config.yaml``, ``model.safetensors``, ``sentencepiece.bpe.model``.
        work: Folder for what takes long to make; a run that was stopped goes on from there.
        parts: Keys of ``PARTS``; all of them unless given. A part makes what it needs of earlier ones.
        minutes: Stop training after this time and keep the state.
        resume: Go on with the run in ``work``; without it, ``work`` must be new or empty.

    Raises:
        InvalidRequestError: Unknown part, or a run that would be mixed up with another.
        TrainingInterrupted: The time was used up.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise InvalidRequestError("stage", ", ".join(unknown), f"expected some of {', '.join(PARTS)}")
    if not resume and work.is_dir() and any(work.iterdir()):
        raise InvalidRequestError(
            "work", str(work), "it holds a run; add --resume to go on with it, or name another folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    place = Place(work=work, out=out, deadline=math.inf if minutes is None else time.time() + 60 * minutes)
    for name in parts or PARTS:
        logger.info("part: %s", name)
        PARTS[name](place)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run keeps its files, and when it must stop.

    Attributes:
        work: Folder of states and results of the stages.
        out: Folder of the finished model.
        deadline: Time (of ``time.time()``) at which training stops.
    """

    work: Path
    out: Path
    deadline: float = math.inf


def run_stage(
    name: str,
    module: nn.Module,
    make_loss: Callable[[], loop.StepLoss],
    place: Place,
    finish: Callable[[], None] | None = None,
    look: Callable[[], dict[str, float]] | None = None,
    shard: int = 0,
) -> None:
    """Load the result of a stage into ``module``, training it first if need be.

    Args:
        name: Key of ``STAGES``.
        module: Changed in place.
        make_loss: Makes the loss of one step, if there is training to do.
        place: Where results and states lie.
        finish: Called on the trained module before it is saved.
        look: See :func:`loop.train`.
        shard: See :class:`loop.TrainingState`.
    """
    path = place.work / f"{name}.safetensors"
    if not path.exists():
        state = loop.TrainingState(name, STAGES[name], module, place.work, shard)
        loop.train(state, make_loss(), deadline=place.deadline, look=look, look_every=LOOK_EVERY)
        if shard:
            return
        if finish is not None:
            finish()
        loop.save_whole(module.state_dict(), path)
        state.state_path.unlink(missing_ok=True)
    module.load_state_dict(load_file(path))


def tokenizer(place: Place) -> CaptionTokenizer:
    """Write the tokenizer, or read the one that is there."""
    path = place.work / "sentencepiece.bpe.model"
    if not path.exists():
        build_tokenizer(path)
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

    name = "text_encoder"
    run_stage(name, model, partial(text_loss, model, tokenize, STAGES[name], scenes), place, normalise)
    return model.encoder


def judge(place: Place) -> Judge:
    """Train the judge; it is no part of the model and may see every scene."""
    torch.manual_seed(2)
    model = Judge()
    use_channels_last(model)
    run_stage("judge", model, partial(judge_loss, model, STAGES["judge"], all_scenes()), place)
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
        stage = STAGES[name]
        finish = normalise if stage.side == IMAGE_SIDE else None
        run_stage(name, model, partial(autoencoder_loss, model, stage, scenes, name), place, finish)
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
    name = "alignment"
    run_stage(name, encoder, partial(alignment_loss, encoder, tokenize, STAGES[name], training_scenes()), place)
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
    """Train the UNet, in as many processes as the stage has shards; this one is the first."""
    model = before(name, place)
    judge(place)
    fill_latent_cache(model.first_stage_model, place.work / "latents.safetensors")
    path = place.work / f"{name}.safetensors"
    if not path.exists():
        with tempfile.TemporaryDirectory() as folder:
            arguments = (name, place, Path(folder) / "processes")
            helpers = spawn(unet_helper, arguments, STAGES[name].shards - 1, join=False)  # type: ignore[no-untyped-call]
            try:
                unet_shard(0, *arguments)
            finally:
                helpers.join()
    model.load_state_dict(load_file(path))
    return model


def unet_helper(index: int, name: str, place: Place, meeting_point: Path) -> None:
    """A further process of the UNet's training."""
    with suppress(TrainingInterrupted):
        unet_shard(index + 1, name, place, meeting_point)


def unet_shard(shard: int, name: str, place: Place, meeting_point: Path) -> None:
    """Train the UNet on one shard of each step.

    Args:
        shard: Which one.
        name: Key of ``STAGES``.
        place: Where results and states lie.
        meeting_point: A file that does not exist yet, where the processes find each other.
    """
    stage = STAGES[name]
    # Small layers: processes with one thread each are faster than one process with many threads.
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // stage.shards))
    distributed.init_process_group("gloo", f"file://{meeting_point}", rank=shard, world_size=stage.shards)
    try:
        model, tokenize = before(name, place), tokenizer(place)
        latent_cache = fill_latent_cache(model.first_stage_model, place.work / "latents.safetensors")
        make_loss = partial(denoiser_loss, model, tokenize, latent_cache, cached_scenes(), stage, name)
        run_stage(name, model, make_loss, place, look=make_look(model, tokenize, judge(place)), shard=shard)
    finally:
        distributed.destroy_process_group()
        torch.set_num_threads(threads)


def export(place: Place) -> None:
    """Write the model folder, and the judge in the precision that the package carries."""
    write_model(refined(place), place)
    halves = {name: tensor.half() for name, tensor in judge(place).state_dict().items()}
    loop.save_whole(halves, place.work / "judge_half.safetensors")


def write_model(model: LatentDiffusion, place: Place) -> None:
    """Write weights (half precision; the noise schedule in float32), config, tokenizer, and the record of all three."""
    loop.save_whole(half_precision(model.state_dict()), place.out / "model.safetensors", {"format": "pt"})
    (place.out / "config.yaml").write_text(dump_config(model.config), encoding="utf-8")
    shutil.copyfile(place.work / "sentencepiece.bpe.model", place.out / "sentencepiece.bpe.model")
    (place.out / MANIFEST_NAME).unlink(missing_ok=True)
    record_missing(place.out)


def measure_all(place: Place) -> None:
    """Measure the written model in every language and draw its contact sheet."""
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
