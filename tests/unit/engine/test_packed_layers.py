"""Layers with laid-out weights give the numbers of the plain ones, whichever way they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flagai_altdiff.engine import packed_attention, winograd
from flagai_altdiff.engine.packed_layers import PackedConv, PackedLinear, PackedUpsample, normed
from flagai_altdiff.models.attention import FeedForward
from flagai_altdiff.models.layers import Upsample
from tests.counting import counted, flop


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", [4, 18], ids=["by the library", "by minimal filtering, with edges"])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(side: int, bias: bool) -> None:
    conv, x = nn.Conv2d(128, 160, 3, padding=1, bias=bias), torch.randn(2, 128, side, side)
    packed, shift, plus = PackedConv(conv), torch.randn(160), torch.randn(2, 160, side, side)
    kept = plus.clone()
    close(packed(x), conv(x))
    close(packed(x, shift), conv(x) + shift[:, None, None])
    close(packed(x, None, plus), conv(x) + plus)
    close(packed(x, shift, plus), conv(x) + shift[:, None, None] + plus)
    assert torch.equal(plus, kept), "what is added is somebody's map"


@torch.no_grad()
@pytest.mark.parametrize("bytes_at_once", [1, 36 * 128 * 4 * 40, 1 << 30], ids=["a row", "an image", "all"])
@pytest.mark.parametrize("form", [winograd.SmallTiles(), winograd.LargeTiles()], ids=["small", "large"])
def test_minimal_filtering_in_parts(
    form: winograd.Filtering[Any], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "CHUNK_BYTES", bytes_at_once)
    weight, bias = torch.randn(130, 128, 3, 3) / 36, torch.randn(130)
    for count, height, width in ((1, 21, 26), (3, 21, 26), (2, 3, 50)):
        x = torch.randn(count, 128, height, width)
        found = form.convolve(x, form.transformed(weight), bias)
        close(found, F.conv2d(x, weight, bias, padding=1))
        assert found.stride(1) == 1, "channels together"


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 2000], ids=["by torch", "by oneDNN"])
def test_linear_maps(rows: int) -> None:
    one, other = nn.Linear(64, 96), nn.Linear(64, 32)
    x, plus = torch.randn(2, rows, 64), torch.randn(2, rows, 96)
    kept = plus.clone()
    close(PackedLinear(one)(x), one(x))
    close(PackedLinear(one)(x, plus), one(x) + plus)
    close(PackedLinear(one, other)(x), torch.cat([one(x), other(x)], dim=-1))
    close(PackedLinear(one, rows=slice(32, None))(x), one(x)[..., 32:])
    close(PackedLinear(one, rows=slice(32), activation="gelu")(x), F.gelu(one(x)[..., :32]))
    assert torch.equal(plus, kept)


@torch.no_grad()
def test_a_changed_layer_is_seen_among_several() -> None:
    layers, x = [nn.Linear(16, 8, bias=False) for _ in range(3)], torch.randn(4, 16)
    together = PackedLinear(*layers)
    close(together(x), torch.cat([layer(x) for layer in layers], dim=-1))
    layers[1].weight.mul_(2)
    close(together(x), torch.cat([layer(x) for layer in layers], dim=-1))


@torch.no_grad()
def test_maps_are_mixed_where_they_are() -> None:
    conv, x = nn.Conv2d(32, 48, 1), torch.randn(2, 32, 9, 7)
    close(PackedLinear(conv).of_map(x), conv(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("channels", "by_windows"), [(48, True), (160, True), (336, False)], ids=["narrow", "middling", "wide"]
)
def test_a_map_is_enlarged_and_convolved(channels: int, by_windows: bool) -> None:
    plain, x = Upsample(channels), torch.randn(2, channels, 12, 9)
    packed = PackedUpsample(plain.conv)
    close(packed(x), plain(x))
    assert packed(x).stride(1) == 1, "channels together"
    counted(lambda: packed(x))
    windows = 4 / 9 * (13 * 10) / (12 * 9) * flop(lambda: plain(x))  # with a margin
    done = flop(lambda: packed(x))
    assert done == pytest.approx(windows, rel=0.01) if by_windows else done < 0.9 * windows
    plain.conv.weight.mul_(2)
    close(packed(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("rows", [7, 1000], ids=["in slices", "at once"])
def test_tokens_are_fed_forward(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, plus = FeedForward(64), torch.randn(2, 33, 64), torch.randn(2, 33, 64)
    monkeypatch.setattr(packed_attention, "_INNER_BYTES", rows * 4 * 256)
    wanted, kept = layer(x) + plus, plus.clone()
    layer.net[2].forward = PackedLinear(layer.net[2])  # type: ignore[arg-type, assignment]
    close(packed_attention._feed(layer)(x, plus), wanted)
    assert torch.equal(plus, kept), "what is added is somebody's map"


@torch.no_grad()
@pytest.mark.parametrize("side", [8, 40])
@pytest.mark.parametrize("channels", [64, 512])
def test_maps_are_normed(channels: int, side: int) -> None:
    norm, x = nn.GroupNorm(32, channels), torch.randn(2, channels, side, side)
    norm.weight.uniform_()
    norm.bias.uniform_()
    close(normed(norm, x.contiguous(memory_format=torch.channels_last)), norm(x))
