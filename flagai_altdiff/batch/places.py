"""Where the pictures of a run go: numbered PNG files, or shards of webdataset. A file is there whole, or not at all."""

from __future__ import annotations

import io
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from flagai_altdiff.batch.work import Work
from flagai_altdiff.errors import ImageError, OutputError
from flagai_altdiff.files import new_file, open_regular
from flagai_altdiff.images import read_texts, save_png
from flagai_altdiff.metadata import RECORD_KEY, read_record
from flagai_altdiff.tar import BrokenTarError, members

PER_FOLDER = 10_000
"""PNG files in one folder at most."""
PER_SHARD = 1000
SAMPLES = "samples"
_MEMBERS = ("png", "txt", "json")


@dataclass(frozen=True)
class Drawn:
    """A picture on its way to the disk.

    Args:
        number: Its number, of all in the run.
        prompt: Its prompt.
        image: Its pixels.
        texts: What its PNG remembers, key -> text.
    """

    number: int
    prompt: str
    image: Image.Image
    texts: Mapping[str, str]


class Places(Protocol):
    """Where pictures go. A unit is what one process draws from beginning to end: one lot, or a shard of them."""

    def __len__(self) -> int:
        """How many units there are."""

    def lots(self, unit: int) -> range:
        """The lots of a unit."""

    def lacks(self, unit: int) -> frozenset[int]:
        """Numbers of the pictures of a unit that are still to be drawn.

        Raises:
            OutputError: Another picture lies where one of them is to be.
        """

    def put(self, unit: int, lot: int, pictures: list[Drawn]) -> None:
        """Write pictures of a lot; the lots of a unit come in their order.

        Raises:
            OutputError: The disk refuses.
        """

    def close(self) -> None:
        """Let go of a unit that was not finished."""


class Folders:
    """Numbered PNG files: ``samples/00000.png``; of more than 10,000 as ``samples/0012/00123456.png``.

    Args:
        folder: Of the run.
        work: What is drawn.
        run: What its records are known by.
    """

    def __init__(self, folder: Path, work: Work, run: str) -> None:
        self._home, self._work, self._run = folder / SAMPLES, work, run

    def __len__(self) -> int:
        return len(self._work)

    def lots(self, unit: int) -> range:
        """The lot that the unit is."""
        return range(unit, unit + 1)

    def file(self, number: int) -> Path:
        """The file of a picture."""
        if self._work.pictures <= PER_FOLDER:
            return self._home / f"{number:05d}.png"
        name = f"{number:08d}"
        return self._home / name[:-4] / f"{name}.png"

    def lacks(self, unit: int) -> frozenset[int]:
        """As in :class:`Places`."""
        first = self._work.first(unit)
        return frozenset(n for n in range(first, first + self._work.size(unit)) if not self._is_there(self.file(n)))

    def put(self, unit: int, lot: int, pictures: list[Drawn]) -> None:
        """As in :class:`Places`."""
        for picture in pictures:
            path = self.file(picture.number)
            with _saving(path.parent):
                path.parent.mkdir(parents=True, exist_ok=True)
                with new_file(path, replace=True) as unfinished:
                    save_png(picture.image, picture.texts, unfinished)

    def close(self) -> None:
        """Nothing is left open."""

    def _is_there(self, path: Path) -> bool:
        if not path.exists():
            return False
        record = read_record(path)
        if not record and not _is_whole_png(path):
            return False  # cut off by a fault of the disk: it had its name only when it was whole
        if record.get("run") == self._run:
            return True
        raise OutputError(f"{path} is a picture of another run. Name another folder with --outdir, or remove the file.")


class Shards:
    """Shards of webdataset, ``00000.tar`` …: each picture as ``.png``, with its prompt as ``.txt``, and its record.

    A shard has whole lots, and no more pictures than it is told, unless a single lot has.

    Args:
        folder: Of the run.
        work: What is drawn.
        most: Pictures in a shard at most.
    """

    def __init__(self, folder: Path, work: Work, most: int = PER_SHARD) -> None:
        self._home, self._work = folder, work
        self._first = array("Q")
        count = 0
        for lot in range(len(work)):
            if not count or count + work.size(lot) > most:
                self._first.append(lot)
                count = 0
            count += work.size(lot)
        self._digits = max(6, len(str(work.pictures - 1)))
        self._open = ExitStack()
        self._tar: tarfile.TarFile | None = None

    def __len__(self) -> int:
        return len(self._first)

    def lots(self, unit: int) -> range:
        """The lots of a shard."""
        end = self._first[unit + 1] if unit + 1 < len(self) else len(self._work)
        return range(self._first[unit], end)

    def shard_of(self, picture: int) -> int:
        """The shard that a picture is in."""
        return bisect_right(self._first, self._work.lot_of(picture)) - 1

    def file(self, unit: int) -> Path:
        """The file of a shard."""
        return self._home / f"{unit:05d}.tar"

    def lacks(self, unit: int) -> frozenset[int]:
        """All of its pictures, or none."""
        lots = self.lots(unit)
        first, end = self._work.first(lots[0]), self._work.first(lots[-1]) + self._work.size(lots[-1])
        return frozenset() if _has(self.file(unit), end - first) else frozenset(range(first, end))

    def put(self, unit: int, lot: int, pictures: list[Drawn]) -> None:
        """As in :class:`Places`."""
        lots = self.lots(unit)
        with _saving(self._home):
            try:
                if lot == lots[0]:
                    self._begin(unit)
                for picture in pictures:
                    self._add(picture)
                if lot == lots[-1]:
                    self._finish()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Remove a shard that was not finished."""
        with suppress(_NotFinished), self._open:
            if self._tar is not None:
                raise _NotFinished
        self._tar = None

    def _begin(self, unit: int) -> None:
        self.close()
        unfinished = self._open.enter_context(new_file(self.file(unit), replace=True))
        self._tar = self._open.enter_context(tarfile.TarFile(unfinished, "w", format=tarfile.USTAR_FORMAT))

    def _finish(self) -> None:
        self._tar = None
        self._open.close()

    def _add(self, picture: Drawn) -> None:
        assert self._tar is not None
        file = io.BytesIO()
        save_png(picture.image, picture.texts, file)
        contents = (file.getvalue(), picture.prompt.encode(), picture.texts[RECORD_KEY].encode())
        for ending, data in zip(_MEMBERS, contents, strict=True):
            member = tarfile.TarInfo(f"{picture.number:0{self._digits}d}.{ending}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))


class _NotFinished(Exception):
    """Ends the block that writes a shard, so that nothing of it stays."""


def _has(path: Path, count: int) -> bool:
    """Whether a shard is there, whole, with so many pictures."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, io.SEEK_END)
            return sum(1 for _ in members(file, size)) == count * len(_MEMBERS)
    except (FileNotFoundError, BrokenTarError):
        return False


def _is_whole_png(path: Path) -> bool:
    try:
        read_texts(path)
    except ImageError:
        return False
    return True


@contextmanager
def _saving(folder: Path) -> Iterator[None]:
    """Say what to do where a disk refuses."""
    try:
        yield
    except OSError as error:
        text = f"{folder}: {error.strerror or error}. What was drawn stays; see to it, and run the command again."
        raise OutputError(text, error.errno) from error
