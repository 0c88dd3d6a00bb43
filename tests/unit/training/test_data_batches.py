"""Batches: nothing lost, nothing twice, the same for any number of processes and workers, from any step on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff.errors import DataError, InvalidRequestError
from flagai_altdiff.training.data.batches import Batches, Share, batches
from flagai_altdiff.training.data.opening import open_examples
from flagai_altdiff.training.data.order import Order
from flagai_altdiff.training.data.preparation import Preparation
from flagai_altdiff.training.randomness import generator, number
from tests.data_files import noise_bytes, plain_shard, write_folder

shares = st.fixed_dictionaries(
    {
        "count": st.integers(1, 60),
        "batch_size": st.integers(1, 20),
        "world": st.integers(1, 6),
        "parts": st.integers(1, 7),
    }
)


@given(shares, st.integers(0, 2))
@settings(max_examples=200, deadline=None)
def test_all_ranks_together_have_every_position_once(share: dict[str, Any], epoch: int) -> None:
    ranks = [Share(**share, rank=rank) for rank in range(share["world"])]
    taken = list[int]()
    for step in range(epoch * ranks[0].steps, (epoch + 1) * ranks[0].steps):
        pieces = [rank.pieces(step) for rank in ranks]
        assert len({len(own) for own in pieces}) == 1
        in_step = [p for own in pieces for piece in own for p in piece.positions]
        assert all(piece.size == len(in_step) <= share["batch_size"] for own in pieces for piece in own)
        assert all(piece.epoch == epoch and piece.step == step for own in pieces for piece in own)
        assert all([piece.part for piece in own] == list(range(share["parts"])) for own in pieces)
        sizes = [sum(len(own[part].positions) for own in pieces) for part in range(share["parts"])]
        assert max(sizes) - min(sizes) <= 1
        taken += in_step
    assert sorted(taken) == list(range(share["count"]))


def contents(loader: Batches) -> list[dict[str, Any]]:
    return [{**batch, "image": batch["image"].tolist(), "position": batch["position"].tolist()} for batch in loader]


def make(source: object, *, batch_size: int = 4, rank: int = 0, world: int = 1, **more: Any) -> Batches:
    examples = open_examples(source)  # type: ignore[arg-type]
    share = Share(count=len(examples), batch_size=batch_size, rank=rank, world=world, parts=more.pop("parts", 1))
    return batches(examples, share, Preparation(side=8, flip=True), seed=3, **more)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for i, size in enumerate((4, 5, 2)):
        (folder / f"{i:05}.tar").write_bytes(plain_shard(size, 10 * i))
    return folder


def test_a_batch(shards: Path) -> None:
    first, *_, last = make(shards, steps=3)
    assert first["image"].shape == (4, 3, 8, 8) and first["image"].dtype == torch.float32
    assert last["image"].shape[0] == 3 and last["size"] == 3 and last["position"].dtype == torch.int64
    assert first["caption"][0].startswith("number ") and first["language"] == [None] * 4
    for key, caption, image in zip(first["key"], first["caption"], first["image"], strict=True):
        assert int(key[-9:]) == int(caption.split()[1]) == round((float(image[0, 0, 0]) + 1) * 127.5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_same_for_any_number_of_processes(shards: Path, world: int) -> None:
    by_position = {}
    for rank in range(world):
        for batch in contents(make(shards, rank=rank, world=world, steps=6)):
            for row, position in enumerate(batch["position"]):
                place = (batch["epoch"], batch["step"], position)
                assert place not in by_position
                by_position[place] = (batch["key"][row], batch["caption"][row], batch["image"][row])
    one = contents(make(shards, steps=6))
    expected = {
        (batch["epoch"], batch["step"], position): (batch["key"][row], batch["caption"][row], batch["image"][row])
        for batch in one
        for row, position in enumerate(batch["position"])
    }
    assert by_position == expected
    assert sorted(key for batch in one[:3] for key in batch["key"]) == sorted(open_examples(shards).keys)


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (1, "spawn")])
def test_the_same_with_workers(shards: Path, workers: int, context: str) -> None:
    assert contents(make(shards, steps=4, workers=workers, context=context)) == contents(make(shards, steps=4))


@pytest.mark.parametrize("start", [1, 2, 3, 5])
def test_it_begins_at_any_step(shards: Path, start: int) -> None:
    assert contents(make(shards, start=start, steps=7 - start)) == contents(make(shards, steps=7))[start:]


def test_choices_are_new_in_each_epoch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 1)
    (folder / "000.txt").write_text("\n".join(map(str, range(100))))
    (folder / "000.png").write_bytes(noise_bytes((40, 8)))
    found = contents(make(folder, steps=8))
    assert len({batch["caption"][0] for batch in found}) > 5 and len({str(batch["image"]) for batch in found}) > 5


def test_it_has_no_end_unless_asked(shards: Path) -> None:
    endless = make(shards)
    epochs = [batch["epoch"] for batch, _ in zip(endless, range(7), strict=False)]
    assert epochs == [0, 0, 0, 1, 1, 1, 2] and len(make(shards, steps=7, parts=2)) == 14
    with pytest.raises(TypeError):
        len(endless)


def test_no_state_of_the_process_is_touched(shards: Path) -> None:
    before = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    contents(make(shards, steps=3))
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == before


def test_broken_ones_are_left_out_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "data", 6)
    (folder / "002.png").write_bytes(noise_bytes()[:500])
    (folder / "004.png").write_bytes(b"")
    loader = make(folder, steps=4)
    found = contents(loader)
    assert sorted(key for batch in found[:2] for key in batch["key"]) == ["000.png", "001.png", "003.png", "005.png"]
    assert sorted(broken[:2] for batch in found[:2] for broken in batch["broken"]) == [
        ("002.png", "truncated or damaged image"),
        ("004.png", "not an image"),
    ]
    assert [batch["size"] for batch in found] == [4, 2, 4, 2]
    assert len(loader.broken) == 2 and sorted(record.message for record in caplog.records) == [
        "left out of training: 002.png: truncated or damaged image (image file is truncated)",
        "left out of training: 004.png: not an image (it is empty)",
    ]


def test_a_batch_of_broken_ones_is_empty(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 1)
    (folder / "000.png").write_bytes(b"")
    (batch,) = make(folder, steps=1)
    assert batch["image"].shape == (0, 3, 8, 8) and batch["position"].shape == (0,) and batch["size"] == 1


def test_a_reader_that_is_killed(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Order, "index", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="was killed, most likely for lack of memory: use fewer workers"):
        contents(make(shards, steps=1, workers=1, context="fork"))


def test_what_processes_have_in_common(shards: Path) -> None:
    all_of_them = open_examples(shards).layout.digest
    assert all_of_them == open_examples(str(shards / "*.tar")).layout.digest
    assert all_of_them != open_examples(shards / "{00000,00001}.tar").layout.digest


def test_reading_needs_no_trainer(shards: Path, script_environment: dict[str, str]) -> None:
    script = (
        "import sys; from flagai_altdiff.training.data import batches, opening; opening.open_examples(sys.argv[1])[0];"
        "assert not {'pytorch_lightning', 'pyarrow', 'webdataset', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, str(shards)], check=True, env=script_environment, timeout=120)


def test_too_many_broken_ones_end_the_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", 6)
    for i in range(4):
        (folder / f"{i:03}.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"of 100 examples are broken: 4 not an image: 00"):
        contents(make(folder, steps=100))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_ends_the_run(tmp_path: Path, workers: int) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(plain_shard(3))
    loader = make(shard, steps=1, workers=workers)
    shard.write_bytes(plain_shard(4))
    with pytest.raises(DataError, match=r"^shard .*0\.tar was changed; start again"):
        contents(loader)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"count": 0}, "count=0"),
        ({"rank": 2, "world": 2}, "rank=2"),
        ({"batch_size": 0}, "batch_size"),
        ({"parts": 0}, "parts"),
    ],
)
def test_impossible_shares(wrong: dict[str, int], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        Share(**{"count": 5, "batch_size": 2, **wrong})


def test_random_numbers_hang_on_their_key() -> None:
    assert number(1, "noise", 2, 3) == number(1, "noise", 2, 3) == 5091480946508364206
    assert len({number(seed, "a", i) for seed in range(10) for i in range(100)}) == 1000
    assert number(1, "1") != number(1, 1) and number(1, 23) != number(12, 3)
    assert torch.equal(torch.rand(4, generator=generator(1, "x")), torch.rand(4, generator=generator(1, "x")))
