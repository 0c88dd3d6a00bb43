"""What was added to a model, as records and runs name it."""

from __future__ import annotations

from dataclasses import dataclass

QUANTIZE, PRECISION = "quantize", "precision"


@dataclass(frozen=True, kw_only=True)
class AddedLora:
    """A LoRA that has become part of a model's weights.

    Args:
        name: Of its file, without the ending.
        strength: With which it was added.
        sha256: First ten digits of the file's hash.
    """

    name: str
    strength: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}:{self.strength:g} ({self.sha256})"


@dataclass(frozen=True, kw_only=True)
class AddedPart:
    """A part from another file.

    Args:
        kind: ``"embedding"`` or ``"vae"``; or what is no part: ``QUANTIZE``, a way to keep weights, and ``PRECISION``,
            that of the computing, if it is not float32.
        name: Of its file, without the ending; of a word, as it is typed; of the way; of the precision, as torch has it.
        sha256: First ten digits of the file's hash, if there is a file.
    """

    kind: str
    name: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f" ({self.sha256})" if self.sha256 else "")


Added = AddedLora | AddedPart
