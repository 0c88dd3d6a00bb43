"""The work of a run: which pictures a file of prompts asks for, and which are drawn together.

Both follow from the file and the options alone, not from how many processes there are. So a picture has the same bytes
whoever draws it, and after however many interruptions.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flagai_altdiff.batch.lines import PromptLines
from flagai_altdiff.errors import FlagAIAltDiffError, InvalidRequestError, RegistryError
from flagai_altdiff.options import options_of
from flagai_altdiff.prompt_files import why_no_request
from flagai_altdiff.request import MAX_SEED, OPTIONS, GenerationRequest

_EACH_LINES_OWN = ("prompts", "seed")
"""Options in which pictures of one lot may differ."""
_TEXTS_AND_SEEDS = (*_EACH_LINES_OWN, "negative_prompt")
"""Options that a model draws whatever they are."""
_REMEMBERED = 10_000
_FIXED: Mapping[str, tuple[Any, str]] = {
    "seed_mode": ("per_image", "a picture of a run has a seed of its own, whoever draws it"),
    "iterations": (1, "a run goes through its file once; ask for more images of each prompt"),
    "fixed_code": (False, "a picture of a run begins with noise of its own"),
    "variation_strength": (None, "a picture of a run has a seed of its own"),
}
"""Option -> the only value that it has in a run, and why."""


@dataclass(frozen=True, kw_only=True)
class Lot:
    """Pictures that are drawn together.

    Args:
        number: Which of all lots.
        first: Number of its first picture.
        prompts: One for each picture.
        seeds: One for each picture.
        options: The other options, the same for all of them.
    """

    number: int
    first: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any] = field(repr=False)

    @property
    def pictures(self) -> range:
        """Numbers of its pictures."""
        return range(self.first, self.first + len(self.prompts))

    def request(self) -> GenerationRequest:
        """What is to be drawn; its seeds come from :attr:`seeds`."""
        own = {"images_per_prompt": 1, "batch_size": len(self.prompts), "seed": self.seeds[0]}
        return GenerationRequest(**{**self.options, **own, "prompts": self.prompts})


class Work:
    """The lots of a file, each made when it is asked for; a few bytes of memory for each.

    Picture k of all has the request's seed + k, and the j-th picture of a line that has a seed of its own that + j.
    Neighbours that differ in prompt and seed only are drawn together, as many at once as ``batch_size`` says.

    Args:
        lines: The file.
        typed: Options of a request, for all lines that do not say otherwise; ``seed`` among them.

    Attributes:
        sha256: Of the file.
        pictures: How many there are.
        examples: For each set of options that comes up, the first line that has it, and how many it draws at once.

    Raises:
        InvalidRequestError: A line asks for what cannot be drawn; the message has its number.
    """

    def __init__(self, lines: PromptLines, typed: Mapping[str, Any]) -> None:
        self._lines, self._typed, self.sha256 = lines, dict(typed), lines.sha256
        self._first, self._line, self._place = array("Q"), array("Q"), array("Q")
        self.examples: dict[str, tuple[int, int]] = {}
        self._rows: dict[str, tuple[int, int]] = {}
        self.pictures = 0
        self._check_typed()
        self._cut()

    def __len__(self) -> int:
        return len(self._first)

    def size(self, number: int) -> int:
        """How many pictures a lot has."""
        end = self._first[number + 1] if number + 1 < len(self) else self.pictures
        return end - self._first[number]

    def first(self, number: int) -> int:
        """Number of the first picture of a lot."""
        return self._first[number]

    def lot_of(self, picture: int) -> int:
        """The number of the lot that a picture is in."""
        return bisect_right(self._first, picture) - 1

    def __getitem__(self, number: int) -> Lot:
        """A lot."""
        first, size = self._first[number], self.size(number)
        line, place, rows = self._line[number], self._place[number], list[tuple[str, int]]()
        options: dict[str, Any] = {}
        while len(rows) < size:
            said = self._said(line)
            options = options or said
            own = self._pictures_of(line, said, first + len(rows) - place)
            rows += own[place : place + size - len(rows)]
            line, place = line + 1, 0
        prompts, seeds = zip(*rows, strict=True)
        own_options = {k: v for k, v in {**self._typed, **options}.items() if k not in _EACH_LINES_OWN}
        return Lot(number=number, first=first, prompts=prompts, seeds=seeds, options=own_options)

    def prompts(self) -> Iterator[str]:
        """Of all pictures, in order."""
        for number in range(len(self)):
            yield from self[number].prompts

    def _cut(self) -> None:
        """Look every line over, and note where lots begin."""
        before, count, most = "", 0, 0
        for line in range(len(self._lines)):
            said = self._said(line)
            kind, here, at_once = self._checked(line, said)
            place = 0
            while place < here:
                if kind != before or count == most:
                    self._first.append(self.pictures + place)
                    self._line.append(line)
                    self._place.append(place)
                    before, count, most = kind, 0, at_once
                taken = min(most - count, here - place)
                count, place = count + taken, place + taken
            self.pictures += here

    def _checked(self, line: int, said: Mapping[str, Any]) -> tuple[str, int, int]:
        """What a line's options are known by, how many pictures it has, and how many are drawn at once."""
        kind = json.dumps({k: v for k, v in said.items() if k not in _EACH_LINES_OWN}, sort_keys=True)
        prompts = said["prompts"]
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if kind not in self._rows or not (_are_texts(prompts) and _is_seed(said.get("seed", 0))):
            request = self._requested(line, said)
            prompts = request.prompts
            if len(self._rows) >= _REMEMBERED:
                self._rows.clear()
            self._rows[kind] = request.images_per_prompt, request.batch_size or request.images_per_prompt
            alike = json.dumps({k: v for k, v in said.items() if k not in _TEXTS_AND_SEEDS}, sort_keys=True)
            self.examples.setdefault(alike, (line, self._rows[kind][1]))
        each, at_once = self._rows[kind]
        return kind, len(prompts) * each, at_once

    def _said(self, line: int) -> dict[str, Any]:
        """What a line says, by our names of options."""
        text = self._lines[line]
        if not self._lines.are_requests:
            return {"prompts": (text,)}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._lines.wrong(line, f"it is no JSON: {error}") from None
        if reason := why_no_request(found):
            raise self._lines.wrong(line, reason)
        try:
            return named(found)
        except InvalidRequestError as error:
            raise self.wrong(line, error) from None

    def _pictures_of(self, line: int, said: Mapping[str, Any], first: int) -> list[tuple[str, int]]:
        """Prompt and seed of each picture of a line, whose first picture has this number."""
        request = self._requested(line, said)
        own = said.get("seed")
        start = self._typed["seed"] + first if own is None else own
        rows = [prompt for prompt in request.prompts for _ in range(request.images_per_prompt)]
        return [(prompt, (start + row) % (MAX_SEED + 1)) for row, prompt in enumerate(rows)]

    def _requested(self, line: int, said: Mapping[str, Any]) -> GenerationRequest:
        try:
            request = GenerationRequest(**{**self._typed, **said})
            _check_fixed(request)
        except (InvalidRequestError, RegistryError) as error:
            raise self.wrong(line, error) from None
        return request

    def _check_typed(self) -> None:
        """InvalidRequestError, by the option, where what is for all lines is wrong."""
        _check_fixed(GenerationRequest(**{**self._typed, "prompts": ("",)}))

    def checks(self) -> Iterator[tuple[int, Lot]]:
        """For each set of options a line and a lot that has it: what only a model can tell, it tells of these."""
        for line, at_once in self.examples.values():
            said = self._said(line)
            options = {k: v for k, v in {**self._typed, **said}.items() if k not in _EACH_LINES_OWN}
            prompt = self._requested(line, said).prompts[0]
            yield line, Lot(number=-1, first=0, prompts=(prompt,) * at_once, seeds=(0,) * at_once, options=options)

    def wrong(self, line: int, error: FlagAIAltDiffError) -> InvalidRequestError:
        """The error for a line that cannot be drawn."""
        return self._lines.wrong(line, str(error))


def named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a line of JSON by our names; FlagAI's names count too.

    Raises:
        InvalidRequestError: An option is there twice, by two names.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        own = _OURS.get(name, name)
        if own in found:
            raise InvalidRequestError(name, value, f"it is another name of {own}, which the line has as well")
        found[own] = value
    return found


_OURS = {option.flagai: name for name, option in options_of(GenerationRequest).items() if name != "batch_size"}
"""FlagAI's names of what a line may say -> ours."""


def _are_texts(prompts: object) -> bool:
    """Whether these are prompts for certain; what is not gets its error where all else is checked."""
    try:
        return isinstance(prompts, list | tuple) and bool(prompts) and all(type(text.encode()) for text in prompts)
    except (AttributeError, UnicodeEncodeError):
        return False


def _is_seed(seed: object) -> bool:
    return type(seed) is int and 0 <= seed <= MAX_SEED


def _check_fixed(request: GenerationRequest) -> None:
    for name, (only, why) in _FIXED.items():
        if (value := getattr(request, name)) not in (only, OPTIONS[name].default):
            raise InvalidRequestError(name, value, why)
    if request.seed == -1:
        raise InvalidRequestError("seed", -1, "a run needs a seed, so that all its processes draw the same")
