"""What the server and the processes that draw say to each other. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagai_altdiff.errors import FlagAIAltDiffError, InsufficientMemoryError, InvalidRequestError, OutputError
from flagai_altdiff.request import GenerationRequest, ResolvedRequest

Lora = tuple[str, float]
"""Name and strength."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An error that crosses from one process to another, or to a client.

    Args:
        code: One word for programs, for example ``"invalid_request"``.
        text: For people.
        field: The option that is wrong, if it is one.
    """

    code: str
    text: str
    field: str = ""

    @classmethod
    def of(cls, error: Exception) -> Problem:
        """What is wrong, by the kind of an error."""
        if isinstance(error, InvalidRequestError):
            return cls(code="invalid_request", text=str(error), field=error.field)
        kinds = {InsufficientMemoryError: "out_of_memory", OutputError: "disk", FlagAIAltDiffError: "failed"}
        code = next((code for kind, code in kinds.items() if isinstance(error, kind)), "internal_error")
        return cls(code=code, text=str(error) or type(error).__name__)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the server must know of a model, without its weights.

    Args:
        name: As requests name it.
        languages: Of its prompts.
        licence: Of its weights.
        height: Default, in px; likewise ``width``, ``steps`` and ``guidance_scale``.
        width: See ``height``.
        steps: See ``height``.
        guidance_scale: See ``height``.
        downsampling: Pixels per latent cell.
        halvings: How often the UNet halves a latent.
        timesteps: Most steps.
    """

    name: str
    languages: tuple[str, ...]
    licence: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    downsampling: int
    halvings: int
    timesteps: int

    def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """The request as this model carries it out; InvalidRequestError where it cannot."""
        resolved = request.resolve(
            height=self.height,
            width=self.width,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            downsampling=self.downsampling,
            halvings=self.halvings,
        )
        if resolved.steps > self.timesteps:
            raise InvalidRequestError("steps", resolved.steps, f"this model has {self.timesteps}; ask for fewer")
        return resolved


@dataclass(frozen=True, kw_only=True)
class Task:
    """A request to be drawn.

    Args:
        id: Of its job.
        request: What.
        model: With which model.
        loras: Added to it.
        is_saved: Whether its images are filed on disk.
    """

    id: str
    request: ResolvedRequest
    model: str
    loras: tuple[Lora, ...] = ()
    is_saved: bool = True


@dataclass(frozen=True)
class Draw:
    """To a process: draw these together. They are of one likeness."""

    tasks: tuple[Task, ...]


@dataclass(frozen=True)
class Cancel:
    """To a process: nobody wants this job any more."""

    id: str


@dataclass(frozen=True)
class Skip:
    """To a process: leave out what it draws of this job now, and go on with the rest of it."""

    id: str


@dataclass(frozen=True)
class Ready:
    """From a process: it can draw with these models, and not with others; why, by their names."""

    models: tuple[ModelCard, ...]
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Refused:
    """From a process: it ends, as the model that draws unless another is named cannot be had."""

    problem: Problem


@dataclass(frozen=True)
class Progress:
    """From a process: steps that a job has taken, of how many, and how its images look (JPEG), if that is new."""

    id: str
    step: int
    steps: int
    preview: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """From a process: an image.

    Args:
        id: Of the job.
        index: Number within the request.
        prompt: Its prompt.
        seed: Its own.
        safety: Verdict.
        size: Width and height.
        path: Where it is saved, if it is.
        png: The file's bytes, if it is not.
    """

    id: str
    index: int
    prompt: str
    seed: int
    safety: str
    size: tuple[int, int]
    path: Path | None
    png: bytes | None


@dataclass(frozen=True)
class Done:
    """From a process: a job has all its images."""

    id: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Failed:
    """From a process: a job that cannot be drawn."""

    id: str
    problem: Problem


@dataclass(frozen=True)
class Free:
    """From a process: it waits for something to draw; and how much memory its GPU has, if it draws on one."""

    gpu: Mapping[str, Any] | None = None


ToWorker = Draw | Cancel | Skip
FromWorker = Ready | Refused | Progress | Drawn | Done | Failed | Free
