"""The order of an epoch: a permutation for every layout, the same everywhere, kind to the disk."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagai_altdiff.training.data.example import Layout
from flagai_altdiff.training.data.order import Order
from tests.cost import in_proportion

layouts = st.builds(
    Layout,
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any).map(tuple),
    st.integers(1, 8),
)


def whole(order: Order, epoch: int) -> list[int]:
    return [order.index(epoch, position) for position in range(len(order))]


@given(layouts, st.integers(0, 2**63), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_every_epoch_has_every_example_once(layout: Layout, seed: int, epoch: int) -> None:
    order = Order(layout, seed)
    assert sorted(whole(order, epoch)) == list(range(sum(layout.parts)))
    assert whole(Order(layout, seed), epoch) == whole(order, epoch)


def test_epochs_and_seeds_differ() -> None:
    found = {tuple(whole(Order(50, seed), epoch)) for seed in range(3) for epoch in range(5)}
    assert len(found) == 15


def test_the_order_stays_what_it_was() -> None:
    """A run that was saved goes on in its order, whatever the version."""
    assert whole(Order(10, 7), 0) == [8, 3, 4, 5, 9, 0, 2, 7, 1, 6]
    assert whole(Order(Layout((3, 2, 4), 2), 7), 1) == [4, 0, 3, 2, 7, 1, 6, 8, 5]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_order_comes_up_equally_often(count: int) -> None:
    epochs = 4800
    seen = Counter(tuple(whole(Order(count, 1), epoch)) for epoch in range(epochs))
    assert set(seen) == set(permutations(range(count)))
    expected = epochs / len(seen)
    assert sum((n - expected) ** 2 / expected for n in seen.values()) < 60  # chi-squared, at most 23 degrees of freedom


def test_neighbours_do_not_stay_neighbours() -> None:
    order = whole(Order(2000, 3), 0)
    steps = [abs(a - b) for a, b in pairwise(order)]
    assert 600 < sum(steps) / len(steps) < 733
    assert abs(sum(order[:1000]) / 1000 - 1000) < 60


@given(st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_a_process_reads_parts_of_its_own(epoch: int, world: int) -> None:
    layout = Layout((10,) * 8, 4)
    order = Order(layout, 5)
    parts = [{order.index(epoch, p) // 10 for p in range(rank, 80, world)} for rank in range(world)]
    assert sum(map(len, parts)) == 8
    at_once = [{order.index(epoch, p) // 10 for p in range(first, first + 40)} for first in (0, 40)]
    assert [len(some) for some in at_once] == [4, 4]


def test_a_position_of_hundreds_of_millions_costs_nothing() -> None:
    order = Order(Layout((30_000,) * 20_000, 64), 1)
    with in_proportion(1):
        assert len({order.index(epoch, position) for epoch in (0, 1) for position in range(0, 6 * 10**8, 10**7)}) > 100
    with pytest.raises(IndexError):
        order.index(0, len(order))
