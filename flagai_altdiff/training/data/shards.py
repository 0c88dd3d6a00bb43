"""Many shards, on this disk or on servers: which there are, how many examples each has, and how to have them here."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
from filelock import FileLock

from flagai_altdiff.errors import BrokenExampleError, DataError, HubError, ModelNotFoundError, OfflineError, printable
from flagai_altdiff.files import new_file
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.client import ask
from flagai_altdiff.hub.environment import offline_switch
from flagai_altdiff.hub.threads import Stop, run_all
from flagai_altdiff.hub.transfer import download
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.training.data.example import Tally
from flagai_altdiff.training.data.fields import Facts
from flagai_altdiff.training.data.notes import Note, Stamp, default_cache, read_note, write_note
from flagai_altdiff.training.data.shard import ShardPart, changed, look_through
from flagai_altdiff.training.data.shard_names import endings_apart, is_remote
from flagai_altdiff.training.data.source import Choose, Reading, Recent, Rows

logger = logging.getLogger(__name__)

NO_SHARD = "shard that cannot be had"
_STATS = "stats.json"
LANES = 64
"""Shards that are read side by side. It divides usual numbers of processes, so that each reads shards of its own."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Which shard.

    Args:
        name: Path or address, as it was typed.
        path: Where it lies, or will lie, on this disk.
        label: What the names of its examples begin with.
    """

    name: str
    path: Path
    label: str

    @property
    def remote(self) -> bool:
        """Whether it comes from a server."""
        return is_remote(self.name)

    @property
    def shown(self) -> str:
        """Its name for messages."""
        return redact_url(self.name) if self.remote else printable(self.name, 300)


class MissingPart:
    """The examples of a shard that cannot be had, which was learnt after they had got their numbers."""

    def __init__(self, label: str, count: int, reason: str) -> None:
        self._label, self._count, self._reason = label, count, reason

    def __len__(self) -> int:
        return self._count

    def key(self, row: int) -> str:
        """A name in place of that which it has."""
        return f"{self._label}/number {row}"

    def facts(self, row: int) -> Facts:
        """None."""
        raise BrokenExampleError(self.key(row), NO_SHARD, self._reason)

    def open(self, row: int) -> BinaryIO:
        """None."""
        raise BrokenExampleError(self.key(row), NO_SHARD, self._reason)


class Shards:
    """The examples of shards, a part for each.

    Args:
        names: Paths and addresses.
        how: What may be missing, and where to keep what is fetched.

    Raises:
        DataError: A shard cannot be had, and may not be skipped.
    """

    has_images = True

    def __init__(self, names: Sequence[str], how: Reading) -> None:
        self._how, self._cache = how, how.cache or default_cache()
        labels = endings_apart(names)
        self._shards = [Shard(name=n, path=self._place(n), label=label) for n, label in zip(names, labels, strict=True)]
        self._stamps: dict[int, Stamp] = {}
        self._at_hand = Recent[ShardPart | MissingPart](2 * LANES)
        self.left_out, self.lanes = Tally(), min(LANES, max(len(names), 1))
        self.sizes: Sequence[int] = self._count_all()

    def part(self, number: int) -> ShardPart | MissingPart:
        """A shard; fetched if that was not needed before."""
        return self._at_hand.get(number, lambda: self._part(number))

    def remembered(self, number: int, wanted: str, choose: Choose) -> tuple[Rows, Tally]:
        """Noted as the index is, for each choice of filters."""
        part = self.part(number)
        if isinstance(part, MissingPart):
            return choose()
        kind = f"{hashlib.blake2b(wanted.encode(), digest_size=8).hexdigest()}.altdiff-chosen"
        note = read_note(part.path, kind, part.stamp, self._cache)
        if note and (found := _choice_of(note, len(part))):
            return found
        rows, tally = choose()
        write_note(Note(about=tally.as_json(), numbers={"rows": rows}), part.path, kind, part.stamp, self._cache)
        return rows, tally

    def _place(self, name: str) -> Path:
        if not is_remote(name):
            return Path(name)
        folder = hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
        return self._cache / "shards" / folder / _file_name(name)

    def _count_all(self) -> list[int]:
        """How many examples each shard has; several are looked through at once, if they never were."""
        counts, tallies = [0] * len(self._shards), [Tally() for _ in self._shards]
        stop = Stop()
        with bar_class()(total=len(counts), desc="shards", unit="shard", disable=not show_bars(), leave=False) as bar:

            def count(number: int) -> None:
                counts[number] = self._count(number, tallies[number], stop)
                bar.update()

            run_all([functools.partial(count, number) for number in range(len(counts))], stop)
        self.left_out.update(tallies)
        return counts

    def _count(self, number: int, tally: Tally, stop: Stop) -> int:
        shard, must_have = self._shards[number], bool(self._how.filters) or self._how.fetch_all
        try:
            if shard.remote and not must_have and (told := _told_count(shard)) is not None:
                return told
            part = self._open(shard, stop)
        except DataError as error:
            if not self._how.skip_shards:
                raise
            tally.add(NO_SHARD, shard.shown)
            logger.warning("%s Its examples are left out.", error)
            return 0
        tally.update([part.left_out])
        self._stamps[number] = part.stamp
        return len(part)

    def _part(self, number: int) -> ShardPart | MissingPart:
        shard, count = self._shards[number], self.sizes[number]
        try:
            part = self._open(shard, Stop(), counted=count)
        except DataError as error:
            if not self._how.skip_shards:
                raise
            return MissingPart(shard.label, count, printable(str(error), 300))
        if part.stamp != self._stamps.setdefault(number, part.stamp):
            raise changed(shard.path)  # examples would have other numbers
        if part.surplus:
            logger.warning("%s has %d more examples than its stats say; they are not used", shard.shown, part.surplus)
        return part

    def _open(self, shard: Shard, stop: Stop, counted: int | None = None) -> ShardPart:
        if shard.remote:
            _fetch(shard, stop)
        need_texts = self._how.caption is None
        try:
            return look_through(shard.path, shard.label, need_texts=need_texts, cache=self._cache, counted=counted)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"shard {shard.shown} cannot be read: {error.strerror or error}.") from error


def _told_count(shard: Shard) -> int | None:
    """How many examples a server's shard has by the ``_stats.json`` that img2dataset left beside it, if it did.

    The answer is kept: examples must have the same numbers at each start, be the shard here by then or not.
    """
    kept = shard.path.with_name(_STATS)
    try:
        return _successes(kept.read_bytes())
    except OSError:
        pass
    if offline_switch():
        return None
    address = urlsplit(shard.name)
    try:
        text = ask("GET", address._replace(path=f"{os.path.splitext(address.path)[0]}_stats.json").geturl()).text
    except ModelNotFoundError:
        text = ""
    except HubError as error:
        logger.info("%s", error)  # if the server is gone, so is the shard
        return None
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with new_file(kept, replace=True) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return _successes(text.encode())


def _successes(stats: bytes) -> int | None:
    try:
        count = json.loads(stats)["successes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if isinstance(count, int) and 0 <= count < 1 << 31 else None


def _fetch(shard: Shard, stop: Stop) -> None:
    """Have a server's shard on this disk; one process of a machine fetches it, the others wait."""
    if shard.path.exists():
        return
    try:
        if switch := offline_switch():
            raise OfflineError(f"{switch} forbids downloads.")
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(shard.path.with_name(f"{shard.path.name}.lock")):
            if not shard.path.exists():
                download(shard.name, shard.path, stop=stop)
    except OSError as error:
        raise DataError(
            f"shard {shard.shown} cannot be had: {error} What has arrived is kept; start again to go on with it, or"
            " leave out such shards (data.skip_shards: true in a config, --skip-shards of altdiff data report)."
        ) from error


def _choice_of(note: Note, count: int) -> tuple[Rows, Tally] | None:
    """What a note says was chosen; ``None`` if it cannot be."""
    try:
        rows = note.numbers["rows"]
        fits = np.all(np.diff(rows) > 0) and (not len(rows) or (rows[0] >= 0 and rows[-1] < count))
        return (rows, Tally.from_json(note.about)) if fits else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _file_name(name: str) -> str:
    """A name for an address on this disk, whatever is in it."""
    last = unquote(urlsplit(name).path).rpartition("/")[2]
    return re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-100:].lstrip(".") or "shard.tar"
