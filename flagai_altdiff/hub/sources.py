"""Where a model may come from: a mirror, a cache on this disk, its hubs, in this order."""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from flagai_altdiff.errors import HubError, OfflineError
from flagai_altdiff.hub import baai, environment, hf_cache, huggingface
from flagai_altdiff.hub.addresses import redact_url
from flagai_altdiff.hub.disk import Digests, missing_files
from flagai_altdiff.hub.environment import MIRROR_VARIABLE, offline_switch
from flagai_altdiff.hub.inventory import Inventory, read_inventory
from flagai_altdiff.hub.mirror import Mirror
from flagai_altdiff.hub.remote import Hub
from flagai_altdiff.model_files import lacking
from flagai_altdiff.registry import ModelSpec

HUBS: dict[str, Hub] = {"baai": baai, "huggingface": huggingface}
"""Every hub by the name that ``ModelSpec.sources`` uses."""

CACHE = "huggingface-cache"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The model that is to be fetched.

    Args:
        spec: What it is.
        folder: Where it is to be.
        config_only: Whether its weights are left out.
        digests: Of the files there; each is read once in all attempts.
    """

    spec: ModelSpec
    folder: Path
    config_only: bool = False
    digests: Digests = field(default_factory=Digests, repr=False, compare=False)

    def missing(self) -> list[str]:
        """What its folder lacks now."""
        return missing_files(self.spec, self.folder, config_only=self.config_only)

    def inventory(self) -> Inventory:
        """Whose the files in its folder are now."""
        return read_inventory(self.folder, self.digests)

    def lacking(self, names: Set[str]) -> list[str]:
        """What it would lack with files of these names."""
        return lacking((file.name for file in self.spec.files), names, config_only=self.config_only)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A place that may have a model.

    Args:
        label: Short name, for messages and for the folder where its files are gathered.
        hub: Lists the files.
        name: Name of the model there.
        revision: Version to ask for, if not the hub's newest.
    """

    label: str
    hub: Hub = field(repr=False)
    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.label} ({self.name}{f' at {self.revision}' if self.revision else ''})"


def find_sources(wanted: Wanted, only: str | None, revision: str | None) -> list[Source]:
    """Where to look, in order; offline, only what is on this disk. Arguments as in :func:`fetching.fetch`."""
    spec = wanted.spec
    versions = {"huggingface": revision or spec.revision}
    hubs = [
        Source(label=label, hub=HUBS[label], name=name, revision=versions.get(label, revision))
        for label, name in spec.sources
        if only == label or (only is None and (revision is None or label in versions))
    ]
    cache = [
        replace(source, label=CACHE, hub=hf_cache)
        for source in hubs
        if source.hub is huggingface and hf_cache.has(source.name, source.revision)
    ]
    mirrors = [] if only in HUBS or spec.embedded else _mirrors(spec, only, revision)
    if switch := offline_switch():
        if not cache:
            places = f"{wanted.folder} or in Hugging Face's cache, {str(environment.hf_cache())!a}"
            raise OfflineError(
                f"{spec.name}: {', '.join(wanted.missing())} not found in {places}, and {switch} forbids "
                "downloads. Unset it and try again, or put the files there."
            )
        return cache
    return [*mirrors, *cache, *hubs]


def _mirrors(spec: ModelSpec, only: str | None, revision: str | None) -> list[Source]:
    """The mirror that was asked for, else that of the environment; its address is checked when it is its turn."""
    address = only or (environment.mirror() if revision is None else None)
    if address is None:
        return []
    if only and "://" not in only:
        known = ", ".join(HUBS)
        raise HubError(f"unknown source {redact_url(only)!a}: expected {known}, or the http(s) address of a mirror.")
    usual = tuple(file.name for file in spec.files)
    hub = Mirror(address=address, setting="source" if only else MIRROR_VARIABLE, usual_files=usual)
    return [Source(label=f"mirror-{tag(address)}", hub=hub, name=spec.name, revision=revision)]


def tag(text: str) -> str:
    """A short name for any text, for folders."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
