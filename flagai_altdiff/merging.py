"""Requests of several people drawn in one batch, so that each gets the images that it would get alone. No torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields

from pydantic.dataclasses import dataclass

from flagai_altdiff.request import ResolvedRequest

_EACH_ROWS_OWN = ("prompts", "negative_prompt", "guidance_scale", "seed", "images_per_prompt", "batch_size")
"""Options in which requests of one batch may differ."""


@dataclass(frozen=True, kw_only=True)
class MergedRequest(ResolvedRequest):
    """Several requests as one, whose prompts are the images of all, in order. From :func:`merged`."""

    seeds: tuple[int, ...]
    negatives: tuple[str, ...]
    scales: tuple[float, ...]

    def seed_of(self, index: int) -> int:
        """The seed that the image has in its own request."""
        return self.seeds[index]

    def negative_of(self, index: int) -> str:
        """The negative prompt of its own request."""
        return self.negatives[index]

    def scale_of(self, index: int) -> float:
        """The guidance scale of its own request."""
        return self.scales[index]


def likeness(request: ResolvedRequest) -> Hashable | None:
    """What requests must have in common to be drawn together; ``None`` for one that must be drawn alone.

    Args:
        request: One whose images have seeds of their own and are drawn in one batch may have company.
    """
    alone = request.seed_mode != "per_image" or request.fixed_code or bool(request.variation_strength)
    if alone or request.iterations != 1 or request.batch_size < count(request):
        return None
    shared = tuple(getattr(request, f.name) for f in fields(ResolvedRequest) if f.name not in _EACH_ROWS_OWN)
    return (*shared, request.guidance_scale == 1.0)  # which needs no negative prompt, and half the work


def count(request: ResolvedRequest) -> int:
    """The images of a request."""
    return len(request.prompts) * request.images_per_prompt * request.iterations


def merged(requests: Sequence[ResolvedRequest]) -> ResolvedRequest:
    """Requests of one likeness as one; its images are theirs, in order. A single one stays as it is."""
    if len(requests) == 1:
        return requests[0]
    rows = [
        (prompt, request.negative_prompt, request.guidance_scale, request.seed_of(index))
        for request in requests
        for batch in request.batches()
        for prompt, index in zip(batch.prompts, batch.indices, strict=True)
    ]
    prompts, negatives, scales, seeds = zip(*rows, strict=True)
    shared = {f.name: getattr(requests[0], f.name) for f in fields(ResolvedRequest)}
    own = {"prompts": prompts, "images_per_prompt": 1, "batch_size": len(rows), "guidance_scale": max(scales)}
    return MergedRequest(**(shared | own), negatives=negatives, scales=scales, seeds=seeds)
