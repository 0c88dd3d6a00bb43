"""What a finished recipe gives: two model folders, what they know, and how well they do it."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.checkpoint.saving import half_precision
from flagai_altdiff.hub import record_missing
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.accuracy import KINDS, Answers, as_table, measure, questions
from flagai_altdiff.mini.contact_sheet import contact_sheet, language_sheet
from flagai_altdiff.mini.judge import Judge
from flagai_altdiff.mini.pairs import measure_pairs, pair_questions
from flagai_altdiff.mini.recipe import parts
from flagai_altdiff.mini.recipe.parts import Place
from flagai_altdiff.mini.recipe.steps import save_whole
from flagai_altdiff.mini.things.catalogue import FILE, Thing, read_catalogue
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.registry import MODELS
from flagai_altdiff.training.processes import is_first

DRAWING, MATCHING = "AltDiffusion-mini", "AltCLIP-mini"
_TOKENIZER = "sentencepiece.bpe.model"
ON_THE_WAY, AT_THE_END = 20, 100
"""Prompts of each kind in each language, after every stage and for the finished model."""
_WAY = ("unet", "student", "alignment", "quality", "guidance")
_KINDS_ON_THE_WAY = ("ground", "unseen ground")
_SHEET_COLUMNS, _SHEET_THINGS = 8, 64
_SHOWN_IN_ALL = ("1f408", "1f355", "1f680", "1f388", "1f333", "1f697", "1f3b8", "1f419")
"""Cat, pizza, rocket, balloon, tree, car, guitar, octopus."""

logger = logging.getLogger(__name__)


def export(place: Place) -> None:
    """Write both model folders, ``things.json`` beside the weights, and the judge as the package carries it."""
    model, matching = parts.guidance(place), parts.student(place)
    halves = {name: tensor.half() for name, tensor in parts.judge(place).state_dict().items()}
    if not is_first():
        return
    drawing = place.out / DRAWING
    save_whole(half_precision(model.state_dict()), drawing / "model.safetensors", {"format": "pt"})
    (drawing / "config.yaml").write_text(dump_config(model.config), encoding="utf-8")
    shutil.copyfile(place.work / _TOKENIZER, drawing / _TOKENIZER)
    shutil.copyfile(place.data / FILE, drawing / FILE)
    with tempfile.TemporaryDirectory(dir=place.work) as scratch:
        made = Path(scratch) / MATCHING
        state = half_precision(matching.state_dict())
        altclip_folder.write(made, matching.config, state, [place.work / _TOKENIZER])
        shutil.copytree(made, place.out / MATCHING, dirs_exist_ok=True)
    for folder in (drawing, place.out / MATCHING):
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        record_missing(folder)
    save_whole(halves, place.work / "judge_half.safetensors")


def tables(place: Place) -> None:
    """Measure the model after each of its stages, in every language: a line for each of them."""
    makers = {
        "unet": parts.unet,
        "student": parts.with_student,
        "alignment": parts.alignment,
        "quality": parts.quality,
        "guidance": parts.guidance,
    }
    things = read_catalogue(place.data / FILE)
    for stage in _WAY:
        path = place.work / "tables" / f"{stage}.json"
        model = makers[stage](place)
        if not is_first() or path.exists():
            continue
        model.text_tokenizer, model.spec = parts.tokenizer(place).tokenizer, MODELS[DRAWING]
        answers = _answers(model.eval(), things, _KINDS_ON_THE_WAY, ON_THE_WAY, parts.judge(place))
        _write(path, answers)
        logger.info("after %s, in per cent:\n%s", stage, as_table(answers))


def measure_all(place: Place) -> None:
    """Measure the written model in every language, and draw its sheets."""
    if not is_first():
        return
    model = load_path(place.out / DRAWING, MODELS[DRAWING])
    things = read_catalogue(place.out / DRAWING / FILE)
    answers = _answers(model, things, tuple(KINDS), AT_THE_END, parts.judge(place))
    _write(place.work / "tables" / "model.json", answers)
    logger.info("in per cent:\n%s", as_table(answers))
    asked = [pair_questions(things, code, AT_THE_END) for code in LANGUAGES]
    drawn = torch.cat([measure_pairs(model, own, judge=parts.judge(place)) for own in asked]).float()
    both = drawn.prod(dim=1).mean()
    logger.info("of two things side by side %.1f %% are drawn, both %.1f %%", 100 * drawn.mean(), 100 * both)
    names = {thing.code: thing.names for thing in things}
    chosen = [one.prompt for one in questions("ground", things, "en", _SHEET_THINGS)]
    sheet = contact_sheet(model, chosen, columns=_SHEET_COLUMNS)
    sheet.quantize(255).save(place.out / DRAWING / "things.png", optimize=True)
    prompts = {code: [names[thing][code] for thing in _SHOWN_IN_ALL] for code in LANGUAGES}
    language_sheet(model, prompts).quantize(255).save(place.out / DRAWING / "languages.png", optimize=True)


def _answers(
    model: LatentDiffusion, things: Sequence[Thing], kinds: Sequence[str], count: int, judge: Judge
) -> list[Answers]:
    asked = {(kind, code): questions(kind, things, code, count) for kind in kinds for code in LANGUAGES}
    return [
        Answers(kind=kind, language=code, right=measure(model, own, judge=judge))
        for (kind, code), own in asked.items()
        if own
    ]


def _write(path: Path, answers: Sequence[Answers]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"kind": one.kind, "language": one.language, "asked": name, **asdict(share)}
        for one in answers
        for name, share in one.shares().items()
    ]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
