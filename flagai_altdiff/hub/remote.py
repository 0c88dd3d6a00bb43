"""What every hub offers: the files of a model, each with an address that is asked for when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flagai_altdiff.hub.manifest import MAX_SIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where one file can be downloaded now.

    Args:
        url: http or https; may be valid for a while only.
        size_bytes: Announced size, if the hub tells it with the address.
        headers: What the request needs.
    """

    url: str
    size_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file that a hub lists.

    Args:
        name: Path inside the model's folder as the hub spells it; not yet checked.
        locate: Asks the hub where the file is; raises ModelNotFoundError if it is gone.
        size_bytes: Announced size, if the list has it.
        sha256: Hex digest, if the list has it.
        revision: Version of the model that the file belongs to, if the hub has versions.
        copy: The same file on this disk, to be read and never written.
    """

    name: str
    locate: Callable[[], Location]
    size_bytes: int | None = None
    sha256: str | None = None
    revision: str | None = None
    copy: Path | None = None


class Hub(Protocol):
    """A place that models come from; a module with this function is one."""

    def list_files(self, name: str, revision: str | None = None) -> list[RemoteFile]:
        """The files of the model called ``name`` there; ModelNotFoundError if there is none."""
        ...


def check_size(value: object) -> int | None:
    """A size in bytes as a server wrote it; ``None`` if it is none."""
    return value if type(value) is int and 0 <= value < MAX_SIZE_BYTES else None
