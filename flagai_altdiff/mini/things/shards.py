"""Things as training data: webdataset shards with a phrase in each language, and what they are in figures."""

from __future__ import annotations

import io
import json
import logging
import random
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flagai_altdiff.errors import DataError
from flagai_altdiff.files import new_file
from flagai_altdiff.mini.captions import random_caption
from flagai_altdiff.mini.drawing import draw
from flagai_altdiff.mini.things.catalogue import FILE, Thing, make_catalogue, write_catalogue
from flagai_altdiff.mini.things.composing import ThingScene, compose, random_scene
from flagai_altdiff.mini.things.packages import PACKAGES, fetch
from flagai_altdiff.mini.things.phrases import random_phrase
from flagai_altdiff.mini.things.sprites import STYLES, make_sprites
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import Scene, draw_scenes, training_scenes
from flagai_altdiff.progress import bar_class, show_bars

logger = logging.getLogger(__name__)

ARCHIVES, AMOUNT, REPORT = "packages", "amount.json", "report.json"
PER_SHARD = 2048
SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is written.

    Args:
        renders: Images of each thing.
        shapes: Images of drawn shapes, as a share of all.
        seed: Of all choices.
    """

    renders: int = 32
    shapes: float = 0.1
    seed: int = 0


def write_things(out: Path, amount: Amount | None = None) -> dict[str, Any]:
    """Fetch the packages, and write shards, ``things.json`` and ``report.json``.

    Args:
        out: The folder; packages that lie in its ``packages/`` are taken.
        amount: How much.

    Returns:
        What the report says.

    Raises:
        DataError: A package cannot be had, or is another one; or the folder holds what was written with other numbers.
        MissingDependencyError: npm or resvg-py is missing.
        OSError: The disk refuses.
    """
    amount = amount or Amount()
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, amount)
    archives = fetch(out / ARCHIVES)
    things = make_catalogue(archives)
    write_catalogue(things, out / FILE)
    sprites = make_sprites(archives, [thing.code for thing in things])
    scenes = choose_scenes(things, amount)
    for first in bar_class()(range(0, len(scenes), PER_SHARD), desc="shards", unit="shard", disable=not show_bars()):
        path = out / f"{first // PER_SHARD:05d}.tar"
        if not path.is_file():
            _write_shard(path, first, scenes[first : first + PER_SHARD], things, sprites, amount.seed)
    report = _report(things, scenes)
    with new_file(out / REPORT, replace=True) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return report


def _claim(out: Path, amount: Amount) -> None:
    """Write down how much a folder will hold, so that a run goes on with its own shards and no others."""
    path, wanted = out / AMOUNT, asdict(amount)
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        raise DataError(f"{out} holds images made with {found}, not {wanted}: take another folder, or empty this one.")
    with new_file(path, replace=True) as unfinished:
        unfinished.write_text(json.dumps(wanted), encoding="utf-8")


def choose_scenes(things: Sequence[Thing], amount: Amount) -> list[ThingScene | Scene]:
    """What is composed or drawn, in the order of the shards; none of it is held out."""
    rng = random.Random(f"things:{amount.seed}")
    scenes: list[ThingScene | Scene] = [random_scene(t.code, rng) for t in things for _ in range(amount.renders)]
    shapes = round(len(scenes) * amount.shapes / (1 - amount.shapes))
    scenes += draw_scenes(training_scenes(), shapes, rng)
    rng.shuffle(scenes)
    return scenes


def _write_shard(
    path: Path,
    first: int,
    scenes: Sequence[ThingScene | Scene],
    things: Sequence[Thing],
    sprites: Mapping[tuple[str, str], Image.Image],
    seed: int,
) -> None:
    by_code = {thing.code: thing for thing in things}
    with new_file(path) as unfinished, tarfile.open(unfinished, "w") as tar:
        for number, scene in enumerate(scenes, first):
            rng = random.Random(f"thing:{seed}:{number}")
            image, texts = _example(scene, by_code, sprites, rng)
            picture = io.BytesIO()
            image.save(picture, "PNG")
            about = {"captions": texts, **asdict(scene)}
            for ending, data in (("png", picture.getvalue()), ("json", json.dumps(about, ensure_ascii=False).encode())):
                member = tarfile.TarInfo(f"{number:07d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _example(
    scene: ThingScene | Scene,
    things: Mapping[str, Thing],
    sprites: Mapping[tuple[str, str], Image.Image],
    rng: random.Random,
) -> tuple[Image.Image, dict[str, str]]:
    if isinstance(scene, Scene):
        texts = {language: random_caption(scene, language, rng) for language in LANGUAGES}
        return Image.fromarray(draw(scene, rng, side=SIDE)), texts
    texts = {language: random_phrase(scene, things[scene.code], language, rng) for language in LANGUAGES}
    return Image.fromarray(compose(sprites[scene.code, scene.style], scene, rng, side=SIDE)), texts


def _report(things: Sequence[Thing], scenes: Sequence[ThingScene | Scene]) -> dict[str, Any]:
    own = [scene for scene in scenes if isinstance(scene, ThingScene)]
    return {
        "packages": {f"{package.name} {package.version}": package.about for package in PACKAGES},
        "images": len(scenes),
        "things": len(things),
        "groups": Counter(thing.group for thing in things),
        "styles": {style: sum(scene.style == style for scene in own) for style in STYLES},
        "grounds": Counter(scene.background for scene in own),
        "shapes": len(scenes) - len(own),
        "further words": {code: sum(len(thing.words[code]) for thing in things) for code in LANGUAGES},
        "words shared": {code: sum(len(thing.shared_words[code]) for thing in things) for code in LANGUAGES},
        "words held out": {code: sum(len(thing.unseen_words[code]) for thing in things) for code in LANGUAGES},
    }
