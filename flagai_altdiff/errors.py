"""Every exception of the package. Each message says what happened, what was expected and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence


class FlagAIAltDiffError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(FlagAIAltDiffError, ValueError):
    """A config.yaml (or a diffusers config.json) says something that this package cannot build."""


class UnknownTargetError(ConfigError):
    """A ``target:`` string that is not in the allow-list; it is never imported."""


class InvalidRequestError(FlagAIAltDiffError, ValueError):
    """A generation argument outside its range.

    Args:
        field: The argument as the caller spelled it.
        value: What was given.
        expected: The allowed range and, where one exists, the nearest valid value.
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        self.field, self.value, self.expected = field, value, expected
        try:
            shown = repr(value)
        except ValueError:  # a number of thousands of digits
            shown = f"a huge {type(value).__name__}"
        super().__init__(f"{field}={shown if len(shown) <= 80 else shown[:77] + '...'}: {expected}")


class RegistryError(FlagAIAltDiffError, LookupError):
    """A name that no registry entry has.

    Args:
        kind: What was looked up, for example ``"model"``.
        name: The name that was asked for.
        known: The names that exist.
        hint: A further sentence for the user.
    """

    kind = "name"

    def __init__(self, name: str, known: Iterable[str], hint: str = "") -> None:
        self.name, self.known = name, tuple(known)
        by_lower = {k.lower(): k for k in self.known}
        near = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.4)
        guess = f" Did you mean {by_lower[near[0]]!r}?" if near else ""
        tail = f" {hint}" if hint else ""
        super().__init__(f"unknown {self.kind} {name!r}.{guess} Known: {', '.join(self.known)}.{tail}")


class UnknownModelError(RegistryError):
    """A model name that is neither registered nor a path to weights."""

    kind = "model"


class UnknownTaskError(RegistryError):
    """A task that this package does not have."""

    kind = "task"


class UnknownSamplerError(RegistryError):
    """A sampler name that is not in ``SAMPLERS``."""

    kind = "sampler"


class CheckpointError(FlagAIAltDiffError, RuntimeError):
    """Weights that are missing, unreadable or of another kind than asked for."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that asks for code beyond tensors and plain containers; nothing of it was run."""


class StateDictMismatchError(CheckpointError):
    """Keys or shapes of a checkpoint differ from the model's.

    Args:
        where: The file or folder that was read.
        missing: Keys that the model has and the checkpoint lacks.
        unexpected: Keys that the checkpoint has and the model lacks.
        shapes: Key -> (shape in the checkpoint, shape in the model).
        hint: What the file looks like instead, if that could be told.
    """

    def __init__(
        self,
        where: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        hint: str = "",
    ) -> None:
        self.missing, self.unexpected, self.shapes = list(missing), list(unexpected), dict(shapes or {})
        parts = [f"{where} does not fit the model."]
        for label, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                parts.append(f"{len(names)} {label} keys: {_first(names)}.")
        if self.shapes:
            rows = [f"{k} {list(got)} instead of {list(want)}" for k, (got, want) in self.shapes.items()]
            parts.append(f"{len(rows)} keys of another shape: {_first(rows)}.")
        super().__init__(" ".join([*parts, hint] if hint else parts))


class _WithErrno(FlagAIAltDiffError, OSError):
    """What the errors of a disk have in common.

    Args:
        text: What happened and what to do.
        code: The system's ``errno``.
    """

    def __init__(self, text: str, code: int | None = None) -> None:
        super().__init__(text)
        self.errno = code


class HubError(FlagAIAltDiffError, OSError):
    """A download that could not be completed."""


class HubUnavailableError(HubError, ConnectionError):
    """No source answered; the message lists every attempt."""


class ModelNotFoundError(HubError, FileNotFoundError):
    """A source answered, but has no such model or file."""


class IntegrityError(HubError):
    """A downloaded file is not the file that was announced (size or hash)."""


class OfflineError(HubError):
    """Files are missing and the offline switch forbids fetching them."""


class DiskError(_WithErrno, HubError):
    """The local disk failed while files were fetched or checked; another source would not help."""


class InsufficientMemoryError(FlagAIAltDiffError, MemoryError):
    """A batch does not fit into memory; the message has one that does."""


class NotFiniteError(FlagAIAltDiffError, ArithmeticError):
    """Sampling gave NaN or infinite values, so there is no image."""


class OutputError(_WithErrno):
    """An image cannot be saved; those saved before stay."""


class TrainingInterrupted(FlagAIAltDiffError):
    """A training stage was stopped before its last step; its state is saved."""


def _first(names: Sequence[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")
