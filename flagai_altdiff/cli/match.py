"""``altdiff match``."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flagai_altdiff.cli.common import add_model_dir, check_sheet, fail, write_sheet
from flagai_altdiff.errors import printable

if TYPE_CHECKING:
    from torch import Tensor

_TEXT_COLUMNS = 36
_SHEET_SIDE, _SHEET_COLUMNS = 128, 12


def add_match(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``match``."""
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="TEXT",
        help="texts in any language of the model, then -- and the files of the images: 'a dog' 'a cat' -- *.png",
    )
    add(
        "-m",
        "--model",
        default="AltCLIP-mini",
        help="a matching model's name or folder (default: %(default)s, which knows what AltDiffusion-mini draws; "
        "for photographs take AltCLIP-XLMR-L-m9)",
    )
    add_model_dir(parser)
    add("--json", action="store_true", help="print the similarities as JSON")
    add(
        "--sheet",
        type=Path,
        metavar="FILE",
        help="contact sheet to write, each text's images from the best fit on (default: a new match-0000.png)",
    )
    add("--no-sheet", action="store_true", help="write no contact sheet")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: cuda if there is one, else cpu)")
    parser.set_defaults(run=_match, behind=[])


def _match(args: argparse.Namespace) -> int:
    texts, files = _told_apart(args.words, args.behind)
    if not texts or not files:
        lacking = "no text" if not texts else "no image"
        return fail(
            f"{lacking}: type the texts, then -- and the files, as in: altdiff match 'a dog' 'a cat' -- *.png", 2
        )
    check_sheet(args.sheet)
    import torch

    from flagai_altdiff.decoding import check_image, open_image
    from flagai_altdiff.matching import load_matching_model, match
    from flagai_altdiff.progress import bar_class, show_bars

    for file in files:  # before the model, which takes seconds to load
        check_image(file)
    print(f"loading {args.model}", file=sys.stderr)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_matching_model(args.model, args.model_dir, device=device, mapped=True)
    with bar_class()(files, desc="images", unit="image", disable=not show_bars()) as bar:
        similarities = match(model, texts, map(open_image, bar))
    if args.json:
        found = {"texts": texts, "images": [str(file) for file in files], "similarities": similarities.tolist()}
        print(json.dumps(found, ensure_ascii=False, indent=2))
    else:
        _print_table(texts, files, similarities)
    if not args.no_sheet:
        print(_write_sheet(args.sheet, texts, files, similarities), file=sys.stderr)
    return 0


def _told_apart(words: Sequence[str], behind: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Texts and files: what stands behind ``--`` are files; without it, what is called like an image and is a file."""
    if behind:
        return list(words), [Path(word) for word in behind]
    from flagai_altdiff.decoding import SUFFIXES

    files = [word for word in words if word.lower().endswith(SUFFIXES)]
    return [word for word in words if word not in files], [Path(word) for word in files]


def _print_table(texts: Sequence[str], files: Sequence[Path], similarities: Tensor) -> None:
    """One line for each image, one column for each text; the best text of each image is marked."""
    for i, text in enumerate(texts, 1):
        print(f"{i:>3}  {printable(text)}")
    width = min(max(_columns(str(file)) for file in files), _TEXT_COLUMNS)
    print(" " * width, *(f"{i:>8}" for i in range(1, len(texts) + 1)))
    for file, column in zip(files, similarities.T.tolist(), strict=True):
        name = printable(str(file))
        shown = name if _columns(name) <= width else "…" + name[-(width - 1) :]
        best = max(column)
        cells = (f"{value:>7.3f}{'*' if value == best and len(texts) > 1 else ' '}" for value in column)
        print(shown + " " * (width - _columns(shown)), *cells)


def _columns(text: str) -> int:
    """How wide a terminal shows a text."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def _write_sheet(path: Path | None, texts: Sequence[str], files: Sequence[Path], similarities: Tensor) -> Path:
    from flagai_altdiff.decoding import open_image
    from flagai_altdiff.images import NumberedFolder
    from flagai_altdiff.sheets import Row, make_sheet, shrunk

    rows = []
    for number, row in enumerate(similarities, 1):
        order = row.argsort(descending=True, stable=True).tolist()[:_SHEET_COLUMNS]
        captions = [f"{row[i]:.3f}" for i in order]
        images = [shrunk(open_image(files[i]), _SHEET_SIDE) for i in order]
        rows.append(Row(label=str(number), images=images, captions=captions))
    sheet = make_sheet(rows, _SHEET_SIDE)
    if path is None:
        return NumberedFolder(Path(), "match-%04d.png").save(sheet, {"texts": "\n".join(texts)})
    write_sheet(path, sheet)
    return path
