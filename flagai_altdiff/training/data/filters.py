"""Which examples are wanted: by language, score, size and length of the text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from flagai_altdiff.errors import InvalidRequestError
from flagai_altdiff.training.data.example import Caption
from flagai_altdiff.training.data.fields import Facts, language_code

UNKNOWN = "unknown"
"""What a list of languages calls the language of a caption of which nobody said it."""
LANGUAGE, SHORT, LONG = "no caption in a wanted language", "captions too short", "captions too long"
NO_SCORE, LOW_SCORE, SMALL = "no aesthetic score", "aesthetic score too low", "image too small"


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What an example must be; whatever is not set does not matter.

    Args:
        languages: Codes; ``zh`` stands for ``zh-tw`` as well, ``unknown`` for captions of no known language. Captions
            in others are left out, and so is an example that has no other.
        min_score: Smallest aesthetic score; an example without one is left out.
        min_side: Smallest of the shorter side, in px.
        min_text: Fewest characters of a caption.
        max_text: Most characters of a caption.
    """

    languages: tuple[str, ...] = ()
    min_score: float | None = None
    min_side: int | None = None
    min_text: int | None = None
    max_text: int | None = None

    def __post_init__(self) -> None:
        for code in self.languages:
            if code != UNKNOWN and language_code(code) != code:
                raise InvalidRequestError("languages", code, f"expected codes such as 'de' or 'zh-tw', or {UNKNOWN!r}")
        for name in ("min_side", "min_text", "max_text"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidRequestError(name, value, "expected 0 or more")
        if self.min_text is not None and self.max_text is not None and self.min_text > self.max_text:
            raise InvalidRequestError("min_text", self.min_text, f"expected at most max_text, which is {self.max_text}")

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) not in ((), None) for field in fields(self))

    def captions(self, captions: tuple[Caption, ...]) -> tuple[tuple[Caption, ...], str | None]:
        """The wanted ones, or none and the reason."""
        for reason, wanted in ((LANGUAGE, self._speaks), (SHORT, self._long_enough), (LONG, self._short_enough)):
            if captions and not (captions := tuple(caption for caption in captions if wanted(caption))):
                return (), reason
        return captions, None

    def against(self, facts: Facts) -> str | None:
        """Why an example is not wanted, as far as its score and its captions tell."""
        if self.min_score is not None and (facts.score is None or facts.score < self.min_score):
            return NO_SCORE if facts.score is None else LOW_SCORE
        return self.captions(facts.captions)[1]

    def against_size(self, width: int, height: int) -> str | None:
        """Why an image of this size is not wanted."""
        return SMALL if self.min_side is not None and min(width, height) < self.min_side else None

    def _speaks(self, caption: Caption) -> bool:
        code = caption.language or UNKNOWN
        return not self.languages or code in self.languages or code.split("-")[0] in self.languages

    def _long_enough(self, caption: Caption) -> bool:
        return self.min_text is None or len(caption.text) >= self.min_text

    def _short_enough(self, caption: Caption) -> bool:
        return self.max_text is None or len(caption.text) <= self.max_text
