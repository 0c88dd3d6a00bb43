"""The measures, as arithmetic on features: Fréchet distance, Inception score, recall, accuracy. In double precision."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

INCEPTION_SPLITS, _SPLIT_SEED = 10, 2020
"""As torch-fidelity has them."""
_BLOCK = 1024


@dataclass(frozen=True)
class Moments:
    """What the Fréchet distance looks at in a set of features.

    Args:
        count: How many there are.
        mean: (D,) float64.
        covariance: (D, D) float64, with ``count - 1`` degrees of freedom.
    """

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, batches: Iterable[Tensor]) -> Moments:
        """Moments of features that come batch by batch, (B, D) each; no more than a few are kept.

        Means and scatters are joined pairwise (Chan et al. 1983), so that features far from zero lose no digits.

        Raises:
            ValueError: There are fewer than two.
        """
        count, mean, scatter = 0, torch.zeros(()), torch.zeros(())
        for rows in _lots(batches):
            own = rows.mean(dim=0)
            centred = rows - own
            shift = own - mean
            joined = count + len(rows)
            scatter = scatter + centred.T @ centred + torch.outer(shift, shift) * (count * len(rows) / joined)
            mean = mean + shift * (len(rows) / joined)
            count = joined
        if count < 2:
            raise ValueError(f"{count} images have no covariance; expected at least 2")
        return cls(count, mean, scatter / (count - 1))


def _lots(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches joined to larger ones, of which each costs a few passes over a (D, D) matrix; none is empty."""
    lot: list[Tensor] = []
    for batch in batches:
        lot.append(batch.double())
        if sum(map(len, lot)) >= _BLOCK:
            yield torch.cat(lot)
            lot = []
    if any(map(len, lot)):
        yield torch.cat(lot)


class FrechetDistance:
    """Fréchet distance of features to a reference, as normal distributions (FID): Heusel et al. 2017.

    The trace of the root of the product of both covariances is the sum of the singular values of ``X R``, for centred
    features X (N, D) and the root R of the reference's covariance: no root of a matrix that is not symmetric is taken,
    and a set with fewer images than features costs N³, not D³.

    Args:
        reference: Of the reference images.
        device: Where it is computed; it must have double precision.
    """

    def __init__(self, reference: Moments, device: torch.device | str = "cpu") -> None:
        self.reference = reference
        covariance = reference.covariance.to(device)
        values, vectors = torch.linalg.eigh(covariance)
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self._trace = covariance.trace()
        self._mean = reference.mean.to(device)

    def __call__(self, features: Tensor) -> float:
        """Distance of N features (N, D), N at least 2."""
        rows = features.to(self._root)
        mean = rows.mean(dim=0)
        centred = (rows - mean) / (len(rows) - 1) ** 0.5
        product = centred @ self._root
        gram = product @ product.T if len(rows) < rows.shape[1] else product.T @ product
        root_trace = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        spread = centred.square().sum() + self._trace - 2 * root_trace
        return max(float((mean - self._mean).square().sum() + spread), 0.0)


def inception_score(logits: Tensor, splits: int = INCEPTION_SPLITS) -> float:
    """How sure a classifier is of each image, and how many classes there are (Salimans et al. 2016).

    Args:
        logits: (N, classes).
        splits: The mean is taken over so many parts of the images in a fixed random order; over N for fewer images.
    """
    order = torch.from_numpy(np.random.RandomState(_SPLIT_SEED).permutation(len(logits)))
    log_p = logits[order].double().log_softmax(dim=1)
    splits = min(splits, len(logits))
    edges = [i * len(logits) // splits for i in range(splits + 1)]
    scores = []
    for start, end in pairwise(edges):
        part = log_p[start:end]
        log_q = part.logsumexp(dim=0) - np.log(len(part))
        scores.append((part.exp() * (part - log_q)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def best_ranks(queries: Tensor, candidates: Tensor, partners: Sequence[Sequence[int]]) -> Tensor:
    """For each query how many wrong candidates fit at least as well as its best partner; 0: a partner is found first.

    Args:
        queries: (N, P), normalised.
        candidates: (M, P), normalised.
        partners: For each query the candidates that belong to it, at least one.

    Returns:
        (N,) int64. A wrong candidate that fits equally well counts against the query: features that are all alike
        find nothing.
    """
    ranks = []
    for start in range(0, len(queries), _BLOCK):
        scores = queries[start : start + _BLOCK].float() @ candidates.float().T
        own = partners[start : start + _BLOCK]
        rows = torch.tensor([i for i, found in enumerate(own) for _ in found])
        columns = torch.tensor([j for found in own for j in found])
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[rows, columns] = True
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~right).sum(dim=1))
    return torch.cat(ranks)


def class_weights(features: Sequence[Tensor]) -> Tensor:
    """A classifier from texts: for each class the normalised mean of its texts' normalised features.

    Args:
        features: For each class (templates, P).

    Returns:
        (classes, P).
    """
    means = torch.stack([texts.mean(dim=0) for texts in features])
    return torch.nn.functional.normalize(means, dim=-1)


def mean_class_recall(right: Tensor, labels: Tensor) -> float:
    """Mean over the classes that occur of the share of their images that are right.

    Args:
        right: (N,) of truth values.
        labels: (N,) int64.
    """
    counts = torch.bincount(labels).double()
    hits = torch.bincount(labels, weights=right.double())
    return float((hits[counts > 0] / counts[counts > 0]).mean())
