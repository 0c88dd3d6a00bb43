"""A whole run: stage after stage, each from the model that the one before gave, with sheets and a chart on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

from torch import Tensor

from flagai_altdiff.charts import Curve, draw_curves
from flagai_altdiff.checkpoint import altclip_folder, saving
from flagai_altdiff.decoding import SUFFIXES
from flagai_altdiff.errors import (
    BrokenExampleError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    InvalidRequestError,
    printable,
)
from flagai_altdiff.files import new_file
from flagai_altdiff.loading import load_model
from flagai_altdiff.lora import finished, make_trainable, save_lora
from flagai_altdiff.matching import load_matching_model
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.pipeline import generate
from flagai_altdiff.request import GenerationRequest
from flagai_altdiff.sheets import Row, make_sheet
from flagai_altdiff.training.cache import Cache
from flagai_altdiff.training.callbacks import read_log
from flagai_altdiff.training.config import DataConfig, SheetConfig, StageConfig, StageSettings, TrainConfig
from flagai_altdiff.training.data.batches import Batches, Share, batches
from flagai_altdiff.training.data.example import Examples
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.parallel import ENGLISH, WithEnglish, english
from flagai_altdiff.training.data.preparation import Preparation
from flagai_altdiff.training.data.prior import WithPrior
from flagai_altdiff.training.data.source import Reading
from flagai_altdiff.training.module import Load, StageTraining, trainable_names
from flagai_altdiff.training.objectives import (
    Batch,
    ContrastiveTuning,
    Denoising,
    Objective,
    TeacherLearning,
    text_learns,
)
from flagai_altdiff.training.processes import check_started, is_first, meet, wait_until
from flagai_altdiff.training.randomness import generator
from flagai_altdiff.training.run import event_log, fit
from flagai_altdiff.training.stages import STAGES
from flagai_altdiff.training.teacher import Teacher, load_teacher, new_student

logger = logging.getLogger(__name__)

MODEL, LORA, SHEET, CACHE = "model", "lora.safetensors", "sheet.png", "cache"
LOG, CHART = "log.csv", "log.png"
_SHEET_SIDE, _SHEET_PROMPTS = 128, 6


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Carry out a run.

    Args:
        config: What to do.
        resume: Go on with what lies in ``config.output``; without it, that folder must be new or empty.

    Returns:
        Folder of the model that the last stage gave; it opens with ``load_model``, ``AutoLoader`` and ``convert``.

    Raises:
        InvalidRequestError: There is a run in ``config.output``, or data and stage do not fit.
        ConfigError: The stages do not follow on each other, or are not for this machine.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
        NotFiniteError: The loss is no number any more.
        DataError: The data cannot be read.
        DiskError: A state cannot be saved.
        MissingDependencyError: TensorBoard is wanted, but not installed.
    """
    check_started(config.machine.devices, config.machine.nodes, "machine: ")
    output = config.output
    if output.exists() and not output.is_dir():
        raise InvalidRequestError("output", str(output), "it is a file; name a folder")
    if not resume and output.is_dir() and any(output.iterdir()) and is_first():
        raise InvalidRequestError("output", str(output), "it holds a run; add --resume, or name another folder")
    if resume and not output.exists() and is_first():
        logger.warning("no run lies in %s: it begins anew", printable(str(output)))
    kinds = {STAGES[stage.stage].kind == "diffusion" for stage in config.stages}
    if len(kinds) > 1:
        raise ConfigError(
            "stages that learn to match and stages that learn to draw are two runs, of two kinds of model."
        )
    if config.tensorboard:
        event_log(output)  # that it is missing is told now
    model: str | Path = config.model
    for number, stage in enumerate(config.stages, 1):
        folder = output / f"{number}-{stage.stage}"
        if not (folder / MODEL).is_dir():
            logger.info("stage %d of %d: %s", number, len(config.stages), STAGES[stage.stage].help)
            (_draw_stage if STAGES[stage.stage].kind == "diffusion" else _match_stage)(config, stage, model, folder)
        model = folder / MODEL
    return Path(model)


def _draw_stage(config: TrainConfig, stage: StageConfig, start: str | Path, folder: Path) -> None:
    """A stage of a model that draws."""
    model = load_model(start, safety_checker=False, memory="normal")
    spec, tokenizer = model.spec, model.text_tokenizer
    settings = stage.settings(model.config.image_size * model.config.first_stage.downsampling)
    for later in config.stages:
        _check(config, later.settings(model.config.image_size * model.config.first_stage.downsampling), model)
    data = config.data
    if data.prior:
        _draw_prior(model, data, settings.side)
    if settings.row.rank:
        numbers = generator(config.seed, "lora")
        make_trainable(model, rank=settings.row.rank, alpha=float(settings.row.rank), generator=numbers)
    examples = _examples(data, settings.side)
    objective = Denoising(model, settings, config.seed)
    prompts = list(config.sheets.prompts) or _first_captions(examples)
    steps = config.sheets.steps or min(spec.steps, 25)
    load = _load_cached(config, settings, examples, model) if data.cache else _load_images(config, settings, examples)

    def sheet(step: int) -> None:
        _draw_sheet(model, prompts, folder / "sheets" / f"step-{step:08d}.png", config.sheets, settings.side, steps)

    _fit(config, settings, objective, load, examples, folder, sheet)
    if is_first():
        with _writing(folder):
            if settings.row.rank:
                additions, about = finished(model, merge=True), {"ss_base_model": str(start)}
                save_lora(folder / LORA, additions, model.config, **about, ss_steps=str(settings.row.steps))
            saving.save_folder(
                folder / MODEL, model.config, model.state_dict(), *(tokenizer.files if tokenizer else ())
            )
            _draw_sheet(model, prompts, folder / SHEET, config.sheets, settings.side, steps)
    meet()


def _check(config: TrainConfig, settings: StageSettings, model: LatentDiffusion) -> None:
    """Refuse what would fail later, or not do what it says."""
    unit = model.config.first_stage.downsampling * 2 ** (len(model.config.unet.channel_mult) - 1)
    if settings.side % unit:
        raise InvalidRequestError("side", settings.side, f"expected a multiple of {unit} px, for this model")
    _check_batch(settings)
    if not settings.row.rank:
        trainable_names(model, settings.pattern)
    data = config.data
    if data.cache and (data.crop == "random" or data.flip):
        raise ConfigError("data.cache keeps one latent of each image: it needs data.crop: centre and data.flip: false.")
    if data.cache and text_learns(settings):
        raise ConfigError("data.cache keeps the text encoder's states, which change in a stage that trains it.")
    if data.prior and not any(_classes(data)):
        raise ConfigError("data.prior needs data.prior_caption: the class of the thing, as in 'a cat'.")


def _check_batch(settings: StageSettings) -> None:
    if settings.row.batch_size < settings.accumulate:
        expected = f"expected at least accumulate, which is {settings.accumulate}"
        raise InvalidRequestError("batch_size", settings.row.batch_size, expected)


def _match_stage(config: TrainConfig, stage: StageConfig, start: str | Path, folder: Path) -> None:
    """A stage of a model that matches."""
    for later in config.stages:
        _check_batch(later.settings(1))
    row = STAGES[stage.stage]
    if row.kind == "teacher":
        if config.teacher is None:
            raise ConfigError("the teacher stage needs a teacher: the folder of a CLIP model of transformers.")
        teacher = load_teacher(Path(config.teacher))
        fresh = config.student is not None and start == config.model
        numbers = generator(config.seed, "projection")
        model = new_student(teacher, Path(config.student or ""), numbers) if fresh else load_matching_model(start)
        widths = teacher.teach([""]).shape[-1], model.config.text.project_dim
        if widths[0] != widths[1]:
            raise ConfigError(f"the teacher's feature has {widths[0]} numbers, that of {start} has {widths[1]}.")
        settings = stage.settings(model.config.vision.image_size)
        objective: Objective = TeacherLearning(model, partial(_teach, teacher, model), settings)
        examples = _texts(config.data)
        load = _load_texts(config, settings, examples)
    else:
        model = load_matching_model(start)
        settings = replace(stage.settings(model.config.vision.image_size), side=model.config.vision.image_size)
        objective = ContrastiveTuning(model)
        examples = _examples(config.data, settings.side)
        load = _load_images(config, settings, examples)
    _fit(config, settings, objective, load, examples, folder, None)
    if is_first():
        assert isinstance(model, AltCLIP)
        assert model.text_tokenizer is not None
        with _writing(folder):
            altclip_folder.write(folder / MODEL, model.config, model.state_dict(), model.text_tokenizer.files)
    meet()


def _teach(teacher: Teacher, model: AltCLIP, texts: list[str]) -> Tensor:
    """Where the model is by then."""
    teacher.model.to(model.device)  # type: ignore[arg-type]
    return teacher.teach(texts)


def _fit(
    config: TrainConfig,
    settings: StageSettings,
    objective: Objective,
    load: Load,
    examples: Examples,
    folder: Path,
    sheet: Callable[[int], None] | None,
) -> None:
    """Train to the end, take the averaged weights, draw the chart."""
    training = StageTraining(objective, settings, load, examples.layout.digest)

    def averaged_sheet(step: int) -> None:
        assert sheet is not None
        with training.averaged():
            if is_first():
                with _writing(folder):
                    sheet(step)

    fit(
        training,
        folder,
        save_every=config.save_every,
        machine=config.machine,
        sheet_every=config.sheets.every if sheet else 0,
        draw_sheet=averaged_sheet,
        tensorboard=config.tensorboard,
    )
    training.take_average()
    training.model.cpu().eval()
    if is_first():
        with _writing(folder):
            _draw_chart(folder)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Say of a disk that fails what to do; the stage's last state is there."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        cause = error.__cause__ if isinstance(error, CheckpointError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        text = f"{folder} cannot be written: {reason}. The states are whole; make room and go on with --resume."
        raise DiskError(text, getattr(cause, "errno", None)) from error


def _examples(data: DataConfig, side: int) -> Examples:
    examples = _opened(data, data.languages, at_least=side)
    if not data.prior:
        return examples
    return WithPrior(examples, open_examples(data.prior, Reading(at_least=side, caption=_classes(data)[0])))


def _opened(data: DataConfig, languages: tuple[str, ...], at_least: int | None = None) -> Examples:
    filters = Filters(
        languages=languages,
        min_side=data.min_side,
        min_score=data.min_aesthetic,
        min_text=data.min_text,
        max_text=data.max_text,
    )
    how = Reading(
        filters=filters,
        at_least=at_least,
        caption=data.caption,
        skip_shards=data.skip_shards,
        cache=data.fetched,
    )
    try:
        return open_examples(data.source if isinstance(data.source, str) else list(data.source), how)
    except DataError as error:
        raise DataError(f"data.source: {error}") from error


def _load_images(config: TrainConfig, settings: StageSettings, examples: Examples) -> Load:
    data = config.data
    prepare = Preparation(side=settings.side, crop=data.crop, flip=data.flip)

    def load(first: int, rank: int, world: int) -> Batches:
        share = _share(settings, examples, rank, world)
        return batches(examples, share, prepare, seed=config.seed, start=first, workers=data.workers)

    return load


def _load_cached(config: TrainConfig, settings: StageSettings, examples: Examples, model: LatentDiffusion) -> Load:
    data = config.data
    prepare = Preparation(side=settings.side, crop="centre")
    about = repr(replace(data, workers=0, fetched=None))
    cache = Cache(config.output / CACHE, model, examples, prepare, about=about)

    def load(first: int, rank: int, world: int) -> Iterable[Batch]:
        cache.fill(rank, world, workers=data.workers)
        return cache.batches(_share(settings, examples, rank, world), seed=config.seed, start=first)

    return load


def _texts(data: DataConfig) -> Examples:
    return WithEnglish(_opened(data, data.languages and tuple(dict.fromkeys((*data.languages, ENGLISH)))))


def _load_texts(config: TrainConfig, settings: StageSettings, examples: Examples) -> Load:
    def load(first: int, rank: int, world: int) -> Iterable[Batch]:
        share = _share(settings, examples, rank, world)
        for batch in batches(examples, share, None, seed=config.seed, start=first, workers=config.data.workers):
            yield {**batch, "english": [english(captions) for captions in batch["captions"]]}

    return load


def _share(settings: StageSettings, examples: Examples, rank: int, world: int) -> Share:
    return Share(
        count=len(examples), batch_size=settings.row.batch_size, rank=rank, world=world, parts=settings.accumulate
    )


def _classes(data: DataConfig) -> tuple[str, ...]:
    """What the images of the prior show."""
    return (data.prior_caption,) if isinstance(data.prior_caption, str) else data.prior_caption or ("",)


def _draw_prior(model: LatentDiffusion, data: DataConfig, side: int) -> None:
    """Draw what the model knows of a class, unless somebody has put images there; what is drawn already stays."""
    assert data.prior is not None
    folder = Path(data.prior)
    targets = [folder / f"{number:05d}.png" for number in range(data.prior_count)]
    names = {target.name for target in targets}
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if any(name.lower().endswith(SUFFIXES) for name in there - names):
        return
    if not is_first():
        wait_until(lambda: all(target.exists() for target in targets))
        return
    folder.mkdir(parents=True, exist_ok=True)
    logger.info("drawing %d images of what the model knows into %s", len(targets), printable(str(folder)))
    for number, (target, caption) in enumerate(zip(targets, cycle(_classes(data)), strict=False)):
        if not target.exists():
            image = generate(model, caption, seed=number, height=side, width=side).images[0]
            with new_file(target.with_suffix(".txt"), replace=True) as unfinished:
                unfinished.write_text(caption, encoding="utf-8")
            with new_file(target, replace=True) as unfinished:  # another run may draw the same ones
                image.save(unfinished, "PNG")


def _first_captions(examples: Examples) -> list[str]:
    found = dict[str, None]()
    for index in range(min(len(examples), 10 * _SHEET_PROMPTS)):
        try:
            found[examples[index].captions[0].text] = None
        except BrokenExampleError:
            continue
        if len(found) == _SHEET_PROMPTS:
            break
    return list(found)


def _draw_sheet(
    model: LatentDiffusion, prompts: Sequence[str], path: Path, config: SheetConfig, side: int, steps: int
) -> None:
    """What the model draws, at the size at which it learns; no sheet where nothing is asked for."""
    if not prompts:
        return
    request = GenerationRequest(
        prompts=tuple(prompts),
        seed=config.seed,
        seed_mode="batch",
        batch_size=1,
        steps=steps,
        height=side,
        width=side,
    )
    images = generate(model, request).images
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, replace=True) as unfinished:
        make_sheet([Row(label="", images=images)], max(_SHEET_SIDE, min(images[0].size))).save(unfinished, "PNG")


def _draw_chart(folder: Path) -> None:
    rows = read_log(folder / LOG)
    steps = [row["step"] for row in rows]
    names = {"loss": "loss", "learning_rate": "learning rate", "samples_per_second": "samples per second"}
    curves = [
        Curve(title=title, x=steps, y=[row[name] for row in rows], smooth=name != "learning_rate")
        for name, title in names.items()
    ]
    with new_file(folder / CHART, replace=True) as unfinished:
        draw_curves(curves).save(unfinished, "PNG")
