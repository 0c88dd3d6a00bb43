"""The result: one table for people, one for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from flagai_altdiff import __version__
from flagai_altdiff.errors import printable
from flagai_altdiff.evaluation.intervals import CONFIDENCE, Estimate

_NAMED = 10


@dataclass(frozen=True)
class Metric:
    """How a number is shown.

    Args:
        title: At the head of its column.
        lower_is_better: As distances are.
        percent: Whether it is a share.
        decimals: How many are shown.
    """

    title: str
    lower_is_better: bool = False
    percent: bool = False
    decimals: int = 3

    def show(self, value: float) -> str:
        """A value in the table."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.{self.decimals}f}"

    @property
    def heading(self) -> str:
        """The title, and which way is better."""
        return f"{self.title}{' %' if self.percent else ''} {'↓' if self.lower_is_better else '↑'}"


METRICS = {
    "fid": Metric("FID", lower_is_better=True),
    "inception_score": Metric("IS", decimals=2),
    "clip_similarity": Metric("CLIP Sim"),
    "accuracy": Metric("accuracy", percent=True),
    **{
        f"{kind}_r{k}": Metric(f"{name} R@{k}", percent=True)
        for kind, name in (("text_to_image", "text to image"), ("image_to_text", "image to text"))
        for k in (1, 5, 10)
    },
    "mean_recall": Metric("mean recall", percent=True),
    "accuracy_at_1": Metric("acc@1", percent=True),
    "accuracy_at_5": Metric("acc@5", percent=True),
    "mean_class_recall": Metric("mean class recall", percent=True),
}
"""What is known of the metrics; another column of a scorer is shown under its own name."""


def metric(name: str) -> Metric:
    """How a metric is shown."""
    return METRICS.get(name, Metric(name.replace("_", " ")))


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an evaluation found.

    Args:
        model: Name of the model.
        settings: Everything that the numbers depend on.
        languages: Language -> metric -> its estimate; NaN where nothing could be said.
        notes: What a reader of the table should know.
    """

    model: str
    settings: Mapping[str, Any]
    languages: Mapping[str, Mapping[str, Estimate]]
    notes: Sequence[str] = field(default=())

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in order."""
        return list(dict.fromkeys(name for found in self.languages.values() for name in found))

    def as_json(self) -> str:
        """For programs; a number that is none is ``null``."""
        languages = {
            language: {name: _plain(asdict(found)) for name, found in metrics.items()}
            for language, metrics in self.languages.items()
        }
        own = {
            "model": self.model,
            "version": __version__,
            "languages": languages,
            "notes": list(self.notes),
            "settings": dict(self.settings),
        }
        return json.dumps(own, ensure_ascii=False, indent=2, allow_nan=False) + "\n"

    def as_markdown(self) -> str:
        """For people: a row for each language, the interval behind each number; then notes and settings."""
        return "\n".join([self.table(), "", *(f"- {note}" for note in self.notes), "", *self._settings()]) + "\n"

    def table(self) -> str:
        """The table alone."""
        names = self.metrics
        lines = [_row("language", *(metric(name).heading for name in names)), "| --- |" + " ---: |" * len(names)]
        for language, found in self.languages.items():
            lines.append(_row(language, *(_cell(metric(name), found.get(name)) for name in names)))
        return "\n".join(lines)

    def _settings(self) -> list[str]:
        interval = f"Numbers in brackets: {CONFIDENCE:.0%} bootstrap intervals. Arrows point to what is better."
        return [interval, "", f"`{self.model}`, flagai_altdiff {__version__}:", *_listed(self.settings)]


def named(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    rest = len(names) - _NAMED
    return ", ".join(printable(name, 120) for name in names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _listed(settings: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(shown: Metric, found: Estimate | None) -> str:
    if found is None or found.value != found.value:
        return "–"
    if found.low is None or found.high is None:
        return shown.show(found.value)
    return f"{shown.show(found.value)} ({shown.show(found.low)} – {shown.show(found.high)})"


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in values.items()}
