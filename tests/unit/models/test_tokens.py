"""Tokens merged around an attention."""

from __future__ import annotations

import pytest
import torch

from flagai_altdiff.models.attention import CrossAttention, SpatialTransformer
from flagai_altdiff.models.tokens import MOST_MERGED, Merging


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("height", "width", "share", "left"), [(8, 8, 0.5, 32), (8, 6, 0.25, 36), (5, 7, 0.75, 9)])
def test_so_many_tokens_go_and_all_come_back(height: int, width: int, share: float, left: int) -> None:
    x, seen = noise(2, height * width, 6), list[int]()

    def attention(y: torch.Tensor) -> torch.Tensor:
        seen.append(y.shape[1])
        return y

    found = Merging(share, height, width).around(attention, x)
    assert seen == [left] and found.shape == x.shape
    for row, own in zip(found, x, strict=True):
        assert len(row.unique(dim=0)) == left
        same = (row == own).all(dim=1)
        assert 0 < int(same.sum()) < len(own), "those that stayed alone are what they were, in their places"


def test_tokens_that_are_equal_lose_nothing() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(16, None, 2, 8)
    cells = noise(2, 4, 6, 16)
    x = cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
    with torch.no_grad():
        merged = Merging(MOST_MERGED, 8, 12).around(attention, x)
        torch.testing.assert_close(merged, attention(x), rtol=1e-5, atol=1e-6)


def test_the_most_alike_go_first() -> None:
    x = noise(1, 64, 8)
    x[0, 1::2] = x[0, 0::2]  # each pair is one token
    kept: list[torch.Tensor] = []
    Merging(0.25, 8, 8).around(lambda y: kept.append(y) or y, x)  # type: ignore[func-returns-value]
    assert len(kept[0][0].unique(dim=0)) >= 32, "nothing but copies is gone"


def test_rows_do_not_depend_on_each_other() -> None:
    x = noise(3, 64, 8)
    whole = Merging(0.4, 8, 8).around(torch.sin, x)
    torch.testing.assert_close(whole[1:2], Merging(0.4, 8, 8).around(torch.sin, x[1:2]))


def test_large_maps_are_compared_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(2, 64, 8)
    whole = Merging(0.4, 8, 8).around(torch.sin, x)
    monkeypatch.setattr("flagai_altdiff.models.tokens._AT_ONCE", 100)
    torch.testing.assert_close(Merging(0.4, 8, 8).around(torch.sin, x), whole)


def test_maps_without_cells_keep_their_tokens() -> None:
    transformer = SpatialTransformer(32, 2, 16, 1, 8, True, 8)
    x, context = noise(1, 32, 1, 9), noise(1, 3, 8)
    assert transformer.merging(x, 0.5) is None and transformer.merging(noise(1, 32, 2, 9), 0.5) is not None
    assert torch.equal(transformer(x, context, 0.5), transformer(x, context))
