"""What a finished recipe gives: two model folders, what they know, and how well they do it."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.checkpoint import altclip_folder
from flagai_altdiff.checkpoint.ldm_yaml import dump_config
from flagai_altdiff.checkpoint.saving import half_precision
from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.files import new_file
from flagai_altdiff.hub import record_missing
from flagai_altdiff.hub.names import MANIFEST_NAME
from flagai_altdiff.loading import load_path
from flagai_altdiff.mini.accuracy import KINDS, Answers, as_table, measure, questions
from flagai_altdiff.mini.contact_sheet import contact_sheet, language_sheet
from flagai_altdiff.mini.pairs import measure_pairs, pair_questions
from flagai_altdiff.mini.recipe import parts
from flagai_altdiff.mini.recipe.parts import Place
from flagai_altdiff.mini.recipe.steps import save_whole
from flagai_altdiff.mini.things.catalogue import FILE, read_catalogue
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.registry import MODELS
from flagai_altdiff.training.processes import is_first, number, started, wait_until

DRAWING, MATCHING = "AltDiffusion-mini", "AltCLIP-mini"
_TOKENIZER = "sentencepiece.bpe.model"
ON_THE_WAY, AT_THE_END, NAMES_AT_THE_END = 20, 60, 200
"""Prompts of each kind in each language, after every stage and for the finished model; of its names there are more."""
_WRITTEN = "written"
"""File that says from which weights the folders were made."""
_KINDS_ON_THE_WAY = ("ground", "unseen ground")
_SHEET_COLUMNS, _SHEET_THINGS = 8, 64
_SHOWN_IN_ALL = ("1f408", "1f355", "1f680", "1f388", "1f333", "1f697", "1f3b8", "1f419")
"""Cat, pizza, rocket, balloon, tree, car, guitar, octopus."""

logger = logging.getLogger(__name__)


def export(place: Place) -> None:
    """Write both model folders, ``things.json`` beside the weights, and the judge as the package carries it.

    One process writes, the others wait until it has.
    """
    model, matching = parts.guidance(place), parts.polish(place)
    model.cond_stage_model.load_state_dict(matching.text_model.state_dict())
    halves = {name: tensor.half() for name, tensor in parts.judge(place).state_dict().items()}
    mark, made_of = place.work / _WRITTEN, fingerprint(model)
    if not is_first():
        wait_until(lambda: mark.exists() and mark.read_text(encoding="utf-8") == made_of)
        return
    mark.unlink(missing_ok=True)
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
    with new_file(mark, replace=True) as unfinished:
        unfinished.write_text(made_of, encoding="utf-8")


def tables(place: Place) -> None:
    """Measure the model after each of its stages, in every language: a line for each of them."""
    makers = {
        "unet": parts.unet,
        "student": parts.with_student,
        "alignment": parts.alignment,
        "quality": parts.quality,
        "guidance": parts.guidance,
    }
    for stage, maker in makers.items():
        model = maker(place)
        model.text_tokenizer, model.spec = parts.tokenizer(place).tokenizer, MODELS[DRAWING]
        asked = {(kind, code): ON_THE_WAY for kind in _KINDS_ON_THE_WAY for code in LANGUAGES}
        _report(place, stage, model.eval(), asked)


def measure_all(place: Place) -> None:
    """Measure the written model in every language, and draw its sheets."""
    model = load_path(place.out / DRAWING, MODELS[DRAWING])
    counts = {kind: NAMES_AT_THE_END if kind == "name" else AT_THE_END for kind in KINDS}
    _report(place, "model", model, {(kind, code): count for kind, count in counts.items() for code in LANGUAGES})
    things = read_catalogue(place.out / DRAWING / FILE)

    def pairs(code: str) -> Mapping[str, Tensor]:
        each = measure_pairs(model, pair_questions(things, code, AT_THE_END), judge=parts.judge(place))
        return {"each": each.flatten(), "both": each.all(dim=1)}

    found = _shared(place.work / "tables" / f"pairs-{fingerprint(model)[:8]}", list(LANGUAGES), pairs)
    if not is_first():
        return
    shares = {name: torch.cat([right[name] for right in found]).float().mean() for name in ("each", "both")}
    logger.info("of two things side by side %.3f are drawn, both %.3f", shares["each"], shares["both"])
    names = {thing.code: thing.names for thing in things}
    chosen = [one.prompt for one in questions("ground", things, "en", _SHEET_THINGS)]
    sheet = contact_sheet(model, chosen, columns=_SHEET_COLUMNS)
    sheet.save(place.out / DRAWING / "things.png", optimize=True)
    prompts = {code: [names[thing][code] for thing in _SHOWN_IN_ALL] for code in LANGUAGES}
    language_sheet(model, prompts).save(place.out / DRAWING / "languages.png", optimize=True)


def _report(place: Place, name: str, model: LatentDiffusion, asked: Mapping[tuple[str, str], int]) -> None:
    """Ask a model so many questions of kinds and in languages; the answers go into a file and a table of the log."""
    things = read_catalogue(place.data / FILE)

    def answer(pair: tuple[str, str]) -> Mapping[str, Tensor]:
        own = questions(pair[0], things, pair[1], asked[pair])
        return measure(model, own, judge=parts.judge(place)) if own else {}

    pairs = list(asked)
    folder = place.work / "tables" / f"{name}-{fingerprint(model)[:8]}"
    found = zip(pairs, _shared(folder, pairs, answer), strict=True)
    answers = [Answers(kind=kind, language=code, right=right) for (kind, code), right in found if right]
    if is_first():
        _write(place.work / "tables" / f"{name}.json", answers)
        logger.info("%s, in per cent:\n%s", name, as_table(answers))


def _shared(
    folder: Path, keys: Sequence[Any], measured: Callable[[Any], Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """What is measured for each key; the processes share the work, and what a run has of it is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{key if isinstance(key, str) else ' '.join(key)}.json" for key in keys]
    for key, file in list(zip(keys, files, strict=True))[number() :: started() or 1]:
        if not file.exists():
            right = {name: values.tolist() for name, values in measured(key).items()}
            with new_file(file, replace=True) as unfinished:
                unfinished.write_text(json.dumps(right), encoding="utf-8")
    wait_until(lambda: all(file.exists() for file in files))
    texts = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return [{name: torch.tensor(values) for name, values in right.items()} for right in texts]


def _write(path: Path, answers: Sequence[Answers]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"kind": one.kind, "language": one.language, "asked": name, **asdict(share)}
        for one in answers
        for name, share in one.shares().items()
    ]
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
