"""The images of one language, drawn batch by batch: the same files, however many processes draw them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from PIL import Image

from flagai_altdiff.errors import ImageError, OutputError, shown
from flagai_altdiff.evaluation.store import digest
from flagai_altdiff.evaluation.tables import Prompt
from flagai_altdiff.files import new_file
from flagai_altdiff.images import load_image, read_texts, save_png
from flagai_altdiff.metadata import RECORD_KEY, png_texts, read_record
from flagai_altdiff.models import LatentDiffusion
from flagai_altdiff.pipeline import VERDICTS, Sample, draw
from flagai_altdiff.request import Batch, ResolvedRequest


@dataclass(frozen=True)
class Drawing:
    """What is to be drawn in one language.

    The unit of work is a batch: which images are drawn together depends on the prompts alone, and each has a seed of
    its own. So an image has the same bytes whichever process draws it, and after however many interruptions.

    Args:
        language: Its code.
        prompts: Its prompts.
        request: The same prompts with all settings, seeds per image.
        folder: Of the images: 00000.png …, by their index.
        run: What tells the images of other weights apart; it stands in their records.
        model_name: What the records call the model.
    """

    language: str
    prompts: tuple[Prompt, ...]
    request: ResolvedRequest
    folder: Path
    run: str
    model_name: str

    @cached_property
    def batches(self) -> list[Batch]:
        """What is drawn together."""
        return list(self.request.batches())

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of an image."""
        return self.prompts[index // self.request.images_per_prompt]

    def file(self, index: int) -> Path:
        """Where an image is, or is to be."""
        return self.folder / f"{index:05d}.png"

    @property
    def count(self) -> int:
        """How many images there are to be."""
        return len(self.prompts) * self.request.images_per_prompt

    @property
    def complete(self) -> bool:
        """Whether every image has its file."""
        return all(self.file(index).is_file() for index in range(self.count))

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Indices of the images of some batches that are still to be drawn.

        Raises:
            OutputError: Another image lies where one of them is to be.
        """
        return [index for number in batches for index in self.batches[number].indices if not self._finished(index)]

    def draw(self, model: LatentDiffusion, indices: Iterable[int], drawn: Callable[[], object]) -> None:
        """Draw images.

        Args:
            model: The model.
            indices: Which ones. The rest of their batches is drawn again, and left as it is.
            drawn: Called after each image.

        Raises:
            OutputError: The disk refuses.
            NotFiniteError: Sampling gave no image.
        """
        skip = frozenset(range(self.count)).difference(indices)
        for event in draw(model, self.request, skip):
            if isinstance(event, Sample):
                self._save(event)
                drawn()

    def load(self, batch: int) -> tuple[list[Image.Image], list[Prompt]]:
        """The images of a batch, which are there, and their prompts.

        Raises:
            OutputError: One is damaged.
        """
        indices = self.batches[batch].indices
        try:
            images = [load_image(self.file(i), (self.request.width, self.request.height)) for i in indices]
        except ImageError as error:
            raise OutputError(f"{error} Remove it, and run the command again.") from error
        return images, [self.prompt_of(i) for i in indices]

    @cached_property
    def key(self) -> str:
        """What its images depend on, for :func:`flagai_altdiff.evaluation.store.digest`."""
        return digest(self.run, self.model_name, self.request.as_json(), [prompt.english for prompt in self.prompts])

    def _finished(self, index: int) -> bool:
        """Whether the very image is there.

        Raises:
            OutputError: Another one is.
        """
        path = self.file(index)
        if not path.exists():
            return False
        try:
            read_texts(path)
        except ImageError:  # it was cut off by a fault of the disk, for it had its name only when it was whole
            return False
        there, wanted = read_record(path), self._record(index)
        if there.pop("safety", None) in VERDICTS and there == wanted:
            return True
        names = [name for name in {**wanted, **there} if wanted.get(name) != there.get(name)]
        other = (
            f"{names[0]} is {shown(there.get(names[0]))}, not {shown(wanted.get(names[0]))}" if names else "no record"
        )
        raise OutputError(
            f"{path} is an image of other settings ({other}). Name another folder with --outdir, or remove the file."
        )

    def _record(self, index: int) -> dict[str, object]:
        sample = Sample(
            prompt=self.prompt_of(index).text, index=index, seed=self.request.seed_of(index), safety=VERDICTS[-1]
        )
        record: dict[str, object] = json.loads(self._texts(sample)[RECORD_KEY])
        del record["safety"]
        return record

    @cached_property
    def _settings(self) -> ResolvedRequest:
        """The request without its prompts, which would be spelled for every record."""
        return replace(self.request, prompts=("",))

    def _texts(self, sample: Sample) -> dict[str, str]:
        return png_texts(sample, self._settings, self.model_name, self.run)

    def _save(self, sample: Sample) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.file(sample.index), replace=True) as unfinished:
                save_png(sample.image, self._texts(sample), unfinished)
        except OSError as error:
            text = (
                f"{self.folder}: {error.strerror or error}. What was drawn stays; see to it, and run the command again."
            )
            raise OutputError(text, error.errno) from error
