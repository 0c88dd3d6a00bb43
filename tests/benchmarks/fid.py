"""FID of the embedded model: the same scenes asked for in 18 languages, against fresh renders of others.

``make bench-fid``; ``altdiff evaluate`` keeps what is finished, so that it can be interrupted.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from PIL import Image

from flagai_altdiff.cli import main as altdiff
from flagai_altdiff.mini.things.catalogue import known_things
from flagai_altdiff.mini.things.composing import ThingScene, compose, random_scene
from flagai_altdiff.mini.things.packages import fetch
from flagai_altdiff.mini.things.phrases import random_phrase
from flagai_altdiff.mini.things.sprites import make_sprites
from flagai_altdiff.mini.vocabulary import LANGUAGES


def scenes(count: int, seed: str) -> list[ThingScene]:
    """Every thing as often as every other, in a random order, also as training never shows it."""
    rng, things = random.Random(seed), known_things()
    codes = [things[number % len(things)].code for number in range(count)]
    rng.shuffle(codes)
    return [random_scene(code, rng, held_out=True) for code in codes]


def write_prompts(folder: Path, count: int) -> None:
    """The scenes in words: a file for each language, a scene on each line."""
    folder.mkdir(parents=True, exist_ok=True)
    by_code, asked = {thing.code: thing for thing in known_things()}, scenes(count, "asked for")
    for language in LANGUAGES:
        rng = random.Random(f"words:{language}")
        lines = [random_phrase(scene, by_code[scene.code], language, rng) for scene in asked]
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_renders(folder: Path, packages: Path, count: int) -> None:
    """Pictures of other scenes of the same kind, as the data are made."""
    folder.mkdir(parents=True, exist_ok=True)
    sprites, rng = make_sprites(fetch(packages), [thing.code for thing in known_things()]), random.Random("renders")
    for number, scene in enumerate(scenes(count, "rendered")):
        image = Image.fromarray(compose(sprites[scene.code, scene.style], scene, rng))
        image.save(folder / f"{number:05d}.png")


def main() -> int:
    """Write both, then let ``altdiff evaluate`` draw and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/fid"), metavar="DIR")
    parser.add_argument("--images", type=int, default=5000, metavar="N", help="of each language (default: 5000)")
    parser.add_argument("--languages", default=",".join(LANGUAGES), metavar="LIST")
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), metavar="DIR")
    options = parser.parse_args()
    write_prompts(options.out / "prompts", options.images)
    if len([*(options.out / "renders").glob("*.png")]) < options.images:
        write_renders(options.out / "renders", options.packages, options.images)
    told = ["evaluate", "AltDiffusion-mini", "--prompts", str(options.out / "prompts"), "--steps", "20", "--scale", "2"]
    told += ["--pictures", str(options.out / "renders"), "--features", "AltCLIP-mini", "--languages", options.languages]
    return altdiff([*told, "--batch-size", "20", "-o", str(options.out / "result")])


if __name__ == "__main__":
    raise SystemExit(main())
