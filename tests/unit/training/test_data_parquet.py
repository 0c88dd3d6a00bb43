"""Parquet files with images in them, or beside them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flagai_altdiff.errors import BrokenExampleError, DataError, MissingDependencyError
from flagai_altdiff.training.data.batches import Share, batches
from flagai_altdiff.training.data.example import Caption
from flagai_altdiff.training.data.filters import Filters
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.preparation import Preparation
from flagai_altdiff.training.data.source import Reading
from tests.cost import in_proportion
from tests.data_files import image_bytes


def write(path: Path, columns: dict[str, list[Any]], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def colours(source: object, how: Reading | None = None) -> list[tuple[int, tuple[Caption, ...]]]:
    examples = open_examples(source, how)  # type: ignore[arg-type]
    found = []
    for i in range(len(examples)):
        image = examples[i].image
        assert image is not None
        pixel = image.getpixel((0, 0))
        assert isinstance(pixel, tuple)
        found.append((int(pixel[0]), examples[i].captions))
    return found


@pytest.mark.parametrize("kind", ["bytes", "records", "names", "names in records"])
def test_images_in_rows_and_beside(kind: str, tmp_path: Path) -> None:
    data = [image_bytes((i, 0, 0)) for i in range(5)]
    for i, content in enumerate(data):
        (tmp_path / f"{i}.png").write_bytes(content)
    columns: dict[str, list[Any]] = {
        "bytes": data,
        "records": [{"bytes": content, "path": "x"} for content in data],
        "names": [f"{i}.png" for i in range(5)],
        "names in records": [{"bytes": None if i else data[0], "path": f"{i}.png"} for i in range(5)],
    }
    file = write(
        tmp_path / "a.parquet",
        {
            "TEXT": [f"t{i}" for i in range(5)],
            "image": columns[kind],
            "language": ["de", None, "en", "de", "de"],
            "embedding": [[0.5] * 4] * 5,
        },
    )
    languages = ("de", None, "en", "de", "de")
    assert colours(file) == [(i, (Caption(f"t{i}", code),)) for i, code in enumerate(languages)]
    examples = open_examples(file)
    assert examples.layout.parts == (2, 2, 1) and list(examples.keys)[2:4] == ["a/1/0", "a/1/1"]
    german = Reading(filters=Filters(languages=("de",)))
    assert [number for number, _ in colours(file, german)] == [0, 3, 4]


def test_the_same_with_workers(tmp_path: Path) -> None:
    images = [image_bytes((i, 0, 0)) for i in range(9)]
    examples = open_examples(write(tmp_path / "a.parquet", {"image": images, "text": [f"t{i}" for i in range(9)]}))
    found = []
    for workers in (0, 2):
        share = Share(count=9, batch_size=4)
        loader = batches(examples, share, Preparation(side=4), seed=1, steps=6, workers=workers)
        found.append([(batch["key"], batch["image"].tolist()) for batch in loader])
    assert found[0] == found[1] and len({key for keys, _ in found[0][:3] for key in keys}) == 9


def test_several_captions(tmp_path: Path) -> None:
    images = [image_bytes()] * 3
    file = write(tmp_path / "a.parquet", {"jpg": images, "captions": [["a", "b"], [], None]})
    examples = open_examples(file)
    assert examples[0].captions == (Caption("a"), Caption("b"))
    for i in (1, 2):
        with pytest.raises(BrokenExampleError, match=f"a/{i // 2}/{i % 2}: no caption"):
            examples[i]
    assert colours(file, Reading(caption="any"))[2] == (255, (Caption("any"),))


def test_a_folder_of_files_some_of_them_damaged(tmp_path: Path) -> None:
    good = write(tmp_path / "data" / "0.parquet", {"image": [image_bytes((3, 0, 0))], "text": ["a"]})
    (tmp_path / "data" / "1.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "data" / "2.parquet").write_bytes(b"")
    write(tmp_path / "data" / "3.parquet", {"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())})
    examples = open_examples(tmp_path)
    assert len(examples) == 1
    assert examples.left_out.counts == {"parquet file cannot be read": 2, "parquet file without rows": 1}
    data = bytearray(good.read_bytes())
    data[4:40] = bytes(36)
    good.write_bytes(data)
    with pytest.raises(BrokenExampleError):
        open_examples(good)[0]


@pytest.mark.parametrize("name", [None, "", "../a.png", "/etc/passwd", "gone.png"])
def test_names_that_lead_nowhere(name: str | None, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": pa.array([name], pa.string()), "text": ["a"]})
    with pytest.raises(BrokenExampleError):
        open_examples(file)[0]


@pytest.mark.parametrize("way", ["the same image again and again", "two images of zeros", "a caption of zeros"])
def test_rows_that_unpack_to_far_more_than_the_file(way: str, tmp_path: Path) -> None:
    zeros = b"\0" * (48 << 20)
    columns: dict[str, Any] = {
        "the same image again and again": {"image": [image_bytes() + bytes(1 << 20)] * 300, "text": ["x"] * 300},
        "two images of zeros": {"image": [image_bytes() + zeros] * 2, "text": ["x"] * 2},
        "a caption of zeros": {"image": [image_bytes()] * 2, "text": [zeros.decode()] * 2},
    }[way]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=way.startswith("the same"))
    del columns
    assert file.stat().st_size < 50_000
    with in_proportion(file.stat().st_size):
        examples = open_examples(file, Reading(caption="x"))
        for i in (0, 1, len(examples) - 1):
            with pytest.raises(BrokenExampleError, match="unpack to far more"):
                examples[i]


def test_a_caption_that_is_a_book(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"image": [image_bytes()] * 2, "text": ["x" * (2 << 20), "y"]})
    examples = open_examples(file)
    assert examples[1].captions == (Caption("y"),)
    with pytest.raises(BrokenExampleError, match="no caption"):
        examples[0]


def test_no_images(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"URL": ["http://x"], "TEXT": ["a"]})
    with pytest.raises(DataError, match=r"has no images: expected a column .* It has: URL, TEXT"):
        open_examples(file)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", {"image": [image_bytes()], "text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flagai_altdiff\[parquet\]'"):
        open_examples(file)
