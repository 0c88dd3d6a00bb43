"""Every exception of the package. Each message says what happened, what was expected and what to type next.

Messages quote files and servers, which may hold anything: a terminal must neither obey nor drown in what they quote.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

_MAX_MESSAGE = 8_000
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def printable(text: str, length: int = _MAX_MESSAGE) -> str:
    """``text`` within a message: on one line, what is no visible character escaped, and cut if it is long.

    Args:
        text: Anything.
        length: Most characters, before any is escaped.
    """
    text = text if len(text) <= length else f"{text[: max(length - 3, 0)]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shown(value: object, length: int = 80) -> str:
    """A value of a file, a server or a caller as messages quote it: in Python's spelling, on one line, escaped and cut.

    Args:
        value: Anything; a container is spelled only as far as it is shown.
        length: Most characters.
    """
    if isinstance(value, str | bytes) and len(value) > length:
        return f"{value[: length - 3]!r}..."
    if isinstance(value, int) and value.bit_length() > 4 * length:
        return f"a number of about {round(value.bit_length() * 0.30103):,} digits"
    text = reprlib.repr(value) if isinstance(value, list | tuple | dict | set | frozenset) else repr(value)
    return printable(text, length)


class FlagAIAltDiffError(Exception):
    """Base of every error that this package raises on purpose."""

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(printable(line) for line in message[:_MAX_MESSAGE].split("\n")))


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
        super().__init__(f"{field}={shown(value)}: {expected}")


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


class OtherTaskError(UnknownModelError):
    """A model that is registered, but not for what was asked of it.

    Args:
        name: The model.
        task: What it is for.
        wanted: What it was to do.
        known: The models that do it.
    """

    def __init__(self, name: str, task: str, wanted: str, known: Iterable[str]) -> None:
        self.name, self.known = name, tuple(known)
        there = ", ".join(self.known)
        FlagAIAltDiffError.__init__(
            self, f"{name} is a model of another task, {task!r}. Models for {wanted!r}: {there}."
        )


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
            rows = [f"{key} {list(got)} instead of {list(want)}" for key, (got, want) in self.shapes.items()]
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


class FilesInTheWayError(HubError, FileExistsError):
    """Files of the user's stand where a model's would go; they are left as they are, and nothing came."""


class DiskError(_WithErrno, HubError):
    """The local disk failed while files were fetched or checked; another source would not help."""


class InsufficientMemoryError(FlagAIAltDiffError, MemoryError):
    """A batch does not fit into memory; the message has one that does."""


class NotFiniteError(FlagAIAltDiffError, ArithmeticError):
    """Sampling gave NaN or infinite values, so there is no image."""


class ImageError(FlagAIAltDiffError, OSError, ValueError):
    """An image file that cannot be read: gone, truncated, of another size, or no PNG."""


class OutputError(_WithErrno):
    """An image cannot be saved; those saved before stay."""


class MissingDependencyError(FlagAIAltDiffError, ImportError):
    """A package that is not installed; the message has the command that installs it."""


class DataError(FlagAIAltDiffError, OSError):
    """Training data that cannot be used: nothing is there, a disk or a server failed, or too much of it is broken."""


class BrokenExampleError(DataError):
    """One example of training data that cannot be used; the others can.

    Args:
        key: Its name.
        reason: What is wrong, in the same words for every example of which the same is wrong.
        detail: What is special about this one.
    """

    def __init__(self, key: str, reason: str, detail: str = "") -> None:
        self.key, self.reason, self.detail = key, reason, detail
        self.words = f"{reason} ({detail})" if detail else reason
        super().__init__(f"{printable(key, 300)}: {self.words}.")

    @property
    def named(self) -> str:
        """The name with what is special, for a list of all with this reason."""
        return f"{self.key} ({self.detail})" if self.detail else self.key


class TrainingInterrupted(FlagAIAltDiffError):
    """A training stage was stopped before its last step; its state is saved."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's own error is a RuntimeError, and the CPU raises a plain one."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
    )


@contextmanager
def last_net(where: object, kind: type[FlagAIAltDiffError] = CheckpointError) -> Iterator[None]:
    """Make what nobody foresaw an error of ours, for blocks that read what a file or server may have made up.

    Args:
        where: The file or address; the message begins with it.
        kind: The error to raise.

    Raises:
        FlagAIAltDiffError: Of ``kind``; those of ours pass, and a lack of memory is InsufficientMemoryError.
    """
    try:
        yield
    except FlagAIAltDiffError:
        raise
    except OSError as error:
        place = printable(str(error.filename or where), 400)
        raise kind(f"{place} cannot be used: {error.strerror or shown(str(error))}.") from error
    except Exception as error:
        if is_out_of_memory(error):
            raise InsufficientMemoryError(f"{where} needs more memory than there is.") from error
        if "\0" in str(where):
            raise kind(f"{where} has a zero byte in it; no file or folder can have that name.") from error
        reason = printable(str(error).split("\n")[0], 120)
        raise kind(
            f"{where} is damaged, or made to look like what it is not ({type(error).__name__}: {reason})."
        ) from error


def _first(names: Sequence[str], count: int = 3) -> str:
    rest = len(names) - count
    return ", ".join(printable(name, 120) for name in names[:count]) + (f" and {rest} more" if rest > 0 else "")
