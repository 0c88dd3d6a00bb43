"""What a matching model finds: images by captions and captions by images, and the classes of images by their names.

Definitions are those of CLIP_benchmark, whose numbers the papers report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from flagai_altdiff.errors import InvalidRequestError, shown
from flagai_altdiff.evaluation.intervals import Estimate, estimate
from flagai_altdiff.evaluation.measuring import FILES_AT_ONCE, Files, Share
from flagai_altdiff.evaluation.metrics import best_ranks, class_weights, mean_class_recall
from flagai_altdiff.evaluation.references import ImageFile, find_classes
from flagai_altdiff.evaluation.report import Report, named
from flagai_altdiff.evaluation.scorers import AltCLIPFeatures
from flagai_altdiff.evaluation.settings import BOOTSTRAP
from flagai_altdiff.evaluation.store import Measured, joined
from flagai_altdiff.evaluation.tables import check_languages, read_table
from flagai_altdiff.matching import image_features, text_features
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.progress import bar_class, show_bars
from flagai_altdiff.tokenizer import MAX_TOKENS

CUTOFFS = (1, 5, 10)
_SEED = 0
_PLACES = ("{}", "{c}")


@dataclass(frozen=True)
class Caption:
    """A text, and the one image that it describes."""

    text: str
    image: Path


class LabelledImages(Protocol):
    """A dataset as torchvision has them: pairs of a PIL image and the number of its class."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Images that are to be found by their captions in each language, and captions by their images.

    Args:
        model: From ``load_matching_model``.
        captions: Language -> captions; an image may have several.
        folder: For measurements and the report.
        bootstrap: How often is resampled for the intervals.
        facts: What else should stand in the report's settings.
    """

    model: AltCLIP
    captions: Mapping[str, Sequence[Caption]]
    folder: Path
    bootstrap: int = BOOTSTRAP
    facts: Mapping[str, Any]

    @cached_property
    def _measuring(self) -> _Measuring:
        paths = dict.fromkeys(caption.image for captions in self.captions.values() for caption in captions)
        return _Measuring(self.model, [*paths], self.folder)

    def work(self, share: Share) -> None:
        """Measure one process's share of what is not there yet; OutputError where the disk refuses."""
        self._measuring.work(share)

    @property
    def complete(self) -> bool:
        """Whether all processes have done their shares."""
        return self._measuring.files.shelf.complete

    def report(self) -> Report:
        """The numbers, from what was measured; OutputError where that cannot be read."""
        measured = self._measuring.measured
        row = {self._measuring.files.paths[place]: i for i, place in enumerate(measured.columns["place"].tolist())}
        notes, languages = self._measuring.notes, {}
        for language, captions in self.captions.items():
            there = [caption for caption in captions if caption.image in row]
            texts = [caption.text for caption in there]
            notes += [*_cut(self.model, language, texts)]
            features = text_features(self.model, texts)
            # Only this language's images are candidates.
            own = sorted({row[caption.image] for caption in there})
            number = {place: i for i, place in enumerate(own)}
            partners = [number[row[caption.image]] for caption in there]
            images = measured.columns["features"][own]
            languages[language] = retrieval(features, images, partners, bootstrap=self.bootstrap, key=language)
        images_in = {language: len({caption.image for caption in own}) for language, own in self.captions.items()}
        counts = {"captions": {language: len(own) for language, own in self.captions.items()}, "images": images_in}
        facts = {**self.facts, **counts, **self._measuring.facts, "bootstrap": self.bootstrap}
        return Report(model=self.model.name, settings=facts, languages=languages, notes=notes)


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Images whose classes are to be told from the classes' names in each language.

    Args:
        model: From ``load_matching_model``.
        images: A folder with a folder of images for each class.
        names: Language -> name of each class, in the order of the folders.
        templates: Language -> sentences with ``{}`` for the name.
        folder: For measurements and the report.
        bootstrap: How often is resampled for the intervals.
        facts: What else should stand in the report's settings.
    """

    model: AltCLIP
    images: Path
    names: Mapping[str, Sequence[str]]
    templates: Mapping[str, Sequence[str]]
    folder: Path
    bootstrap: int = BOOTSTRAP
    facts: Mapping[str, Any]

    @cached_property
    def _found(self) -> tuple[list[str], list[ImageFile], list[int]]:
        return find_classes(self.images)

    @cached_property
    def _measuring(self) -> _Measuring:
        return _Measuring(self.model, self._found[1], self.folder)

    def work(self, share: Share) -> None:
        """Measure one process's share of what is not there yet; OutputError where the disk refuses."""
        self._measuring.work(share)

    @property
    def complete(self) -> bool:
        """Whether all processes have done their shares."""
        return self._measuring.files.shelf.complete

    def report(self) -> Report:
        """The numbers, from what was measured; OutputError where that cannot be read."""
        measured = self._measuring.measured
        labels = torch.tensor(self._found[2])[measured.columns["place"]]
        notes = self._measuring.notes
        languages = {}
        for language, names in self.names.items():
            notes += [*_cut(self.model, language, self.templates[language])]
            weights = classifier(self.model, names, self.templates[language])
            languages[language] = zero_shot(
                measured.columns["features"], labels, weights, bootstrap=self.bootstrap, key=language
            )
        counts: dict[str, Any] = {"images": len(labels), "classes": len(self._found[0])}
        counts |= {"templates": {language: len(self.templates[language]) for language in self.names}}
        facts = {**self.facts, **counts, **self._measuring.facts, "bootstrap": self.bootstrap}
        return Report(model=self.model.name, settings=facts, languages=languages, notes=notes)


def read_captions(
    path: Path, languages: Sequence[str] = (), *, pictures: Path | None = None
) -> dict[str, list[Caption]]:
    """Captions of each language.

    Args:
        path: A table with the columns ``language``, ``image`` and ``caption``, a row for each caption.
        languages: Which ones to take; all if left out.
        pictures: Where ``image`` counts from; the table's own folder if left out.

    Raises:
        InvalidRequestError: The table is none, or has nothing for a language.
    """
    rows = read_table(path, "retrieval", ("language", "image", "caption"))
    found: dict[str, list[Caption]] = {}
    for row in rows:
        if "image" not in row:
            raise InvalidRequestError("retrieval", str(path), "a text file names no images; expected a table")
        found.setdefault(row["language"], []).append(Caption(row["caption"], (pictures or path.parent) / row["image"]))
    check_languages(languages, found, path)
    return {language: found[language] for language in languages or sorted(found)}


def read_classes(
    classes: Path, templates: Path, images: Path, languages: Sequence[str] = ()
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names of classes, and templates, of each language.

    Args:
        classes: A table with the columns ``language``, ``class`` (name of its folder) and ``name``; or text files with
            a name on each line, in the order of the folders' names.
        templates: A table with the columns ``language`` and ``template``, or text files.
        images: The folder with the folders.
        languages: Which ones to take; all that ``classes`` has if left out.

    Returns:
        Language -> names in the order of the folders; language -> templates.

    Raises:
        InvalidRequestError: A table is none, lacks a language or a class, or a template has no place for the name.
    """
    folders = find_classes(images)[0]
    rows: dict[str, list[Mapping[str, str]]] = {}
    for row in read_table(classes, "classes", ("language", "name")):
        rows.setdefault(row["language"], []).append(row)
    check_languages(languages, rows, classes)
    names = {language: _in_order(rows[language], folders, language, classes) for language in languages or sorted(rows)}
    sentences: dict[str, list[str]] = {}
    for row in read_table(templates, "templates", ("language", "template")):
        if not any(place in row["template"] for place in _PLACES):
            text = f"{shown(row['template'])} has no {{}} where the name of the class goes"
            raise InvalidRequestError("templates", str(templates), text)
        sentences.setdefault(row["language"], []).append(row["template"])
    check_languages(names, sentences, templates)
    return names, {language: sentences[language] for language in names}


def classifier(model: AltCLIP, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Weights (classes, P) that tell classes by their names.

    Args:
        model: From ``load_matching_model``.
        names: Of the classes.
        templates: Sentences with ``{}`` or ``{c}`` for the name.
    """
    texts = [[_filled(template, name) for template in templates] for name in names]
    return class_weights([text_features(model, own) for own in texts])


def dataset_features(model: AltCLIP, dataset: LabelledImages) -> tuple[Tensor, Tensor]:
    """Features (N, P) and labels (N,) of a torchvision-style dataset, a few images at a time."""
    features, labels = [], []
    for start in range(0, len(dataset), FILES_AT_ONCE):
        pairs = [dataset[i] for i in range(start, min(start + FILES_AT_ONCE, len(dataset)))]
        features.append(image_features(model, [image for image, _ in pairs]))
        labels += [int(label) for _, label in pairs]
    return torch.cat(features), torch.tensor(labels)


def retrieval(
    texts: Tensor, images: Tensor, partners: Sequence[int], *, bootstrap: int = BOOTSTRAP, key: str = ""
) -> dict[str, Estimate]:
    """Recall at 1, 5 and 10, both ways, and the mean of the six.

    A caption is found if its image is among the first k; an image, if any of its captions is.

    Args:
        texts: Normalised features of N captions, (N, P).
        images: Normalised features of M images, (M, P), each with a caption at least.
        partners: For each caption its image.
        bootstrap: How often is resampled: images, each with its captions.
        key: What tells the random numbers from others'.
    """
    if not len(texts):
        return {}
    captions: list[list[int]] = [[] for _ in range(len(images))]
    for caption, image in enumerate(partners):
        captions[image].append(caption)
    place = torch.tensor(partners)
    counts = torch.bincount(place, minlength=len(images)).double()
    image_ranks = best_ranks(texts, images, [[image] for image in partners])
    text_ranks = best_ranks(images, texts, captions)
    statistics: dict[str, Callable[[Tensor], float]] = {}
    for k in CUTOFFS:
        hits = torch.bincount(place, weights=(image_ranks < k).double(), minlength=len(images))
        statistics[f"text_to_image_r{k}"] = partial(_ratio, hits, counts)
    for k in CUTOFFS:
        found = (text_ranks < k).double()
        statistics[f"image_to_text_r{k}"] = partial(_ratio, found, torch.ones_like(found))
    six = [*statistics.values()]
    statistics["mean_recall"] = lambda rows: sum(of(rows) for of in six) / len(six)
    return {name: estimate(of, len(images), bootstrap, _SEED, f"{key} {name}") for name, of in statistics.items()}


def zero_shot(
    features: Tensor, labels: Tensor, weights: Tensor, *, bootstrap: int = BOOTSTRAP, key: str = ""
) -> dict[str, Estimate]:
    """Accuracy at 1, at 5 where there are five classes, and the mean of the classes' recalls.

    Args:
        features: Normalised features of N images, (N, P).
        labels: Their classes, (N,) int64.
        weights: From :func:`classifier`.
        bootstrap: How often is resampled, image by image.
        key: What tells the random numbers from others'.
    """
    if not len(features):
        return {}
    ranks = best_ranks(features, weights, [[label] for label in labels.tolist()])
    statistics: dict[str, Callable[[Tensor], float]] = {
        f"accuracy_at_{k}": partial(_ratio, (ranks < k).double(), torch.ones(len(ranks)))
        for k in (1, 5)
        if k <= len(weights)
    }
    statistics["mean_class_recall"] = lambda rows: mean_class_recall(ranks[rows] < 1, labels[rows])
    return {name: estimate(of, len(ranks), bootstrap, _SEED, f"{key} {name}") for name, of in statistics.items()}


def _ratio(parts: Tensor, wholes: Tensor, rows: Tensor) -> float:
    return float(parts[rows].sum() / wholes[rows].sum())


class _Measuring:
    """Features of image files.

    Args:
        model: The matching model.
        paths: The files.
        folder: Of the evaluation.
    """

    def __init__(self, model: AltCLIP, paths: Sequence[ImageFile], folder: Path) -> None:
        self._scorer = AltCLIPFeatures(model, normalised=True)
        self.files = Files.of(paths, folder / "measured", "images", self._scorer.key)

    def work(self, share: Share) -> None:
        own = [*share.of(self.files.shelf.batches)]
        hidden = share.rank > 0 or not show_bars()
        for number in bar_class()(own, desc="images", unit=f"{FILES_AT_ONCE} images", disable=hidden):
            if self.files.shelf.lacks(number):
                self.files.measure(number, self._scorer)

    @cached_property
    def measured(self) -> Measured:
        found = joined(self.files.shelf)
        return (
            found
            if "features" in found.columns
            else Measured({**found.columns, "features": torch.zeros(0, 1)}, found.broken)
        )

    @property
    def notes(self) -> list[str]:
        broken = [*self.measured.broken]
        return [f"broken images, left out: {len(broken)}, {named(broken)}"] if broken else []

    @property
    def facts(self) -> dict[str, Any]:
        return {"weights": self._scorer.key, "broken": len(self.measured.broken), "torch": torch.__version__}


def _in_order(rows: Sequence[Mapping[str, str]], folders: Sequence[str], language: str, path: Path) -> list[str]:
    """The name of each folder's class."""
    if not any("class" in row for row in rows):
        if len(rows) != len(folders):
            expected = f"{language} has {len(rows)} names, but there are {len(folders)} folders; expected one for each"
            raise InvalidRequestError("classes", str(path), expected)
        return [row["name"] for row in rows]
    names = {row["class"]: row["name"] for row in rows if "class" in row}
    lacking = [folder for folder in folders if folder not in names]
    if lacking:
        expected = f"{language} has no name for {len(lacking)} folders: {named(lacking)}"
        raise InvalidRequestError("classes", str(path), expected)
    return [names[folder] for folder in folders]


def _filled(template: str, name: str) -> str:
    for place in _PLACES:
        template = template.replace(place, name)
    return template


def _cut(model: AltCLIP, language: str, texts: Sequence[str]) -> Iterator[str]:
    assert model.text_tokenizer is not None
    count = sum(bool(model.text_tokenizer.lost_text(text, MAX_TOKENS)) for text in dict.fromkeys(texts))
    if count:
        yield f"{language}: texts longer than {MAX_TOKENS} tokens, cut: {count}"
