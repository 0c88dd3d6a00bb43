"""``altdiff data report`` and ``altdiff data things``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flagai_altdiff.cli.common import check_sheet, write_sheet
from flagai_altdiff.errors import printable

if TYPE_CHECKING:
    from flagai_altdiff.training.data.report import DataReport

_TILES, _COLUMNS = 48, 8
_BAR_COLUMNS = 40
_MOST = 20_000


def add_data(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``data``."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="say what is in training data",
        description="Read training data as training would, and say what is in them: languages, sizes, what is broken.",
    )
    add = report.add_argument
    add(
        "data",
        nargs="+",
        metavar="DATA",
        help="a folder of images with texts, metadata.jsonl, parquet files or shards; or shards as paths, addresses and"
        " patterns such as 'http://server/{00000..00012}.tar'; or drawn:de,en for the drawn scenes",
    )
    add("--sheet", type=Path, metavar="FILE", help="contact sheet to write (PNG)")
    add("--json", action="store_true", help="print the report as JSON")
    add(
        "--most", type=int, default=_MOST, metavar="N", help="read N examples at most, by chance (default: %(default)s)"
    )
    add("--all", action="store_true", help="read all of them")
    add(
        "--workers", type=int, default=min(os.cpu_count() or 1, 8), metavar="N", help="processes (default: %(default)s)"
    )
    add(
        "--language",
        action="append",
        default=[],
        metavar="CODE",
        help="only captions in this language; may be repeated",
    )
    add("--min-side", type=int, metavar="PX", help="only images whose shorter side has so many px")
    add("--min-score", type=float, metavar="X", help="only images with such an aesthetic score")
    add("--min-text", type=int, metavar="N", help="only captions with so many characters")
    add("--max-text", type=int, metavar="N", help="only captions with at most so many characters")
    add("--skip-shards", action="store_true", help="leave out shards that cannot be had")
    add("--cache", type=Path, metavar="DIR", help="folder for fetched shards (default: ~/.cache/flagai_altdiff/data)")
    report.set_defaults(run=_report)
    things = commands.add_parser(
        "things",
        help="write training data of hundreds of things",
        description="Fetch pictures and names of things with npm, which must be there, and write shards of images with "
        "phrases in 18 languages. What renders them: pip install '.[things]' in the package's folder.",
    )
    add = things.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write; archives in its packages/ are used")
    add("--renders", type=int, default=32, metavar="N", help="images of each thing (default: %(default)s)")
    things.set_defaults(run=_things)


def _things(args: argparse.Namespace) -> int:
    from flagai_altdiff.mini.things.shards import Amount, write_things

    found = write_things(args.out, Amount(renders=args.renders))
    print(f"{found['images']:,} images of {found['things']} things and {found['shapes']:,} drawn shapes")
    print(args.out)
    return 0


def _report(args: argparse.Namespace) -> int:
    check_sheet(args.sheet)
    import flagai_altdiff.mini.examples  # noqa: F401  # so that drawn: is known
    from flagai_altdiff.training.data.filters import Filters
    from flagai_altdiff.training.data.opening import open_examples
    from flagai_altdiff.training.data.report import report
    from flagai_altdiff.training.data.source import Reading

    filters = Filters(
        languages=tuple(args.language),
        min_score=args.min_score,
        min_side=args.min_side,
        min_text=args.min_text,
        max_text=args.max_text,
    )
    how = Reading(filters=filters, skip_shards=args.skip_shards, cache=args.cache)
    examples = open_examples(args.data, how)
    found = report(
        examples,
        most=None if args.all else args.most,
        tiles=_TILES if args.sheet else 0,
        workers=args.workers,
    )
    if args.json:
        print(json.dumps(found.as_json(), ensure_ascii=False, indent=2))
    else:
        _print(found)
    if args.sheet:
        _write_sheet(args.sheet, found)
        print(args.sheet, file=sys.stderr)
    return 0 if found.good else 1


def _print(found: DataReport) -> None:
    looked = "" if found.looked_at == found.examples else f", {found.looked_at:,} of them read"
    print(f"{found.examples:,} examples{looked}: {found.good:,} good, {len(found.broken):,} broken")
    print(f"{found.images_per_second:,.0f} of them a second")
    _histogram("captions by language", found.captions)
    _histogram("captions per image", {str(number): count for number, count in found.captions_per_image.items()})
    _histogram("shorter side in px, from", {str(side): count for side, count in found.shorter_sides.items()})
    _histogram("characters of a caption, from", {str(length): count for length, count in found.lengths.items()})
    if found.smallest and found.largest:
        (width, height), (wide, high) = found.smallest, found.largest
        print(f"\nsmallest {width}x{height}, largest {wide}x{high}")
    for title, tally in (("left out before reading", found.left_out), ("broken", found.broken)):
        if len(tally):
            print(f"\n{title}", *tally.lines(), sep="\n  ")


def _histogram(title: str, counts: Mapping[str, int]) -> None:
    if not counts:
        return
    print(f"\n{title}")
    largest = max(counts.values(), default=1)
    for name, count in counts.items():
        print(f"  {printable(name, 12):>12} {count:>10,} {'#' * (-(-count * _BAR_COLUMNS // largest))}")


def _write_sheet(path: Path, found: DataReport) -> None:
    """Numbered images; the list of their captions goes beside the report."""
    from flagai_altdiff.sheets import Row, make_sheet
    from flagai_altdiff.training.data.report import TILE

    rows = []
    for start in range(0, len(found.tiles), _COLUMNS):
        tiles = found.tiles[start : start + _COLUMNS]
        captions = [f"{start + i} {tile.caption.language or ''}" for i, tile in enumerate(tiles, 1)]
        rows.append(Row(label="", images=[tile.image for tile in tiles], captions=captions))
    write_sheet(path, make_sheet(rows, TILE))
    print(file=sys.stderr)
    for i, tile in enumerate(found.tiles, 1):
        print(f"{i:>4} {printable(tile.key, 60)}: {printable(tile.caption.text, 120)}", file=sys.stderr)
