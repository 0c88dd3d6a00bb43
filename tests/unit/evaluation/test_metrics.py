"""The measures against other implementations, closed forms, and cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from flagai_altdiff.evaluation.altclip import retrieval, zero_shot
from flagai_altdiff.evaluation.intervals import estimate
from flagai_altdiff.evaluation.metrics import (
    FrechetDistance,
    Moments,
    best_ranks,
    class_weights,
    inception_score,
    mean_class_recall,
)


def normal(count: int, width: int, seed: int, *, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + shift


class Network(nn.Module):
    """Small random features of images, for torchmetrics."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.randn(3 * 16, 8, generator=torch.Generator().manual_seed(1))

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1) @ self.weights


@pytest.mark.parametrize("count", [5, 60])
def test_fid_is_torchmetrics_on_the_same_features(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    drawn, real = (torch.randint(0, 256, (n, 3, 32, 32), generator=generator).byte() for n in (count, 70))
    network = Network()
    metric = FrechetInceptionDistance(feature=network).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(drawn, real=False)
    ours = FrechetDistance(Moments.of([network(real[:13]), network(real[13:])]))(network(drawn))
    assert ours == pytest.approx(float(metric.compute()), abs=1e-5)


@pytest.mark.parametrize(("count", "width"), [(20, 50), (200, 12)])
def test_fid_is_the_textbook_formula(count: int, width: int) -> None:
    real, drawn = normal(300, width, 1), normal(count, width, 2, shift=0.5)
    (m1, c1), (m2, c2) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (real, drawn))
    root = np.sqrt(np.maximum(np.linalg.eigvals(c1 @ c2).real, 0)).sum()
    wanted = float(((m1 - m2) ** 2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)
    assert FrechetDistance(Moments.of([real]))(drawn) == pytest.approx(wanted, rel=1e-5)


def test_fid_of_one_feature_and_of_the_same_images() -> None:
    real, drawn = torch.tensor([[0.0], [2.0]]), torch.tensor([[10.0], [16.0]])
    wanted = (13 - 1) ** 2 + (math.sqrt(18) - math.sqrt(2)) ** 2
    assert FrechetDistance(Moments.of([real]))(drawn) == pytest.approx(wanted)
    same = normal(40, 64, 3)
    assert FrechetDistance(Moments.of([same]))(same) == pytest.approx(0, abs=1e-4)


def test_dead_features_are_no_trouble() -> None:
    real, drawn = normal(50, 6, 1), normal(50, 6, 2)
    wanted = FrechetDistance(Moments.of([real[:, :3]]))(drawn[:, :3])
    real[:, 3:], drawn[:, 3:] = 0, 0
    assert FrechetDistance(Moments.of([real]))(drawn) == pytest.approx(wanted, rel=1e-6)


def test_moments_come_in_any_batches_and_lose_no_digits() -> None:
    rows = normal(3001, 7, 5).double() + 1e7
    moments = Moments.of(rows.split([1, 1030, 0, 60, 1900, 10]))
    assert moments.count == 3001
    torch.testing.assert_close(moments.covariance, torch.from_numpy(np.cov(rows.numpy().T)), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="1 images"):
        Moments.of([rows[:1]])


def test_inception_score() -> None:
    sure = torch.eye(4).repeat(3, 1) * 1000
    assert inception_score(sure, splits=1) == pytest.approx(4)
    assert inception_score(torch.zeros(7, 4)) == pytest.approx(1)
    logits = normal(60, 5, 1)
    theirs = InceptionScore(feature=nn.Identity(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, splits=1) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    order = np.random.RandomState(2020).permutation(60)
    parts = [inception_score(logits[order[i * 6 : i * 6 + 6]], splits=1) for i in range(10)]
    assert inception_score(logits) == pytest.approx(np.mean(parts))


def test_a_rank_counts_what_fits_as_well() -> None:
    candidates = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert best_ranks(queries, candidates, [[1], [1]]).tolist() == [2, 1]
    assert best_ranks(queries, candidates, [[0], [2, 0]]).tolist() == [1, 0]
    assert best_ranks(torch.ones(3000, 1), torch.ones(5, 1), [[0]] * 3000).unique().tolist() == [4]


def test_retrieval_by_hand() -> None:
    images = torch.eye(3)
    # Captions of image 0: right, and nearest to image 1; of image 1: second to image 0; of image 2: right.
    texts = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.8, 0.6, 0.0], [0.0, 0.1, 0.99]])
    found = retrieval(texts, images, [0, 0, 1, 2], bootstrap=0)
    assert found["text_to_image_r1"].value == 2 / 4
    assert found["text_to_image_r5"].value == 1
    # Image 0 finds its first caption at once, image 1 finds the second caption of image 0, image 2 its own.
    assert found["image_to_text_r1"].value == pytest.approx(2 / 3)
    assert found["image_to_text_r10"].value == 1
    assert found["mean_recall"].value == pytest.approx((0.5 + 1 + 1 + 2 / 3 + 1 + 1) / 6)


def test_retrieval_of_captions_that_say_nothing_finds_nothing() -> None:
    alike = torch.ones(40, 1)
    assert all(found.value == 0 for found in retrieval(alike, alike, [*range(40)], bootstrap=0).values())


def test_retrieval_resamples_images_with_their_captions() -> None:
    # One image has all its captions found, the other none: a resampling has one of three values.
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.0]] * 3 + [[1.0, 0.0]])
    found = retrieval(texts, images, [0, 0, 0, 1], bootstrap=50)["text_to_image_r1"]
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)


def test_zero_shot_by_hand() -> None:
    weights = torch.eye(6)
    features = torch.tensor([[1.0, 0.5, 0.4, 0.3, 0.2, 0.1]]).repeat(4, 1)
    labels = torch.tensor([0, 0, 1, 5])
    found = zero_shot(features, labels, weights, bootstrap=0)
    assert found["accuracy_at_1"].value == 0.5
    assert found["accuracy_at_5"].value == 0.75
    assert found["mean_class_recall"].value == pytest.approx((1 + 0 + 0) / 3)  # of the classes that occur
    assert "accuracy_at_5" not in zero_shot(features[:, :4], labels.clamp(max=3), weights[:4, :4], bootstrap=0)


def test_a_class_is_the_mean_of_its_sentences() -> None:
    weights = class_weights([torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0]])])
    torch.testing.assert_close(weights, torch.tensor([[0.5**0.5, 0.5**0.5], [0.0, 1.0]]))


def test_mean_class_recall() -> None:
    right, labels = torch.tensor([True, True, True, False]), torch.tensor([0, 0, 0, 2])
    assert mean_class_recall(right, labels) == 0.5


def test_an_interval_of_a_mean_is_what_theory_says() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = estimate(lambda rows: float(values[rows].mean()), 400, 1000, 0, "x")
    error = float(values.std()) / 20
    assert found.low is not None and found.high is not None
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.2 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.2 * error)


def test_an_interval_of_a_share_stays_in_its_range_and_the_seed_fixes_it() -> None:
    values = torch.tensor([1.0] * 9 + [0.0]).double()
    found = [estimate(lambda rows: float(values[rows].mean()), 10, 200, seed, "x") for seed in (1, 1)]
    assert found[0] == found[1] and (found[0].low or 0) >= 0 and (found[0].high or 2) <= 1


def test_an_interval_of_fid_holds_it() -> None:
    distance = FrechetDistance(Moments.of([normal(500, 30, 1)]))
    drawn = normal(60, 30, 1)
    found = estimate(lambda rows: distance(drawn[rows]), 60, 40, 0, "fid", at_least=0.0)
    assert found.low is not None and found.high is not None and 0 <= found.low < found.value < found.high


def test_images_of_a_prompt_are_resampled_together() -> None:
    seen = set()

    def note(rows: Tensor) -> float:
        seen.add(tuple((rows.reshape(-1, 3)[:, 0] % 3).tolist()))
        assert (rows.reshape(-1, 3).diff(dim=1) == 1).all()
        return 0.0

    estimate(note, 12, 20, 0, "x", width=3)
    assert seen == {(0, 0, 0, 0)}
    assert estimate(note, 3, 20, 0, "x", width=3).low is None
