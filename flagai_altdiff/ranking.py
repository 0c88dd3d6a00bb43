"""The best of many: of each prompt's images, those that a matching model finds to fit it best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from flagai_altdiff.checkpoint.weights import fingerprint
from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.matching import match
from flagai_altdiff.models.altclip import AltCLIP
from flagai_altdiff.pipeline import Fit, Sample
from flagai_altdiff.request import GenerationRequest, ResolvedRequest
from flagai_altdiff.sampling import Step


def check_choice(best: int, request: GenerationRequest) -> None:
    """InvalidRequestError unless fewer images of each prompt are kept than the request draws."""
    drawn = request.images_per_prompt
    if drawn < 2:
        raise InvalidRequestError("images_per_prompt", drawn, "at least 2, to keep the best of them")
    if not 1 <= best < drawn:
        raise InvalidRequestError("best", best, f"1 to {drawn - 1}, fewer than the {drawn} drawn of each prompt")


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """Keeps the best images of each prompt.

    Args:
        judge: From :func:`flagai_altdiff.matching.load_matching_model`.
        best: How many of each prompt's images are kept.
    """

    judge: AltCLIP
    best: int

    @property
    def key(self) -> str:
        """What tells runs of other judges or numbers apart."""
        return f"best {self.best} by {self.judge.name} {fingerprint(self.judge)}"

    def choose(self, events: Iterable[Step | Sample], request: ResolvedRequest) -> Iterator[Step | Sample]:
        """The events of a drawing with fewer images: of each prompt the best ones, the best first.

        Args:
            events: As :func:`flagai_altdiff.pipeline.draw` gives them, all images of a prompt or none.
            request: What is drawn.
        """
        group: list[Sample] = []
        for event in events:
            if isinstance(event, Step):
                yield event
                continue
            group.append(event)
            if len(group) == request.images_per_prompt:
                yield from self._best(group)
                group = []

    def finished(self, saved: Iterable[int], request: ResolvedRequest) -> frozenset[int]:
        """Indices of all images of the prompts whose best are saved.

        Args:
            saved: Indices of the saved images.
            request: What is drawn.
        """
        count = request.images_per_prompt
        groups = Counter(index // count for index in saved)
        done = (group for group, kept in groups.items() if kept >= self.best)
        return frozenset(index for group in done for index in range(group * count, (group + 1) * count))

    def _best(self, group: list[Sample]) -> list[Sample]:
        fits = match(self.judge, [group[0].prompt], [sample.image for sample in group])[0]
        order = fits.argsort(descending=True, stable=True).tolist()[: self.best]
        for rank, i in enumerate(order, 1):
            group[i].fit = Fit(judge=self.judge.name, similarity=round(float(fits[i]), 4), rank=rank, of=len(group))
        return [group[i] for i in order]
