"""The papers' protocol for a model that draws: its images in every language, measured.

**Source**: Ye et al. 2023 (arXiv 2308.09991), and the authors' evaluation scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.conditioning import cut_prompts
from flagai_altdiff.evaluation.drawing import Drawing
from flagai_altdiff.evaluation.intervals import Estimate, estimate
from flagai_altdiff.evaluation.measuring import Files, Share
from flagai_altdiff.evaluation.metrics import FrechetDistance, Moments, inception_score
from flagai_altdiff.evaluation.references import Crop, ImageFile
from flagai_altdiff.evaluation.report import Report, named
from flagai_altdiff.evaluation.scorers import ClipSimilarity, Scorer
from flagai_altdiff.evaluation.settings import BOOTSTRAP, PROTOCOL
from flagai_altdiff.evaluation.store import Measured, Shelf, digest, joined
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import prepare, unwrapped
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.request import GenerationRequest, ResolvedRequest

_SMALLEST = {"fid": 0.0, "inception_score": 1.0}
"""Metrics that hang on how many different images there are, and the least that they can be."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is to be drawn and measured.

    Args:
        model: From ``load_model``, without a safety checker, which would blacken images.
        prompts: Language -> its prompts.
        folder: For images, measurements and the report.
        pictures: Reference images; for prompts that name their own, those count.
        features: Whose features are compared with the reference's; none gives no FID.
        scorers: What else is measured of each image.
        bootstrap: How often is resampled for the intervals.
        options: Settings that are not the protocol's: options of ``GenerationRequest``.
        facts: What else should stand in the report's settings.
        notes: What else should stand in its notes.
    """

    model: LatentDiffusion
    prompts: Mapping[str, Sequence[Prompt]]
    folder: Path
    pictures: Sequence[ImageFile] = ()
    features: Scorer | None = None
    scorers: Sequence[Scorer] = ()
    bootstrap: int = BOOTSTRAP
    options: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @cached_property
    def settings(self) -> ResolvedRequest:
        """The settings as they are carried out, with no prompts yet.

        Raises:
            InvalidRequestError: One is wrong, or the model cannot draw this size.
            InsufficientMemoryError: A batch does not fit into memory.
        """
        return prepare(self.model, request_of(self.options))[0]

    @cached_property
    def run(self) -> str:
        """What tells the images of other weights apart."""
        model = unwrapped(self.model)
        return f"evaluation-{digest(fingerprint(model), str(model.autocast_dtype))}"

    @cached_property
    def drawings(self) -> list[Drawing]:
        """What is drawn, language by language."""
        return [
            Drawing(
                language,
                tuple(prompts),
                replace(self.settings, prompts=tuple(prompt.text for prompt in prompts)),
                self.folder / language,
                self.run,
                self.name,
            )
            for language, prompts in self.prompts.items()
        ]

    @property
    def name(self) -> str:
        """What the model is called."""
        return str(self.facts.get("model") or unwrapped(self.model).spec.name)

    @cached_property
    def references(self) -> Files | None:
        """The images that those of the model are compared with."""
        if self.features is None:
            return None
        paths: dict[ImageFile, None] = dict.fromkeys(self.pictures)
        paths |= {prompt.image: None for prompts in self.prompts.values() for prompt in prompts if prompt.image}
        size = (self.settings.width, self.settings.height)
        return Files.of([*paths], self.folder / "measured", "reference", self.features.key, size) if paths else None

    def work(self, share: Share) -> None:
        """Draw and measure one process's share of what is not there yet.

        Raises:
            OutputError: The disk refuses, or other images lie where these are to be.
            NotFiniteError: Sampling gave no image.
        """
        offset, lots = 0, []
        for drawing in self.drawings:
            lots.append((drawing, [*share.of(len(drawing.batches), offset)]))
            offset += len(drawing.batches)
        count = sum(len(drawing.batches[number]) for drawing, own in lots for number in own)
        with bar_class()(total=count, desc="images", unit="image", disable=share.rank > 0 or not show_bars()) as bar:
            for drawing, own in lots:
                missing = drawing.missing(own)
                bar.update(sum(len(drawing.batches[number]) for number in own) - len(missing))
                drawing.draw(self.model, missing, bar.update)
                for scorer, shelf in self._shelves(drawing):
                    for number in own:
                        if shelf.lacks(number):
                            shelf.put(number, Measured(scorer.score(*drawing.load(number))))
        self._measure_references(share, offset)

    @property
    def complete(self) -> bool:
        """Whether all processes have done their shares."""
        shelves = [shelf for drawing in self.drawings for _, shelf in self._shelves(drawing)]
        if self.references:
            shelves.append(self.references.shelf)
        return all(shelf.complete for shelf in shelves) and all(drawing.complete for drawing in self.drawings)

    def report(self) -> Report:
        """The numbers, from what was measured.

        Raises:
            OutputError: A measurement cannot be read.
        """
        device = unwrapped(self.model).device
        comparison = _Comparison(self.references, device) if self.references else None
        languages = {drawing.language: self._estimates(drawing, comparison) for drawing in self.drawings}
        notes = [*self.notes, *self._notes(), *(comparison.notes if comparison else ())]
        return Report(model=self.name, settings=self._facts(comparison), languages=languages, notes=notes)

    def _measure_references(self, share: Share, offset: int) -> None:
        if self.references is None or self.features is None:
            return
        crop = Crop(width=self.settings.width, height=self.settings.height)
        for number in share.of(self.references.shelf.batches, offset):
            if self.references.shelf.lacks(number):
                self.references.measure(number, self.features, crop)

    def _shelves(self, drawing: Drawing) -> list[tuple[Scorer, Shelf]]:
        scorers = [*([self.features] if self.features else []), *self.scorers]
        places = (self.folder / "measured" / f"{drawing.language}-{digest(s.key, drawing.key)}" for s in scorers)
        return [(s, Shelf(place, len(drawing.batches))) for s, place in zip(scorers, places, strict=True)]

    def _estimates(self, drawing: Drawing, comparison: _Comparison | None) -> dict[str, Estimate]:
        columns = {k: v for _, shelf in self._shelves(drawing) for k, v in joined(shelf).columns.items()}
        features, logits = columns.pop("features", None), columns.pop("logits", None)
        statistics: dict[str, Callable[[Tensor], float]] = {}
        distance = comparison.to(drawing, features) if comparison and features is not None else None
        if distance is not None and features is not None:
            statistics["fid"] = partial(_of_rows, distance, features)
        if logits is not None:
            statistics["inception_score"] = partial(_of_rows, inception_score, logits)
        for name, column in columns.items():
            if not column.isnan().all():
                statistics[name] = partial(_of_rows, _mean, column.double())
        seed, width = self.settings.seed, self.settings.images_per_prompt
        return {
            name: estimate(
                of,
                drawing.count,
                self.bootstrap,
                seed,
                f"{drawing.language} {name}",
                width=width,
                at_least=_SMALLEST.get(name),
            )
            for name, of in statistics.items()
        }

    def _notes(self) -> Iterator[str]:
        model = unwrapped(self.model)
        for drawing in self.drawings:
            if model.spec.languages and drawing.language.split("-")[0] not in model.spec.languages:
                yield f"{drawing.language}: {self.name} was not trained for this language"
            cut = [prompt.id for prompt in drawing.prompts if cut_prompts(model, [prompt.text])]
            if cut:
                yield f"{drawing.language}: prompts longer than 77 tokens, cut: {len(cut)}, by id {named(cut)}"
            without = [prompt.id for prompt in drawing.prompts if prompt.english is None]
            if without and any(isinstance(scorer, ClipSimilarity) for scorer in self.scorers):
                yield f"{drawing.language}: prompts without English captions: {len(without)}, by id {named(without)}"

    def _facts(self, comparison: _Comparison | None) -> dict[str, Any]:
        request = {name: value for name, value in self.settings.as_json().items() if name != "prompts"}
        return {
            **self.facts,
            **request,
            "weights": self.run,
            "images": {drawing.language: drawing.count for drawing in self.drawings},
            "reference images": comparison.count if comparison else 0,
            "features": self.features.key if self.features else None,
            "scorers": [scorer.key for scorer in self.scorers],
            "bootstrap": self.bootstrap,
            "torch": torch.__version__,
        }


def request_of(options: Mapping[str, Any]) -> GenerationRequest:
    """The protocol's settings with some of them changed, for no prompt in particular.

    Raises:
        InvalidRequestError: One is wrong.
    """
    return GenerationRequest(prompts=("",), **{**PROTOCOL, **options, "seed_mode": "per_image"})


class _Comparison:
    """Distances to the reference images.

    Args:
        references: The images, measured.
        device: Where distances are computed, if it has double precision.

    Attributes:
        count: How many can be read.
    """

    def __init__(self, references: Files, device: torch.device) -> None:
        self._references = references
        self._device = device if device.type == "cuda" else "cpu"
        self._place = {path: place for place, path in enumerate(references.paths)}
        self._last: tuple[frozenset[int], FrechetDistance | None] | None = None
        broken: dict[str, str] = {}
        for measured in references.shelf:
            broken |= measured.broken
        self.count = len(references.paths) - len(broken)
        self._notes = [f"broken reference images, left out: {len(broken)}, {named([*broken])}"] if broken else []
        self._few: list[str] = []

    @property
    def notes(self) -> list[str]:
        """What is to be said about the images and the distances to them."""
        if not self._few:
            return self._notes
        few = (
            f"FID from no more images than features ({self._width}) is too large, by an amount that hangs on how many "
            f"there are; compare it only with that of as many: {named(self._few)}"
        )
        return [*self._notes, few]

    def to(self, drawing: Drawing, features: Tensor) -> FrechetDistance | None:
        """The distance for a language: to the images that its prompts name, or to all."""
        named_images = frozenset(self._place[prompt.image] for prompt in drawing.prompts if prompt.image)
        wanted = named_images or frozenset(range(len(self._place)))
        if self._last is None or self._last[0] != wanted:
            self._last = (wanted, self._distance(wanted))
        distance = self._last[1]
        images, self._width = features.shape
        if distance is None or images < 2:
            self._notes.append(f"{drawing.language}: no FID; it takes two images, and two references that can be read")
            return None
        if min(images, distance.reference.count) <= self._width:
            self._few.append(f"{drawing.language} ({images} images, {distance.reference.count} references)")
        return distance

    def _distance(self, wanted: frozenset[int]) -> FrechetDistance | None:
        places = torch.tensor(sorted(wanted))
        rows = (
            measured.columns["features"][torch.isin(measured.columns["place"], places)]
            for measured in self._references.shelf
            if "features" in measured.columns
        )
        try:
            return FrechetDistance(Moments.of(rows), self._device)
        except ValueError:
            return None


def _of_rows(function: Callable[[Tensor], float], values: Tensor, rows: Tensor) -> float:
    return function(values[rows])


def _mean(values: Tensor) -> float:
    return float(values.nanmean())
