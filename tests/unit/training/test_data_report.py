"""What ``report`` finds, and the drawn scenes as training data."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.mini.examples import DrawnScenes
from flagai_altdiff.mini.vocabulary import LANGUAGES
from flagai_altdiff.mini.world import training_scenes
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.report import report
from flagai_altdiff.training.data.source import Reading
from tests.data_files import image_bytes, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "data", 6)
    (folder / "000.png").write_bytes(image_bytes(size=(300, 280)))
    (folder / "001.png").write_bytes(b"x")
    (folder / "002.txt").write_text("one\ntwo\n" + "three" * 10)
    (folder / "003.txt").unlink()
    (folder / "003.de.txt").write_text("drei")
    (folder / "004.txt").unlink()
    (folder / "005.txt").write_bytes("Käse".encode("latin-1"))
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_report(folder: Path, workers: int) -> None:
    found = report(open_examples(folder), tiles=3, workers=workers)
    assert (found.examples, found.looked_at, found.good) == (5, 5, 3)
    assert found.captions == {"unknown": 4, "de": 1}
    assert found.captions_per_image == {1: 2, 3: 1}
    assert found.shorter_sides == {0: 2, 256: 1}
    assert found.lengths == {0: 4, 40: 1}
    assert found.smallest == (20, 16) and found.largest == (300, 280)
    assert found.broken.names == {
        "not an image": ["001.png"],
        "text is not UTF-8": ["005.png (ISO-8859-1 by the look of it)"],
    }
    assert found.left_out.names == {"no caption": ["004.png"]}
    assert found.images_per_second > 0
    assert [(tile.key, tile.image.size) for tile in found.tiles] == [("000.png", (128, 119)), ("003.png", (20, 16))]


def test_some_of_many(tmp_path: Path) -> None:
    examples = open_examples(write_folder(tmp_path / "data", 30))
    found = report(examples, most=10, tiles=4)
    assert (found.examples, found.looked_at, len(found.tiles)) == (30, 10, 4)
    assert report(examples, most=10, tiles=4).tiles[0].key == found.tiles[0].key


def test_drawn_scenes() -> None:
    every = open_examples("drawn:")
    assert len(every) == len(training_scenes()) and len(every[0].captions) == len(LANGUAGES) == 18
    some = open_examples("drawn:de,zh*2")
    assert len(some) == 2 * len(every) == len(set(some.keys))
    first, again = some[len(every)], pickle.loads(pickle.dumps(some))[len(every)]
    assert first.image is not None and first.image.size == (128, 128) and first.key == some.keys[len(every)]
    assert again.image is not None and some[0].image is not None and first == again
    assert first.image.tobytes() == again.image.tobytes() != some[0].image.tobytes()
    assert [caption.language for caption in first.captions] == ["de", "zh"]
    assert len(open_examples("drawn:", Reading(filters=Filters(languages=("ja",))))[0].captions) == 1
    assert DrawnScenes(side=32)[0].image.size == (32, 32)  # type: ignore[union-attr]
    for wrong in ("drawn:xx", "drawn:*0", "drawn:de*x"):
        with pytest.raises(InvalidRequestError):
            open_examples(wrong)
    with pytest.raises(IndexError):
        every[len(every)]
