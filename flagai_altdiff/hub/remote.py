"""What every hub offers: the files of a model, each with an address that is asked for when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flagai_altdiff.errors import HubError
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.environment import BAAI_VARIABLE
from flagai_altdiff.hub.manifest import MAX_SIZE_BYTES


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where one file can be downloaded now.

    Args:
        url: http or https; may be valid for a while only.
        size_bytes: Announced size, if the hub tells it with the address.
        headers: What the request needs.
        named_by: Address of the server that named this one, if the user did not choose it.
    """

    url: str
    size_bytes: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    named_by: str | None = None

    def check_way(self, sha256: str | None) -> None:
        """HubError if https is left on the way to a file that nothing vouches for.

        Args:
            sha256: Digest of the file, if it is known before.
        """
        if sha256 is None and (self.named_by or "").startswith("https:") and not self.url.startswith("https:"):
            raise HubError(
                f"{redact_url(self.named_by or '')} hands out an address without https, {redact_url(self.url)}, and no "
                "SHA-256 of the file is known, so everybody on the way could change it; refused. Take another source; "
                f"or, if you trust your network, name the hub with http:// in {BAAI_VARIABLE}."
            )


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
