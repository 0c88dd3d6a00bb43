"""Four things, as the packages have them: drawings of a few strokes, names in all languages."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from flagai_altdiff.mini.things.packages import FLAT, FURTHER_NAMES, NAMES, NOTO, PACKAGES, SOLID, Package
from flagai_altdiff.mini.vocabulary import LANGUAGES

CODES = ("1f408", "1f355", "1f680", "2615")
WORDS = {"1f408": "cat", "1f355": "pizza", "1f680": "rocket", "2615": "hot beverage"}
COLOURS = {"1f408": "#e0a020", "1f355": "#c03020", "1f680": "#4060e0", "2615": "#704020"}
OWN_WORDS = 8


def pack(path: Path, files: Mapping[str, bytes]) -> None:
    """An archive as npm makes them."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def names(language: str, codes: tuple[str, ...]) -> dict[str, Any]:
    """CLDR's records: a name, and keywords of which the first belongs to all of them."""
    return {
        "".join(chr(int(part, 16)) for part in code.split("-")): {
            "tts": [f"{WORDS[code]} {language}"],
            "default": ["drawing", WORDS[code], *(f"{WORDS[code]}{number}{language}" for number in range(OWN_WORDS))],
        }
        for code in codes
    }


def make_archives(folder: Path) -> dict[Package, Path]:
    """All packages with nothing but these things in them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {package: folder / package.archive for package in PACKAGES}
    solid = {}
    for code in CODES:
        image = Image.new("RGBA", (64, 64))
        ImageDraw.Draw(image).ellipse((12, 4, 52, 60), fill=COLOURS[code])
        data = io.BytesIO()
        image.save(data, "WEBP", lossless=True)
        solid[f"assets/{code}{'-fe0f' if code == '2615' else ''}.webp"] = data.getvalue()
    pack(paths[SOLID], solid)
    for package, body in (
        (FLAT, '<rect x="2" y="4" width="12" height="8" fill="{}"/>'),
        (NOTO, '<path d="M1 15 8 1 15 15" fill="{}"/>'),
    ):
        icons: dict[str, Any] = {
            "icons": {WORDS[code]: {"body": body.format(COLOURS[code])} for code in CODES[:-1]},
            "width": 16,
            "height": 16,
        }
        icons["icons"]["cup"] = {"body": body.format(COLOURS["2615"])}
        icons["aliases"] = {WORDS["2615"]: {"parent": "cup"}}
        pack(
            paths[package],
            {
                "icons.json": json.dumps(icons).encode(),
                "chars.json": json.dumps({code: WORDS[code] for code in CODES}).encode(),
            },
        )
    for package, place, codes in ((NAMES, "annotations", CODES[:3]), (FURTHER_NAMES, "annotationsDerived", CODES[3:])):
        files = {}
        for language in LANGUAGES:
            record = {place: {"annotations": names(language, codes)}}
            files[f"{place}/{language}/annotations.json"] = json.dumps(record).encode()
        pack(paths[package], files)
    return paths
